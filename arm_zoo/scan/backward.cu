// The backward scan as CUDA C++, compiled at run time by NVRTC; arm_zoo/scan/cuda.py has the host's side.
//
// One warp is one program: one sequence (direction k, picture b) and 64 channels, two a lane, with the gradients of
// the states, their rates and the gradients of the rates of all S states in registers. Chunk by chunk from the end,
// the states before every fourth step are recomputed into shared memory; the four steps of a group are then done one
// state after the other. The sums over channels that the gradients of B and C need are left to the tensor cores: the
// lanes' shares are one operand of a matrix product, zeros and ones that choose the column are the other.
//
// Macros: DTYPE 0 float32, 1 bfloat16, 2 float16; S states (4, 8 or 16); CHUNK steps between saved states (16); VEC 1
// where pairs of channels are aligned (even number of channels and even strides); HAS_BIAS, HAS_ORDER, SOFTPLUS.

#define LOG2E 1.4426950408889634f
#define LN2 0.6931471805599453f
typedef long long i64;

#if DTYPE == 0
typedef float T;
typedef float2 Pair;
#else
typedef unsigned short T;
typedef unsigned Pair;
#endif

__device__ __forceinline__ float to_float(T v) {
#if DTYPE == 0
    return v;
#elif DTYPE == 1
    return __uint_as_float((unsigned)v << 16);
#else
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v));
    return f;
#endif
}
__device__ __forceinline__ float2 unpack(Pair p) {
#if DTYPE == 0
    return p;
#elif DTYPE == 1
    return make_float2(__uint_as_float(p << 16), __uint_as_float(p & 0xffff0000u));
#else
    return make_float2(to_float((T)(p & 0xffffu)), to_float((T)(p >> 16)));
#endif
}
__device__ __forceinline__ Pair pack(float x, float y) {
#if DTYPE == 0
    return make_float2(x, y);
#elif DTYPE == 1
    unsigned r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(y), "f"(x));
    return r;
#else
    unsigned r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(y), "f"(x));
    return r;
#endif
}
// two adjacent channels d0, d1 (both clamped to existing ones) of a row
__device__ __forceinline__ Pair load_pair(const T *row, int d0, int d1) {
#if VEC
    return *(const Pair *)(row + d0);
#elif DTYPE == 0
    return make_float2(row[d0], row[d1]);
#else
    return (unsigned)row[d0] | ((unsigned)row[d1] << 16);
#endif
}
__device__ __forceinline__ void store_pair(T *row, int d, bool ok0, bool ok1, float x, float y) {
    Pair p = pack(x, y);
#if VEC
    if (ok0) *(Pair *)(row + d) = p;
#elif DTYPE == 0
    if (ok0) row[d] = p.x;
    if (ok1) row[d + 1] = p.y;
#else
    if (ok0) row[d] = (T)(p & 0xffffu);
    if (ok1) row[d + 1] = (T)(p >> 16);
#endif
}
__device__ __forceinline__ float2 load_float2(const float *row, int d0, int d1) {
#if VEC
    return *(const float2 *)(row + d0);
#else
    return make_float2(row[d0], row[d1]);
#endif
}
__device__ __forceinline__ void store_float2(float *row, int d, bool ok0, bool ok1, float2 v) {
#if VEC
    if (ok0) *(float2 *)(row + d) = v;
#else
    if (ok0) row[d] = v.x;
    if (ok1) row[d + 1] = v.y;
#endif
}
__device__ __forceinline__ float exp2_fast(float x) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}
__device__ __forceinline__ float reciprocal(float x) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}
__device__ __forceinline__ float softplus(float x, float &y) {  // log1p(y) = 2 atanh(y / (2 + y)), y = exp(-|x|)
    y = exp2_fast(-fabsf(x) * LOG2E);
    float z = y * reciprocal(2.0f + y), w = z * z;
    float p = 2.0f / 13.0f;
    p = fmaf(p, w, 2.0f / 11.0f);
    p = fmaf(p, w, 2.0f / 9.0f);
    p = fmaf(p, w, 2.0f / 7.0f);
    p = fmaf(p, w, 2.0f / 5.0f);
    p = fmaf(p, w, 2.0f / 3.0f);
    p = fmaf(p, w, 2.0f);
    return fmaf(z, p, fmaxf(x, 0.0f));
}
__device__ __forceinline__ float slope_of(float x, float y) {  // sigmoid(x)
    return (x >= 0.0f ? 1.0f : y) * reciprocal(1.0f + y);
}
__device__ __forceinline__ void prefetch(const void *p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }
__device__ __forceinline__ void copy_async(void *shared, const float *row, int d0, int d1) {  // two floats
    unsigned to = (unsigned)__cvta_generic_to_shared(shared);
#if VEC
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(to), "l"(row + d0) : "memory");
#else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(row + d0) : "memory");
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to + 4), "l"(row + d1) : "memory");
#endif
}

