// What the kernels of arm_zoo/ops/cuda/launch.py share; this text stands before theirs when NVRTC compiles them, and
// instructions.cuh before it.
//
// Macros: DTYPE 0 float32, 1 bfloat16, 2 float16; S states (1, 2, 4, 8 or 16); CHUNK steps between saved states (16);
// A_IS_T, D_IS_T and BIAS_IS_T 1 where these parameters have the sequences' type, else they have float32; LOG_RATES 1
// where A holds logarithms of -A; HAS_BIAS, SOFTPLUS, HAS_ORDER, PER_IMAGE 1 where each image has its own; TOKENS 1 where
// the rows of all sequences are tokens, which the order says the steps of, else they are steps; PARTS that a sequence is
// split into along its length, and CLUSTER blocks that have them and run together; and each kernel's own.

#define LOG2E 1.4426950408889634f
#define LN2 0.6931471805599453f
#define QUAD (S < 4 ? S : 4)  // states, or their B or C, that are read at once
typedef long long i64;
struct __align__(4 * QUAD) Quad {
    float at[QUAD];
};

#if DTYPE == 0
typedef float T;
#else
typedef unsigned short T;
#endif

__device__ __forceinline__ float to_float(T v) {
#if DTYPE == 0
    return v;
#elif DTYPE == 1
    return __uint_as_float((unsigned)v << 16);
#else
    return from_float16(v);
#endif
}
#if DTYPE != 0
__device__ __forceinline__ float to_float(float v) { return v; }
#endif
template <int> struct Parameter {
    typedef float Type;
};
template <> struct Parameter<1> {
    typedef T Type;
};
typedef Parameter<A_IS_T>::Type TypeOfA;
typedef Parameter<D_IS_T>::Type TypeOfD;
typedef Parameter<BIAS_IS_T>::Type TypeOfBias;
// saved states and partial sums have the inputs' bits: float32, or bfloat16 also for float16, whose range is too small
__device__ __forceinline__ float from_state(T v) {
#if DTYPE == 0
    return v;
#else
    return __uint_as_float((unsigned)v << 16);
#endif
}
__device__ __forceinline__ T to_state(float v) {
#if DTYPE == 0
    return v;
#else
    return to_bfloat16(v);
#endif
}
__device__ __forceinline__ T from_float(float v) {
#if DTYPE == 2
    return to_float16(v);
#else
    return to_state(v);
#endif
}
__device__ __forceinline__ int token_at(const i64 *order, int k, int step, int length) {
    step = min(step, length - 1);
#if HAS_ORDER
    return (int)order[(i64)k * length + step];
#else
    return step;
#endif
}
// the row of a step in memory; lane i of 16 (and i + 16) has the token of the i-th step of the step's chunk
template <bool BY_TOKEN = TOKENS> __device__ __forceinline__ int row_of(int step, int token) {
    return BY_TOKEN ? __shfl_sync(0xffffffffu, token, step & (CHUNK - 1)) : step;
}
// numbers of a channel, which A has for its states, read as many at once as can be
template <int COUNT> struct alignas(COUNT * sizeof(TypeOfA) < 16 ? COUNT * sizeof(TypeOfA) : 16) States {
    TypeOfA at[COUNT];
};
// the rates, times `scale`, of a channel's states from the first one asked for; `A` is the direction's
template <int COUNT>
__device__ __forceinline__ void load_rates(const TypeOfA *A, int channel, int first, float scale, float *rates) {
    const States<COUNT> own = *(const States<COUNT> *)(A + channel * S + first);
#pragma unroll
    for (int s = 0; s < COUNT; ++s) {
        const float value = to_float(own.at[s]);
        rates[s] = (LOG_RATES ? -exp2_fast(value * LOG2E) : value) * scale;
    }
}
// log(1 + exp(x)), and y = exp(-|x|), or both to base 2. log1p(y) = y p(y): as in ops/triton/scan.py, or for inputs of 16
// bits to 8e-6, to 6e-5 of a single state, which softplus bounds; a quotient would cost a special function more
template <bool BASE_2 = false>
__device__ __forceinline__ float softplus(float x, float &y) {
#if DTYPE == 0
    constexpr float terms[] = {-0.0032439809f, 0.0198512636f, -0.0569591597f, 0.1060362174f, -0.1530556977f,
                               0.1967593133f,  -0.2495413273f, 0.3332996368f, -0.4999990165f, 1.0f};
#elif S == 1
    constexpr float terms[] = {0.0413473051f, -0.1574272356f, 0.3063009685f, -0.4969778215f, 0.9999432796f};
#else
    constexpr float terms[] = {-0.0238681300f, 0.1012197700f, -0.2100465400f, 0.3252059400f, -0.4993612800f, 0.9999916000f};
#endif
    y = exp2_fast(BASE_2 ? -fabsf(x) : -fabsf(x) * LOG2E);
    float p = BASE_2 ? terms[0] * LOG2E : terms[0];
#pragma unroll
    for (int i = 1; i < (int)(sizeof(terms) / sizeof(float)); ++i) p = fmaf(p, y, BASE_2 ? terms[i] * LOG2E : terms[i]);
    return fmaf(y, p, fmaxf(x, 0.0f));
}
// the first chunk of a part
__device__ __forceinline__ int first_chunk(int part, int chunks) { return part * chunks / PARTS; }

#if CLUSTER > 1
#define CLUSTERED __cluster_dims__(CLUSTER, 1, 1)
#else
#define CLUSTERED
#endif
#if PARTS > 1
// What a part of a sequence leaves: its states, if it began with zero, and the sum of its step sizes.
template <int WIDE> struct End {
    float state[S][WIDE];
    float size[WIDE];
};
// waits for all warps of all parts, and shows them what was written into shared memory
__device__ __forceinline__ void meet() {
#if CLUSTER > 1
    meet_in_cluster();
#else
    __syncthreads();
#endif
}
// the same place in the shared memory of another block of the cluster
template <class X> __device__ __forceinline__ X *in_block(X *place, int block) {
#if CLUSTER > 1
    return in_block_of_cluster(place, block);
#else
    return place;
#endif
}
// Gives the parts, in the places of their last states, the states before them. A thread has a state of a channel at a
// time, through all parts. `end_of` finds a part's end, `A` is the direction's, `scale` what makes it a rate to base 2.
template <int THREADS, int WIDE, class EndOf>
__device__ __forceinline__ void combine(EndOf end_of, const TypeOfA *A, int first_channel, float scale) {
    meet();
#pragma unroll 1
    for (int i = blockIdx.x % CLUSTER * THREADS + threadIdx.x; i < S * WIDE; i += CLUSTER * THREADS) {
        const int s = i / WIDE, channel = i % WIDE;
        float rate;
        load_rates<1>(A, min(first_channel + channel, CHANNELS - 1), s, scale, &rate);
        float after[PARTS], size[PARTS];
#pragma unroll
        for (int part = 1; part < PARTS; ++part) {
            const End<WIDE> *end = end_of(part - 1);
            after[part] = end->state[s][channel];
            size[part] = end->size[channel];
        }
        float h = 0.f;
        end_of(0)->state[s][channel] = h;
#pragma unroll
        for (int part = 1; part < PARTS; ++part) {
            h = fmaf(exp2_fast(size[part] * rate), h, after[part]);
            end_of(part)->state[s][channel] = h;
        }
    }
    meet();
}
#endif
