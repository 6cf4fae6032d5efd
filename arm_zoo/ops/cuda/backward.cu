// The backward scan as CUDA C++, compiled at run time by NVRTC; arm_zoo/ops/cuda/launch.py has the host's side.
//
// One block scans one sequence (direction k, image b) for a block of channels, one a thread, with the gradients of the
// states, their rates and the gradients of the rates of all S states in registers. Chunk by chunk from the end, the
// states before every fourth step are recomputed into shared memory; the four steps of a group are then done one state
// after the other. The sums over channels that the gradients of B and C need are left to the tensor cores: the lanes'
// shares are one operand of a matrix product, zeros and ones that choose the column are the other.
//
// One channel a thread instead of two halves its registers: 12 warps instead of 8 (10 for float32) fit a multiprocessor and hide
// each other's waiting, 24 if there is a single state. Two warps share a block, so that B and C, and the sums over channels,
// are handled once for both.
//
// Few sequences leave most of the GPU idle. PARTS blocks of a cluster then share a sequence, each with its part of the
// chunks, the last ones first: all but the last part first find what they alone send back, a fourth of the work, which
// decays by exp(A times the sum of a part's step sizes) from one part to the next.
//
// Step sizes are whole here: delta_t, which the forward kernel needs for those of low rank, is always CHANNELS.
//
// Macros: those of common.cuh, and MEAN 1 where the output is the directions' mean, else their sum.

