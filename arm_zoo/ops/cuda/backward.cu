// The backward scan as CUDA C++, compiled at run time by NVRTC; arm_zoo/ops/cuda/launch.py has the host's side.
//
// One block scans one sequence (direction k, image b) for a block of channels, one a thread, with the gradients of the
// states, their rates and the gradients of the rates of all S states in registers. Chunk by chunk from the end, the
// states before every eighth step are recomputed into shared memory; the eight steps of a group are then done one state
// after the other. The sums over channels that the gradients of B and C need are left to the tensor cores: the lanes'
// shares are one operand of a matrix product, zeros and ones that choose the column are the other. What that leaves, sums
// of four lanes, goes through shared memory and the same product once more.
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

// times the slope of softplus where its value is `size`: 1 - exp(-size), or the value itself where it is so small that
// little of that difference would be left by rounding; both are right to 5e-4
__device__ __forceinline__ float times_slope(float v, float size) {
#if !SOFTPLUS
    return v;
#elif DTYPE == 0
    return v * -expm1f(-size);
#else
    return size < 1.0f / 2048 ? v * size : fmaf(v, -exp2_fast(size * -LOG2E), v);
#endif
}

#define GROUP 8    // steps that are done together
#define HALVES 2   // of a group: four steps are summed over channels at once, and each warp finishes the sums of one half
#define THREADS 64 // channels of a block
#define WARPS (THREADS / 32)
#define QUADS ((S + 3) / 4)  // of the states

// Each of 4 values of every lane, summed over the 4 lanes that share lane / 4, is added to c of that lane of them which
// `column` picks. The two in the middle change places: done twice, this keeps the order.
__device__ __forceinline__ void lane_sum(float4 &c, const float4 a, const float2 column) {
#if DTYPE == 0
    const auto low = [](float x) { return x - __uint_as_float(__float_as_uint(x) & 0xffffe000u); };
    multiply_tf32(c, make_float4(low(a.x), low(a.y), low(a.z), low(a.w)), column);
#endif
    multiply_tf32(c, a, column);
}

// u and the output's gradient at a step
#if DTYPE == 0
typedef float2 Step;
__device__ __forceinline__ Step pack_step(T u, T y) { return make_float2(u, y); }
__device__ __forceinline__ float u_in(Step v) { return v.x; }
__device__ __forceinline__ float y_in(Step v) { return v.y; }
#else
typedef unsigned Step;
__device__ __forceinline__ Step pack_step(T u, T y) { return (unsigned)y << 16 | u; }
__device__ __forceinline__ float u_in(Step v) { return to_float((T)v); }
__device__ __forceinline__ float y_in(Step v) { return to_float((T)(v >> 16)); }
#endif