#define GROUP 4   // steps that are done together
#define TILE 36   // float4 between rows of the sums, so that neither side of the exchange has bank conflicts

__device__ __forceinline__ void mma(float4 &c, const float *a, const float2 b) {
    // a[] are 4 values of every lane; each is summed over the 4 lanes that share lane / 4, into c of lane % 4 = column
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c.x), "+f"(c.y), "+f"(c.z), "+f"(c.w)
        : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[3])),
          "r"(__float_as_uint(b.x)), "r"(__float_as_uint(b.y)));
}
__device__ __forceinline__ void lane_sum(float4 &c, const float *a, const float2 b) {
#if DTYPE == 0
    float high[4], low[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        high[j] = __uint_as_float(__float_as_uint(a[j]) & 0xffffe000u);
        low[j] = a[j] - high[j];
    }
    mma(c, low, b);
    mma(c, high, b);
#else
    mma(c, a, b);
#endif
}

struct Shared {
    float2 state[3][S][32];
    float2 size[CHUNK][32];
    float2 slope[CHUNK][32];
    float BC[2 * S][CHUNK + 4];
    float4 tile[S / 2 * TILE];
};

extern "C" __global__ void __launch_bounds__(32, 8) scan_backward(
    const T *__restrict__ u, const T *__restrict__ delta, const float *__restrict__ A, const T *__restrict__ B,
    const T *__restrict__ C, const float *__restrict__ D, const float *__restrict__ bias, const T *__restrict__ grad,
    const i64 *__restrict__ order, const float *__restrict__ saved, T *__restrict__ grad_u, T *__restrict__ grad_delta,
    float *__restrict__ grad_BC, float *__restrict__ grad_A, float *__restrict__ grad_D, float *__restrict__ grad_bias,
    int directions, int batch, int length, int channels, int blocks, i64 u_k, i64 u_b, i64 u_t, i64 delta_k, i64 delta_b,
    i64 delta_t, i64 B_k, i64 B_b, i64 B_t, i64 C_k, i64 C_b, i64 C_t) {
    __shared__ Shared sh;
    const int lane = threadIdx.x;
    const int block = blockIdx.x % blocks, rest = blockIdx.x / blocks;
    const int k = rest % directions, b = rest / directions;  // the directions of a picture follow each other
    const i64 sequence = (i64)k * batch + b;
    const int d = block * 64 + 2 * lane;
    const bool ok0 = d < channels, ok1 = d + 1 < channels;
#if VEC
    const int d0 = ok0 ? d : 0, d1 = d0 + 1;
#else
    const int d0 = ok0 ? d : 0, d1 = ok1 ? d + 1 : 0;
#endif
    const int chunks = (length + CHUNK - 1) / CHUNK;
    u += k * u_k + b * u_b;
    delta += k * delta_k + b * delta_b;
    const T *row_BC = lane < S ? B + k * B_k + b * B_b + lane : C + k * C_k + b * C_b + (lane - S);
    const i64 time_BC = lane < S ? B_t : C_t;
    grad += (i64)b * length * channels;
    grad_u += sequence * length * channels;
    grad_delta += sequence * length * channels;
    saved += sequence * chunks * S * channels;
    grad_BC += ((i64)block * directions * batch + sequence) * length * (2 * S) + lane;

    float2 rate[S], carry[S], grad_rate[S];
#pragma unroll
    for (int s = 0; s < S; ++s) {
        rate[s] = load_float2(A + ((i64)k * S + s) * channels, d0, d1);
        rate[s].x *= LOG2E;
        rate[s].y *= LOG2E;
        carry[s] = make_float2(0.f, 0.f);
        grad_rate[s] = make_float2(0.f, 0.f);
    }
    const float2 skip = load_float2(D + (i64)k * channels, d0, d1);
    float2 offset = make_float2(0.f, 0.f);
#if HAS_BIAS
    offset = load_float2(bias + (i64)k * channels, d0, d1);
#endif
    float2 grad_skip = make_float2(0.f, 0.f), grad_offset = make_float2(0.f, 0.f);
    float2 pick[4];  // B operands that sum the values of a lane over lane % 4 into columns 2i and 2i + 1
#pragma unroll
    for (int i = 0; i < 4; ++i)
        pick[i] = make_float2(lane / 4 == 2 * i ? 1.f : 0.f, lane / 4 == 2 * i + 1 ? 1.f : 0.f);

#pragma unroll 1
    for (int chunk = chunks - 1; chunk >= 0; --chunk) {
        const int start = chunk * CHUNK, steps = min(length - start, CHUNK), groups = (steps + GROUP - 1) / GROUP;
        int token = min(start + (lane & (CHUNK - 1)), length - 1);
#if HAS_ORDER
        token = (int)order[(i64)k * length + token];
#endif
        __syncwarp();
        if (lane < 2 * S) {
#pragma unroll
            for (int q = 0; q < CHUNK / 4; ++q) {
                float v[4];
#pragma unroll
                for (int j = 0; j < 4; ++j) v[j] = to_float(row_BC[min(start + 4 * q + j, length - 1) * time_BC]);
                *(float4 *)&sh.BC[lane][4 * q] = make_float4(v[0], v[1], v[2], v[3]);
            }
        }
        // step sizes and the slopes of softplus
#pragma unroll 1
        for (int q = 0; q < steps; q += 4) {
            Pair raw[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) raw[j] = load_pair(delta + min(start + q + j, length - 1) * delta_t, d0, d1);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                float2 x = unpack(raw[j]), size, slope;
                x.x += offset.x;
                x.y += offset.y;
#if SOFTPLUS
                float y;
                size.x = softplus(x.x, y);
                slope.x = slope_of(x.x, y);
                size.y = softplus(x.y, y);
                slope.y = slope_of(x.y, y);
#else
                size = x;
                slope = make_float2(1.f, 1.f);
#endif
                if (q + j >= steps) size = make_float2(0.f, 0.f);
                sh.size[q + j][lane] = size;
                sh.slope[q + j][lane] = slope;
            }
        }
        if (chunk > 0) {  // the next (earlier) chunk into the L2 cache
            const int t = start - CHUNK + (lane & (CHUNK - 1));
            const int first = block * 64;
            prefetch(lane < CHUNK ? u + t * u_t + first : delta + t * delta_t + first);
            prefetch((lane < CHUNK ? B + k * B_k + b * B_b + t * B_t : C + k * C_k + b * C_b + t * C_t));
            if (lane < 2 * S) prefetch(saved + ((i64)(chunk - 1) * S + lane / 2) * channels + min(first + (lane & 1) * 32, channels - 1));
        }
        __syncwarp();
        const float *chunk_states = saved + (i64)chunk * S * channels;
        // states before every fourth step
        if (groups > 1) {
            float2 h[S];
#pragma unroll
            for (int s = 0; s < S; ++s) h[s] = load_float2(chunk_states + (i64)s * channels, d0, d1);
#pragma unroll 1
            for (int g = 0; g < groups - 1; ++g) {
                Pair raw[GROUP];
                float2 size[GROUP], input[GROUP];
#pragma unroll
                for (int j = 0; j < GROUP; ++j) raw[j] = load_pair(u + (start + g * GROUP + j) * u_t, d0, d1);
#pragma unroll
                for (int j = 0; j < GROUP; ++j) {
                    size[j] = sh.size[g * GROUP + j][lane];
                    const float2 x = unpack(raw[j]);
                    input[j] = make_float2(size[j].x * x.x, size[j].y * x.y);
                }
#pragma unroll
                for (int s = 0; s < S; ++s) {
                    const float4 v = *(const float4 *)&sh.BC[s][g * GROUP];
                    const float Bs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
                    for (int j = 0; j < GROUP; ++j) {
                        h[s].x = fmaf(exp2_fast(size[j].x * rate[s].x), h[s].x, input[j].x * Bs[j]);
                        h[s].y = fmaf(exp2_fast(size[j].y * rate[s].y), h[s].y, input[j].y * Bs[j]);
                    }
                    sh.state[g][s][lane] = h[s];
                }
            }
        }
        if (groups < 4) {
#pragma unroll
            for (int s = 0; s < S; ++s) copy_async(&sh.state[2][s][lane], chunk_states + (i64)s * channels, d0, d1);
        }
#pragma unroll 1
        for (int g = groups - 1; g >= 0; --g) {
            const int t0 = start + g * GROUP;
            float2 size[GROUP], input[GROUP], y[GROUP], from_input[GROUP], from_rate[GROUP];
            Pair raw_u[GROUP], raw_y[GROUP];
#pragma unroll
            for (int j = 0; j < GROUP; ++j) {
                const int at = __shfl_sync(0xffffffffu, token, g * GROUP + j);
                raw_u[j] = load_pair(u + min(t0 + j, length - 1) * u_t, d0, d1);
                raw_y[j] = load_pair(grad + (i64)at * channels, d0, d1);
            }
#pragma unroll
            for (int j = 0; j < GROUP; ++j) {
                const bool exists = g * GROUP + j < steps;
                size[j] = sh.size[g * GROUP + j][lane];
                const float2 x = unpack(raw_u[j]);
                input[j] = make_float2(size[j].x * x.x, size[j].y * x.y);
                y[j] = unpack(raw_y[j]);
                if (!(exists && ok0)) y[j].x = 0.f;
                if (!(exists && ok1)) y[j].y = 0.f;
                from_input[j] = from_rate[j] = make_float2(0.f, 0.f);
            }
            if (g == 0) asm volatile("cp.async.wait_all;" ::: "memory");
            const float2(*before)[32] = sh.state[g == 0 ? 2 : g - 1];
#pragma unroll
            for (int quad = 0; quad < S / 4; ++quad) {
                float4 sum_B = make_float4(0.f, 0.f, 0.f, 0.f), sum_C = sum_B;
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int s = quad * 4 + i;
                    const float4 vB = *(const float4 *)&sh.BC[s][g * GROUP];
                    const float4 vC = *(const float4 *)&sh.BC[S + s][g * GROUP];
                    const float Bs[4] = {vB.x, vB.y, vB.z, vB.w}, Cs[4] = {vC.x, vC.y, vC.z, vC.w};
                    float2 h[GROUP + 1], decay[GROUP];
                    float part_B[4], part_C[4];
                    h[0] = before[s][lane];
#pragma unroll
                    for (int j = 0; j < GROUP; ++j) {
                        decay[j].x = exp2_fast(size[j].x * rate[s].x);
                        decay[j].y = exp2_fast(size[j].y * rate[s].y);
                        h[j + 1].x = fmaf(decay[j].x, h[j].x, input[j].x * Bs[j]);
                        h[j + 1].y = fmaf(decay[j].y, h[j].y, input[j].y * Bs[j]);
                        part_C[j] = fmaf(h[j + 1].x, y[j].x, h[j + 1].y * y[j].y);
                    }
                    float2 c = carry[s];
#pragma unroll
                    for (int j = GROUP - 1; j >= 0; --j) {
                        c.x = fmaf(Cs[j], y[j].x, c.x);
                        c.y = fmaf(Cs[j], y[j].y, c.y);
                        part_B[j] = fmaf(c.x, input[j].x, c.y * input[j].y);
                        from_input[j].x = fmaf(c.x, Bs[j], from_input[j].x);
                        from_input[j].y = fmaf(c.y, Bs[j], from_input[j].y);
                        c.x *= decay[j].x;
                        c.y *= decay[j].y;
                        const float2 e = make_float2(c.x * h[j].x, c.y * h[j].y);
                        from_rate[j].x = fmaf(e.x, rate[s].x, from_rate[j].x);
                        from_rate[j].y = fmaf(e.y, rate[s].y, from_rate[j].y);
                        grad_rate[s].x = fmaf(e.x, size[j].x, grad_rate[s].x);
                        grad_rate[s].y = fmaf(e.y, size[j].y, grad_rate[s].y);
                    }
                    carry[s] = c;
                    lane_sum(sum_B, part_B, pick[i]);
                    lane_sum(sum_C, part_C, pick[i]);
                }
                sh.tile[quad * TILE + lane] = sum_B;
                sh.tile[(S / 4 + quad) * TILE + lane] = sum_C;
            }
#pragma unroll
            for (int j = 0; j < GROUP; ++j) {
                const bool exists = g * GROUP + j < steps;
                const float2 x = unpack(raw_u[j]), slope = sh.slope[g * GROUP + j][lane];
                float2 to_u, to_delta;
                to_u.x = fmaf(from_input[j].x, size[j].x, y[j].x * skip.x);
                to_u.y = fmaf(from_input[j].y, size[j].y, y[j].y * skip.y);
                to_delta.x = fmaf(from_input[j].x, x.x, from_rate[j].x * LN2) * slope.x;
                to_delta.y = fmaf(from_input[j].y, x.y, from_rate[j].y * LN2) * slope.y;
                grad_skip.x = fmaf(y[j].x, x.x, grad_skip.x);
                grad_skip.y = fmaf(y[j].y, x.y, grad_skip.y);
                grad_offset.x += to_delta.x;
                grad_offset.y += to_delta.y;
                if (exists) {
                    store_pair(grad_u + (i64)(t0 + j) * channels, d, ok0, ok1, to_u.x, to_u.y);
                    store_pair(grad_delta + (i64)(t0 + j) * channels, d, ok0, ok1, to_delta.x, to_delta.y);
                }
            }
            __syncwarp();
            if (lane < 2 * S) {
                const float4 *tile = sh.tile + (lane >> 2) * TILE + (lane & 3);
                float4 sum = tile[0];
#pragma unroll
                for (int i = 1; i < 8; ++i) {
                    const float4 v = tile[4 * i];
                    sum.x += v.x;
                    sum.y += v.y;
                    sum.z += v.z;
                    sum.w += v.w;
                }
                float *out = grad_BC + (i64)t0 * (2 * S);
                const int left = steps - g * GROUP;
                out[0] = sum.x;
                if (left > 1) out[2 * S] = sum.y;
                if (left > 2) out[4 * S] = sum.z;
                if (left > 3) out[6 * S] = sum.w;
            }
            __syncwarp();
            if (g == 3) {
#pragma unroll
                for (int s = 0; s < S; ++s) copy_async(&sh.state[2][s][lane], chunk_states + (i64)s * channels, d0, d1);
            }
        }
    }
#pragma unroll
    for (int s = 0; s < S; ++s) store_float2(grad_A + (sequence * S + s) * channels, d, ok0, ok1, grad_rate[s]);
    store_float2(grad_D + sequence * channels, d, ok0, ok1, grad_skip);
    store_float2(grad_bias + sequence * channels, d, ok0, ok1, grad_offset);
}