__device__ __forceinline__ float reciprocal(float x) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}
__device__ __forceinline__ float slope_of(float x, float y) {  // sigmoid(x)
    return (x >= 0.0f ? 1.0f : y) * reciprocal(1.0f + y);
}
__device__ __forceinline__ void prefetch(const void *p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

#define GROUP 4    // steps that are done together
#define THREADS 64 // channels of a block
#define WARPS (THREADS / 32)
// float4 between rows of the sums over channels, and between the warps' sums: neither side of the exchange then has
// bank conflicts
#define ROW 36
#define QUADS ((S + 3) / 4)  // of the states
#define SUMS ((2 * QUADS - 1) * ROW + 32 + (S < 8 ? 4 : 0))

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

// the slope of softplus at a step, and u
#if DTYPE == 0
typedef float2 Step;
__device__ __forceinline__ Step pack_step(float slope, T u) { return make_float2(slope, u); }
__device__ __forceinline__ float slope_in(Step v) { return v.x; }
__device__ __forceinline__ float u_in(Step v) { return v.y; }
#else
typedef unsigned Step;
__device__ __forceinline__ Step pack_step(float slope, T u) { return (unsigned)to_state(slope) << 16 | u; }
__device__ __forceinline__ float slope_in(Step v) { return __uint_as_float(v & 0xffff0000u); }
__device__ __forceinline__ float u_in(Step v) { return to_float((T)v); }
#endif

struct Shared {
    union {
        float state[CHUNK / GROUP][S][THREADS];  // before every group
#if PARTS > 1
        End<THREADS> end;
#endif
    };
    float size[CHUNK][THREADS];
    Step step[CHUNK][THREADS];
    float BC[2 * S][CHUNK + 4];
    float4 sums[WARPS][SUMS];
};

extern "C" __global__ void CLUSTERED __launch_bounds__(THREADS, S == 1 ? 12 : 6) scan_backward(
    const T *__restrict__ u, const T *__restrict__ delta, const TypeOfA *__restrict__ A, const T *__restrict__ B,
    const T *__restrict__ C, const TypeOfD *__restrict__ D, const TypeOfBias *__restrict__ bias,
    const T *__restrict__ grad,
    const i64 *__restrict__ order, const T *__restrict__ saved, T *__restrict__ grad_u, T *__restrict__ grad_delta,
    T *__restrict__ grad_BC, float *__restrict__ grad_A, float *__restrict__ grad_D, float *__restrict__ grad_bias,
    int directions, int batch, int length, i64 u_k, i64 u_b, i64 delta_k, i64 delta_b, int delta_t, i64 B_k, i64 B_b,
    int B_t, i64 C_k, i64 C_b, int C_t) {
    __shared__ Shared sh;
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    constexpr int BLOCKS = (CHANNELS + THREADS - 1) / THREADS;
    const int part = blockIdx.x % CLUSTER;  // counted from the end of the sequence
    const int block = blockIdx.x / CLUSTER % BLOCKS, rest = blockIdx.x / CLUSTER / BLOCKS;
    const int k = rest % directions, b = rest / directions;  // the directions of an image follow each other
    const i64 sequence = (i64)k * batch + b;
    const bool ok = block * THREADS + thread < CHANNELS;
    const int d = ok ? block * THREADS + thread : 0;
    const int chunks = (length + CHUNK - 1) / CHUNK;
    const int from = chunks - first_chunk(part + 1, chunks), to = chunks - first_chunk(part, chunks);
    u += k * u_k + b * u_b + d;
    delta += k * delta_k + b * delta_b + d;
    B += k * B_k + b * B_b;
    C += k * C_k + b * C_b;
    grad += (i64)b * length * CHANNELS + d;
    grad_u += sequence * length * CHANNELS + d;
    grad_delta += sequence * length * CHANNELS + d;
    saved += sequence * chunks * S * CHANNELS + d;
    grad_BC += ((i64)block * directions * batch + sequence) * length * (2 * S);

    A += (i64)k * CHANNELS * S;
    float rate[S], carry[S], grad_rate[S], total = 0.f;
    load_rates<S>(A, d, 0, LOG2E, rate);
#pragma unroll
    for (int s = 0; s < S; ++s) carry[s] = grad_rate[s] = 0.f;
    const float skip = to_float(D[(i64)k * CHANNELS + d]);
    float offset = 0.f;
#if HAS_BIAS
    offset = to_float(bias[(i64)k * CHANNELS + d]);
#endif
    HOLD(u);
    HOLD(delta);
    HOLD(grad);
    HOLD(grad_u);
    HOLD(grad_delta);
    HOLD(grad_BC);
    HOLD(saved);
    const float share = ok ? (MEAN ? 1.0f / directions : 1.0f) : 0.f;  // of one direction in the output
    float grad_skip = 0.f, grad_offset = 0.f;
    float2 pick[4];  // B operands that sum the values of a lane over lane % 4 into columns 2i and 2i + 1
#pragma unroll
    for (int i = 0; i < 4; ++i)
        pick[i] = make_float2(lane / 4 == 2 * i ? 1.f : 0.f, lane / 4 == 2 * i + 1 ? 1.f : 0.f);

#if PER_IMAGE
    order += (i64)b * directions * length;
#endif
    // the part's steps; a scan that is not whole finds what the part sends back
    const auto walk = [&](bool whole) __attribute__((always_inline)) {
        int next_token = token_at(order, k, (to - 1) * CHUNK + lane % CHUNK, length);
#pragma unroll 1
        for (int chunk = to - 1; chunk >= from; --chunk) {
            const int start = chunk * CHUNK, steps = min(length - start, CHUNK), groups = (steps + GROUP - 1) / GROUP;
            // everything that the chunk reads is asked for at once: the waits overlap
            const int token = next_token;
            if (chunk > from) next_token = token_at(order, k, start - CHUNK + lane % CHUNK, length);
            constexpr int PIECES = THREADS / (2 * S), EACH = (CHUNK + PIECES - 1) / PIECES;
            const int row = thread % (2 * S), first = thread / (2 * S) * EACH;  // of one state half the threads have none
            T raw_BC[EACH], raw_delta[CHUNK], raw_u[CHUNK], raw_h[S], next_y[GROUP];
#pragma unroll
            for (int j = 0; j < CHUNK; ++j) {
                const int t = row_of(start + j, token);
                raw_delta[j] = j < steps ? delta[t * CHANNELS] : T(0);
                if (whole)
                    raw_u[j] = j < steps ? u[t * CHANNELS] : T(0);
                else  // the output's gradient in its place
                    raw_u[j] = j < steps ? grad[__shfl_sync(0xffffffffu, token, j) * CHANNELS] : T(0);
            }
#pragma unroll
            for (int s = 0; s < S; ++s) raw_h[s] = saved[((i64)chunk * S + s) * CHANNELS];
#pragma unroll
            for (int j = 0; j < EACH; ++j) {
                const int t = row_of(min(start + first + j, length - 1), token);
                raw_BC[j] = row < S ? B[t * B_t + row] : C[t * C_t + row - S];
            }
#pragma unroll
            for (int j = 0; j < GROUP; ++j) {
                const int at = (groups - 1) * GROUP + j, of_step = __shfl_sync(0xffffffffu, token, at);
                next_y[j] = at < steps ? grad[of_step * CHANNELS] : T(0);
            }
            __syncthreads();
#pragma unroll
            for (int j = 0; j < EACH; ++j)
                if (EACH * PIECES == CHUNK || first + j < CHUNK) sh.BC[row][first + j] = to_float(raw_BC[j]);
#pragma unroll
            for (int j = 0; j < CHUNK; ++j) {
                const float x = to_float(raw_delta[j]) + offset;
#if SOFTPLUS
                float y;
                const float size = softplus(x, y), slope = slope_of(x, y);
#else
                const float size = x, slope = 1.f;
#endif
                sh.size[j][thread] = j < steps ? size : 0.f;
                sh.step[j][thread] = pack_step(slope, raw_u[j]);
            }
            if (chunk > from && lane < CHUNK) {  // the next (earlier) chunk into the L2 cache
                const int t = TOKENS ? next_token : start - CHUNK + lane;
                prefetch(u + t * CHANNELS - lane);
                prefetch(delta + t * CHANNELS - lane);
                if (warp == 0) prefetch(B + t * B_t);
                if (warp == 1) prefetch(C + t * C_t);
                if (lane < S) prefetch(saved + ((i64)(chunk - 1) * S + lane) * CHANNELS - lane);
            }
            __syncthreads();
            if (!whole) {
#pragma unroll 1
                for (int g = groups - 1; g >= 0; --g) {
                    float size[GROUP], y[GROUP];
#pragma unroll
                    for (int j = 0; j < GROUP; ++j) {
                        total += size[j] = sh.size[g * GROUP + j][thread];
                        y[j] = u_in(sh.step[g * GROUP + j][thread]) * share;
                    }
#pragma unroll
                    for (int s = 0; s < S; ++s) {
                        const float4 v = *(const float4 *)&sh.BC[S + s][g * GROUP];
                        const float Cs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
                        for (int j = GROUP - 1; j >= 0; --j)
                            carry[s] = fmaf(Cs[j], y[j], carry[s]) * exp2_fast(size[j] * rate[s]);
                    }
                }
                continue;
            }
            // states before every fourth step
            {
                float h[S];
#pragma unroll
                for (int s = 0; s < S; ++s) sh.state[0][s][thread] = h[s] = from_state(raw_h[s]);
#pragma unroll 1
                for (int g = 0; g < groups - 1; ++g) {
                    float size[GROUP], input[GROUP];
#pragma unroll
                    for (int j = 0; j < GROUP; ++j) {
                        size[j] = sh.size[g * GROUP + j][thread];
                        input[j] = size[j] * u_in(sh.step[g * GROUP + j][thread]);
                    }
#pragma unroll
                    for (int s = 0; s < S; ++s) {
                        const float4 v = *(const float4 *)&sh.BC[s][g * GROUP];
                        const float Bs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
                        for (int j = 0; j < GROUP; ++j) h[s] = fmaf(exp2_fast(size[j] * rate[s]), h[s], input[j] * Bs[j]);
                        sh.state[g + 1][s][thread] = h[s];
                    }
                }
            }
#pragma unroll 1
            for (int g = groups - 1; g >= 0; --g) {
                const int t0 = start + g * GROUP;
                float size[GROUP], input[GROUP], y[GROUP], from_input[GROUP], from_rate[GROUP];
                Step step[GROUP];
#pragma unroll
                for (int j = 0; j < GROUP; ++j) {
                    size[j] = sh.size[g * GROUP + j][thread];
                    step[j] = sh.step[g * GROUP + j][thread];
                    input[j] = size[j] * u_in(step[j]);
                    y[j] = to_float(next_y[j]) * share;
                    from_input[j] = from_rate[j] = 0.f;
                }
                const int before_g = max(g - 1, 0) * GROUP;  // the group that comes next
#pragma unroll
                for (int j = 0; j < GROUP; ++j)
                    next_y[j] = grad[__shfl_sync(0xffffffffu, token, before_g + j) * CHANNELS];
#pragma unroll
                for (int quad = 0; quad < QUADS; ++quad) {
                    float4 sum_B = make_float4(0.f, 0.f, 0.f, 0.f), sum_C = sum_B;
#pragma unroll
                    for (int i = 0; i < QUAD; ++i) {
                        const int s = quad * 4 + i;
                        const float4 vB = *(const float4 *)&sh.BC[s][g * GROUP];
                        const float4 vC = *(const float4 *)&sh.BC[S + s][g * GROUP];
                        const float Bs[4] = {vB.x, vB.y, vB.z, vB.w}, Cs[4] = {vC.x, vC.y, vC.z, vC.w};
                        float h[GROUP + 1], decay[GROUP], part_B[4], part_C[4];
                        h[0] = sh.state[g][s][thread];
#pragma unroll
                        for (int j = 0; j < GROUP; ++j) {
                            decay[j] = exp2_fast(size[j] * rate[s]);
                            h[j + 1] = fmaf(decay[j], h[j], input[j] * Bs[j]);
                            part_C[j] = h[j + 1] * y[j];
                        }
                        float c = carry[s];
#pragma unroll
                        for (int j = GROUP - 1; j >= 0; --j) {
                            c = fmaf(Cs[j], y[j], c);
                            part_B[j] = c * input[j];
                            from_input[j] = fmaf(c, Bs[j], from_input[j]);
                            c *= decay[j];
                            const float e = c * h[j];
                            from_rate[j] = fmaf(e, rate[s], from_rate[j]);
                            grad_rate[s] = fmaf(e, size[j], grad_rate[s]);
                        }
                        carry[s] = c;
                        lane_sum(sum_B, part_B, pick[i]);
                        lane_sum(sum_C, part_C, pick[i]);
                    }
                    sh.sums[warp][quad * ROW + lane] = sum_B;
                    sh.sums[warp][(QUADS + quad) * ROW + lane] = sum_C;
                }
                int rows[GROUP];
#pragma unroll
                for (int j = 0; j < GROUP; ++j) {
                    rows[j] = row_of(t0 + j, token);
                    const float to_u = fmaf(from_input[j], size[j], y[j] * skip), x = u_in(step[j]);
                    const float to_delta = fmaf(from_input[j], x, from_rate[j] * LN2) * slope_in(step[j]);
                    grad_skip = fmaf(y[j], x, grad_skip);
                    grad_offset += to_delta;  // zero for steps past the end, as y and the size are
                    if (ok && j < steps - g * GROUP) {
                        grad_u[rows[j] * CHANNELS] = from_float(to_u);
                        grad_delta[rows[j] * CHANNELS] = from_float(to_delta);
                    }
                }
                __syncthreads();
                if (lane < 2 * S) {  // a warp does some of the rows of B and C, a lane the sums that one of the warps left
                    const int row = warp * (2 * S / WARPS) + lane / WARPS, part = lane % WARPS;
                    const float4 *of_warp = sh.sums[part] + (row / S * QUADS + row % S / 4) * ROW + row % S % 4;
                    float4 sum = of_warp[0];
#pragma unroll
                    for (int i = 1; i < 8; ++i) {
                        const float4 v = of_warp[4 * i];
                        sum.x += v.x;
                        sum.y += v.y;
                        sum.z += v.z;
                        sum.w += v.w;
                    }
                    const unsigned lanes = 0xffffffffu >> (32 - 2 * S);
#pragma unroll
                    for (int i = 1; i < WARPS; i *= 2) {
                        sum.x += __shfl_xor_sync(lanes, sum.x, i);
                        sum.y += __shfl_xor_sync(lanes, sum.y, i);
                        sum.z += __shfl_xor_sync(lanes, sum.z, i);
                        sum.w += __shfl_xor_sync(lanes, sum.w, i);
                    }
                    const float values[GROUP] = {sum.x, sum.y, sum.z, sum.w};
                    T *out = grad_BC + row;
#pragma unroll
                    for (int j = 0; j < GROUP; ++j)
                        if (j % WARPS == part && j < steps - g * GROUP) out[rows[j] * 2 * S] = to_state(values[j]);
                }
                __syncthreads();
            }
        }
    };
#if PARTS > 1
    if (part < PARTS - 1) walk(false);
#pragma unroll
    for (int s = 0; s < S; ++s) sh.end.state[s][thread] = carry[s];
    sh.end.size[thread] = total;
    const auto end_of = [&](int part) { return in_block(&sh.end, part); };
    combine<THREADS, THREADS>(end_of, A, block * THREADS, LOG2E);
#pragma unroll
    for (int s = 0; s < S; ++s) carry[s] = sh.end.state[s][thread];
#endif
    walk(true);
    if (ok) {
        const i64 place = sequence * PARTS + part;
#pragma unroll
        for (int s = 0; s < S; ++s) grad_A[(place * S + s) * CHANNELS + d] = grad_rate[s];
        grad_D[place * CHANNELS + d] = grad_skip;
        grad_bias[place * CHANNELS + d] = grad_offset;
    }
}