// a group's numbers, four at a time
__device__ __forceinline__ void load_steps(const float *of_group, float *values) {
#pragma unroll
    for (int j = 0; j < GROUP; j += 4) *(float4 *)(values + j) = *(const float4 *)(of_group + j);
}

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
    float4 sums[WARPS][2 * QUADS][HALVES][32];
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
    const int thread = threadIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    constexpr int BLOCKS = (CHANNELS + THREADS - 1) / THREADS;
    const int part = blockIdx.x % CLUSTER;  // counted from the end of the sequence
    const int block = blockIdx.x / CLUSTER % BLOCKS, rest = blockIdx.x / CLUSTER / BLOCKS;
    const int k = rest % directions, b = rest / directions;  // the directions of an image follow each other
    const i64 sequence = (i64)k * batch + b;
    const bool ok = block * THREADS + thread < CHANNELS;
    const int d = ok ? block * THREADS + thread : 0, since_first = ok ? lane : 0;  // channels, of the warp
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
    constexpr int PIECES = THREADS / (2 * S), EACH = (CHUNK + PIECES - 1) / PIECES;
    // of B and C; of one state half the threads do what another does
    const int row = thread % (2 * S), first = min(thread / (2 * S) * EACH, CHUNK - 1);
    const T *BC = row < S ? B + row : C + row - S;
    const int BC_t = row < S ? B_t : C_t;
    HOLD(BC);
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
    for (int i = 0; i < 4; ++i) {
        pick[i] = make_float2(lane / 4 == 2 * i ? 1.f : 0.f, lane / 4 == 2 * i + 1 ? 1.f : 0.f);
        hold(pick[i].x);
        hold(pick[i].y);
    }
    // where a lane leaves its sums, and where it reads those of lane 4 * (lane % 4) + lane / 4 % 4, without bank conflicts
    const auto swizzled = [](int lane) { return lane ^ (lane >> 2 & 2); };
    const int place = swizzled(lane), read = swizzled(lane % 4 * 4 + lane / 4 % 4);

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
            T raw_BC[EACH], raw_delta[CHUNK], raw_u[CHUNK], raw_y[CHUNK], raw_h[S];
            const int before = TOKENS ? 0 : start;  // rows of other chunks
            const T *chunk_u = u + before * CHANNELS, *chunk_delta = delta + before * CHANNELS;
            const T *chunk_BC = BC + before * BC_t, *chunk_saved = saved + (i64)chunk * S * CHANNELS;
            HOLD(chunk_u);
            HOLD(chunk_delta);
            HOLD(chunk_BC);
            const auto load = [&](bool all) __attribute__((always_inline)) {
#pragma unroll
                for (int j = 0; j < CHUNK; ++j) {
                    const int t = row_of(j, token) * CHANNELS;
                    raw_delta[j] = all || j < steps ? chunk_delta[t] : T(0);
                    raw_u[j] = whole && (all || j < steps) ? chunk_u[t] : T(0);
                }
#pragma unroll
                for (int j = 0; j < EACH; ++j) {
                    const int step = all ? first + j : min(first + j, steps - 1);
                    raw_BC[j] = chunk_BC[row_of(step, token) * BC_t];
                }
            };
            if (TOKENS || steps == CHUNK)
                load(true);  // constant distances from one address
            else
                load(false);
            const int of_token = token * CHANNELS;
#pragma unroll
            for (int j = 0; j < CHUNK; ++j) raw_y[j] = grad[__shfl_sync(0xffffffffu, of_token, j)];
#pragma unroll
            for (int s = 0; s < S; ++s) raw_h[s] = chunk_saved[s * CHANNELS];
            __syncthreads();
#pragma unroll
            for (int j = 0; j < EACH; ++j) sh.BC[row][first + j] = to_float(raw_BC[j]);
#pragma unroll
            for (int j = 0; j < CHUNK; ++j) {
                float size = to_float(raw_delta[j]) + offset, y;
#if SOFTPLUS
                size = softplus(size, y);
#endif
                sh.size[j][thread] = size;
                sh.step[j][thread] = pack_step(raw_u[j], raw_y[j]);
            }
#pragma unroll 1
            for (int j = steps; j < CHUNK; ++j) {  // past the end
                sh.size[j][thread] = 0.f;
                sh.step[j][thread] = pack_step(T(0), T(0));
            }
            if (chunk > from) {  // the next (earlier) chunk into the L2 cache: a lane asks for a step's row of each
                const int t = TOKENS ? next_token : lane % CHUNK - CHUNK;
                prefetch((lane < CHUNK ? chunk_u : chunk_delta) + t * CHANNELS - since_first);
                prefetch(grad + next_token * CHANNELS - since_first);
                prefetch(chunk_BC + t * BC_t);
                prefetch(chunk_saved + (lane % S - S) * CHANNELS - since_first);
            }
            __syncthreads();
            if (!whole) {
#pragma unroll 1
                for (int g = groups - 1; g >= 0; --g) {
                    float size[GROUP], y[GROUP];
#pragma unroll
                    for (int j = 0; j < GROUP; ++j) {
                        total += size[j] = sh.size[g * GROUP + j][thread];
                        y[j] = y_in(sh.step[g * GROUP + j][thread]) * share;
                    }
#pragma unroll
                    for (int s = 0; s < S; ++s) {
                        alignas(16) float Cs[GROUP];
                        load_steps(sh.BC[S + s] + g * GROUP, Cs);
#pragma unroll
                        for (int j = GROUP - 1; j >= 0; --j)
                            carry[s] = fmaf(Cs[j], y[j], carry[s]) * exp2_fast(size[j] * rate[s]);
                    }
                }
                continue;
            }
            // states before every group
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
                        alignas(16) float Bs[GROUP];
                        load_steps(sh.BC[s] + g * GROUP, Bs);
