// The forward scan as CUDA C++, compiled at run time by NVRTC; arm_zoo/scan/cuda.py has the host's side.
//
// One warp is one program: one sequence (direction k, picture b) and 64 channels, two a lane, with the rates and states
// of all S states in registers. B and C of a chunk of steps stand in shared memory as float32, where every lane reads
// the same four at a time; u and delta are loaded a group of steps ahead. The exponentials of the decays bound it: one
// special function a state and step, so softplus, which would need two more, takes one and a polynomial.
//
// Macros: those of common.cuh, and SAVE 1 to store the states before every chunk for the backward scan.

#define GROUP 4  // steps whose inputs are in flight

extern "C" __global__ void __launch_bounds__(32, 16) scan_forward(
    const T *__restrict__ u, const T *__restrict__ delta, const float *__restrict__ A, const T *__restrict__ B,
    const T *__restrict__ C, const float *__restrict__ D, const float *__restrict__ bias, T *__restrict__ y,
    T *__restrict__ states, int directions, int batch, int length, i64 u_k, i64 u_b, i64 delta_k, i64 delta_b,
    i64 B_k, i64 B_b, int B_t, i64 C_k, i64 C_b, int C_t) {
    __shared__ float BC[CHUNK][2 * S];
    const int lane = threadIdx.x;
    constexpr int BLOCKS = (CHANNELS + 63) / 64;
    const int block = blockIdx.x % BLOCKS, rest = blockIdx.x / BLOCKS;
    const int k = rest % directions, b = rest / directions;  // the directions of a picture follow each other
    const i64 sequence = (i64)k * batch + b;
    const int d = block * 64 + 2 * lane;
    const bool ok0 = d < CHANNELS, ok1 = d + 1 < CHANNELS;
#if VEC
    const int d0 = ok0 ? d : 0, d1 = d0 + 1;
#else
    const int d0 = ok0 ? d : 0, d1 = ok1 ? d + 1 : 0;
#endif
    u += k * u_k + b * u_b;
    delta += k * delta_k + b * delta_b;
    const T *row_BC = lane < S ? B + k * B_k + b * B_b + lane : C + k * C_k + b * C_b + (lane - S);
    const int time_BC = lane < S ? B_t : C_t;
    y += sequence * length * CHANNELS;
    states += sequence * ((length + CHUNK - 1) / CHUNK) * S * CHANNELS;

    float2 rate[S], h[S];
#pragma unroll
    for (int s = 0; s < S; ++s) {
        rate[s] = load_float2(A + ((i64)k * S + s) * CHANNELS, d0, d1);
        rate[s].x *= LOG2E;
        rate[s].y *= LOG2E;
        h[s] = make_float2(0.f, 0.f);
    }
    const float2 skip = load_float2(D + (i64)k * CHANNELS, d0, d1);
    float2 offset = make_float2(0.f, 0.f);
#if HAS_BIAS
    offset = load_float2(bias + (i64)k * CHANNELS, d0, d1);
#endif
    Pair next_u[GROUP], next_delta[GROUP];
#pragma unroll
    for (int j = 0; j < GROUP; ++j) {
        next_u[j] = load_pair(u + min(j, length - 1) * CHANNELS, d0, d1);
        next_delta[j] = load_pair(delta + min(j, length - 1) * CHANNELS, d0, d1);
    }
#pragma unroll 1
    for (int start = 0; start < length; start += CHUNK) {
#if SAVE
#pragma unroll
        for (int s = 0; s < S; ++s) store_pair(states + s * CHANNELS, d, ok0, ok1, pack_states(h[s].x, h[s].y));
        states += (i64)S * CHANNELS;
#endif
        __syncwarp();
        if (lane < 2 * S) {
#pragma unroll
            for (int j = 0; j < CHUNK; ++j) BC[j][lane] = to_float(row_BC[min(start + j, length - 1) * time_BC]);
        }
        __syncwarp();
#pragma unroll 1
        for (int first = start; first < min(start + CHUNK, length); first += GROUP) {
            Pair raw_u[GROUP], raw_delta[GROUP];
#pragma unroll
            for (int j = 0; j < GROUP; ++j) {
                raw_u[j] = next_u[j];
                raw_delta[j] = next_delta[j];
            }
#pragma unroll
            for (int j = 0; j < GROUP; ++j) {
                const int t = min(first + GROUP + j, length - 1);
                next_u[j] = load_pair(u + t * CHANNELS, d0, d1);
                next_delta[j] = load_pair(delta + t * CHANNELS, d0, d1);
            }
#pragma unroll
            for (int j = 0; j < GROUP; ++j) {
                if (first + j >= length) break;
                const float2 x = unpack(raw_u[j]);
                float2 size = unpack(raw_delta[j]);
                size.x += offset.x;
                size.y += offset.y;
#if SOFTPLUS
                float unused;
                size.x = softplus(size.x, unused);
                size.y = softplus(size.y, unused);
#endif
                const float2 input = make_float2(size.x * x.x, size.y * x.y);
                float2 sum = make_float2(skip.x * x.x, skip.y * x.y);
                const float *row = BC[first - start + j];
#pragma unroll
                for (int quad = 0; quad < S / 4; ++quad) {
                    const float4 vB = *(const float4 *)&row[4 * quad], vC = *(const float4 *)&row[S + 4 * quad];
                    const float Bs[4] = {vB.x, vB.y, vB.z, vB.w}, Cs[4] = {vC.x, vC.y, vC.z, vC.w};
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const int s = 4 * quad + i;
                        h[s].x = fmaf(exp2_fast(size.x * rate[s].x), h[s].x, input.x * Bs[i]);
                        h[s].y = fmaf(exp2_fast(size.y * rate[s].y), h[s].y, input.y * Bs[i]);
                        sum.x = fmaf(h[s].x, Cs[i], sum.x);
                        sum.y = fmaf(h[s].y, Cs[i], sum.y);
                    }
                }
                store_pair(y + (first + j) * CHANNELS, d, ok0, ok1, pack(sum.x, sum.y));
            }
        }
    }
}