#pragma unroll
                        for (int j = 0; j < GROUP; ++j) h[s] = fmaf(exp2_fast(size[j] * rate[s]), h[s], input[j] * Bs[j]);
                        sh.state[g + 1][s][thread] = h[s];
                    }
                }
            }
#pragma unroll 1
            for (int g = groups - 1; g >= 0; --g) {
                const int t0 = start + g * GROUP;
                T *group_u = grad_u + (TOKENS ? 0 : t0) * CHANNELS, *group_delta = grad_delta + (TOKENS ? 0 : t0) * CHANNELS;
                HOLD(group_u);
                HOLD(group_delta);
                float size[GROUP], input[GROUP], y[GROUP], from_input[GROUP], from_rate[GROUP];
#pragma unroll
                for (int j = 0; j < GROUP; ++j) {
                    const Step step = sh.step[g * GROUP + j][thread];
                    size[j] = sh.size[g * GROUP + j][thread];
                    input[j] = size[j] * u_in(step);
                    y[j] = y_in(step) * share;
                    from_input[j] = from_rate[j] = 0.f;
                }
#pragma unroll
                for (int quad = 0; quad < QUADS; ++quad) {
                    float4 sum_B[HALVES], sum_C[HALVES];
#pragma unroll
                    for (int half = 0; half < HALVES; ++half) sum_B[half] = sum_C[half] = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
                    for (int i = 0; i < QUAD; ++i) {
                        const int s = quad * 4 + i;
                        alignas(16) float Bs[GROUP], Cs[GROUP], part_B[GROUP], part_C[GROUP];
                        float h[GROUP + 1], decay[GROUP];
                        load_steps(sh.BC[s] + g * GROUP, Bs);
                        load_steps(sh.BC[S + s] + g * GROUP, Cs);
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
#pragma unroll
                        for (int half = 0; half < HALVES; ++half) {
                            lane_sum(sum_B[half], *(float4 *)(part_B + 4 * half), pick[i]);
                            lane_sum(sum_C[half], *(float4 *)(part_C + 4 * half), pick[i]);
                        }
                    }
                    if (quad == 0) __syncthreads();  // the sums of the group before have been read
#pragma unroll
                    for (int half = 0; half < HALVES; ++half) {
                        sh.sums[warp][quad][half][place] = sum_B[half];
                        sh.sums[warp][QUADS + quad][half][place] = sum_C[half];
                    }
                }
#pragma unroll
                for (int j = 0; j < GROUP; ++j) {
                    const int row = (TOKENS ? row_of(t0 + j, token) : j) * CHANNELS;
                    const float x = u_in(sh.step[g * GROUP + j][thread]);
                    const float to_delta = times_slope(fmaf(from_input[j], x, from_rate[j] * LN2), size[j]);
                    const T result_u = from_float(fmaf(from_input[j], size[j], y[j] * skip)), result = from_float(to_delta);
                    grad_skip = fmaf(y[j], x, grad_skip);
                    grad_offset += to_delta;  // zero for steps past the end, as y and the size are
                    if (ok && j < steps - g * GROUP) {
                        group_u[row] = result_u;
                        group_delta[row] = result;
                    }
                }
                __syncthreads();
                // a warp finishes half of the steps: lane / 4 is then a state of two quads, lane % 4 which two of B and C
                float4 sum_of[WARPS] = {};
#pragma unroll
                for (int pair = 0; pair < QUADS; ++pair) {
#pragma unroll
                    for (int of_warp = 0; of_warp < WARPS; ++of_warp) {
                        const float4 *left = sh.sums[of_warp][2 * pair + lane / 16][warp];
                        lane_sum(sum_of[of_warp], left[read], pick[pair]);
                        lane_sum(sum_of[of_warp], left[16 + read], pick[pair]);
                    }
                }
                const float values[4] = {sum_of[0].x + sum_of[1].x, sum_of[0].y + sum_of[1].y,
                                         sum_of[0].z + sum_of[1].z, sum_of[0].w + sum_of[1].w};
                T *out = grad_BC + (2 * (lane % 4) + lane / 16) * QUAD + lane / 4 % 4;
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const int step = 4 * warp + j, t = row_of(t0 + step, token);
                    if (step < steps - g * GROUP && lane % 4 < QUADS && lane / 4 % 4 < QUAD)
                        out[t * 2 * S] = to_state(values[j]);
                }
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
