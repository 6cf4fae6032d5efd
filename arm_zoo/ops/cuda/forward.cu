// The forward scan as CUDA C++, compiled at run time by NVRTC; arm_zoo/ops/cuda/launch.py has the host's side.
//
// One warp is one program: one sequence (direction k, image b) and 64 channels, a pair a lane, with the rates and states
// of all S states in registers. B and C of a chunk of steps stand in shared memory as float32, where every lane reads
// the same four at a time; u and delta are loaded a group of steps ahead. The exponentials of the decays bound it: one
// special function a state and step, so softplus, which would need two more, takes one and a polynomial.
//
// Step sizes of low rank become whole here, a chunk at a time on the tensor cores: written and read in memory they would
// cost more than the scan's own inputs. Warps, one an image, then share a block and its part of the weight.
//
// Of a single state instructions bound it, not exponentials. B, C and the rows of a step are then one access to shared
// memory, four steps follow each other without a branch, step sizes are in units of ln 2, and where that leaves enough
// warps a lane takes two pairs of channels.
//
// Few sequences leave most of the GPU idle. LANES lanes then share a pair of channels, each with its part of the states
// (step sizes of low rank are made ready once for all of them), and PARTS warps share a sequence, each with its part of
// the chunks: all but the last first scan theirs from states of zero, without outputs. States decay by exp(A times the
// sum of a part's step sizes) from one part to the next, which gives the states before every part; from them all scan
// their parts.
//
// Macros: those of common.cuh; TO_TOKENS 1 where the rows of y are tokens, also if others are steps; LANES, 1 unless
// every lane then still has a quad of states; VEC 1 where pairs of channels are aligned (even number of channels and
// even strides); BC_AT_ONCE, the numbers of B or C, all of one step, that are aligned together (1, 2 or 4, of a single
// state 1); PAIRS of a lane, 2 only of a single state in 16 bits and where both are aligned together; SAVE 1 to
// store the states before every chunk for the backward scan; TEAM, the warps of a block: each has its image, or its
// part of the same one; RANK of the step sizes, 0 if they are whole, and PIECE bytes (4, 8 or 16) that their rows are
// copied in.

#define WIDE (64 * PAIRS / LANES)      // channels of a warp
#define OWN (S / LANES)                // states of a lane
#define READY (RANK && LANES > 1)      // softplus is taken once a chunk, for all lanes that share a pair of channels
#define AHEAD (LANES > 1)              // B and C of the next chunk are in flight too: few warps hide little waiting
// steps whose inputs are in flight, and warps of a multiprocessor: as many as registers allow
#define GROUP (S >= 4 ? 4 : S == 2 && DTYPE == 0 ? 8 : CHUNK)
#define WARPS (S > 1 ? 16 : DTYPE == 0 ? 12 : PAIRS == 2 || RANK == 0 ? 20 : RANK > 32 ? 24 : 32)

#if DTYPE == 0
typedef float2 Pair;
#else
typedef unsigned Pair;
#endif

__device__ __forceinline__ float2 unpack(Pair p) {
#if DTYPE == 0
    return p;
#elif DTYPE == 1
    return make_float2(__uint_as_float(p << 16), __uint_as_float(p & 0xffff0000u));
#else
    return make_float2(to_float((T)(p & 0xffffu)), to_float((T)(p >> 16)));
#endif
}
// numbers that are read or written at once
template <class X, int COUNT> struct alignas(COUNT * sizeof(X)) Several {
    X at[COUNT];
};
#if BC_AT_ONCE == 1
typedef T RawBC;
typedef float ValuesOfBC;
__device__ __forceinline__ ValuesOfBC unpack(RawBC raw) { return to_float(raw); }
#else
typedef Several<Pair, BC_AT_ONCE / 2> RawBC;
typedef Several<float2, BC_AT_ONCE / 2> ValuesOfBC;
__device__ __forceinline__ ValuesOfBC unpack(const RawBC &raw) {
    ValuesOfBC values;
#pragma unroll
    for (int i = 0; i < BC_AT_ONCE / 2; ++i) values.at[i] = unpack(raw.at[i]);
    return values;
}
#endif
__device__ __forceinline__ Pair pack_states(float x, float y) {
#if DTYPE == 0
    return make_float2(x, y);
#else
    return to_bfloat16(x, y);
#endif
}
__device__ __forceinline__ Pair pack(float x, float y) {
#if DTYPE == 2
    return to_float16(x, y);
#else
    return pack_states(x, y);
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
__device__ __forceinline__ void store_pair(T *row, int d, bool ok0, bool ok1, Pair p) {
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
// the pairs of a lane, read and written at once
struct __align__(sizeof(Pair) * PAIRS) Pairs {
    Pair at[PAIRS];
};
__device__ __forceinline__ Pairs load_pairs(const T *row, int d0, int d1) {
#if PAIRS == 1
    return {load_pair(row, d0, d1)};
#else
    return *(const Pairs *)(row + d0);
#endif
}
__device__ __forceinline__ void store_pairs(T *row, int d, bool ok0, bool ok1, const Pairs &p) {
#if PAIRS == 1
    store_pair(row, d, ok0, ok1, p.at[0]);
#else
    if (ok0) *(Pairs *)(row + d) = p;
#endif
}
template <class X> __device__ __forceinline__ float2 load_float2(const X *row, int d0, int d1) {
#if VEC
    const Several<X, 2> both = *(const Several<X, 2> *)(row + d0);
    return make_float2(to_float(both.at[0]), to_float(both.at[1]));
#else
    return make_float2(to_float(row[d0]), to_float(row[d1]));
#endif
}

// the step size that a stored number and the offset say; of a single state it and the offset are in units of ln 2
__device__ __forceinline__ float size_of(float raw, float offset) {
    const float x = S == 1 ? fmaf(raw, LOG2E, offset) : raw + offset;
#if SOFTPLUS
    float unused;
    return softplus<S == 1>(x, unused);
#else
    return x;
#endif
}
__device__ __forceinline__ float2 sizes_of(Pair p, float2 offset) {
    const float2 raw = unpack(p);
    return make_float2(size_of(raw.x, offset.x), size_of(raw.y, offset.y));
}
#if READY
typedef float2 Sizes;  // of a pair of channels, at a step
__device__ __forceinline__ Sizes kept(Pair p, float2 offset) { return sizes_of(p, offset); }
__device__ __forceinline__ float2 made(Sizes sizes, float2) { return sizes; }
#else
typedef Pair Sizes;  // as they are in memory
__device__ __forceinline__ Sizes kept(Pair p, float2) { return p; }
__device__ __forceinline__ float2 made(Sizes sizes, float2 offset) { return sizes_of(sizes, offset); }
#endif

#if RANK
#define WIDTH ((RANK + 15) / 16 * 16 + 8)  // of rows in shared memory: whole tiles, and no bank conflicts
#define SIZES (WIDE / 2 + 4)               // pairs of a row, likewise
// two lanes copy a row
__device__ __forceinline__ void fetch(T (*rows)[WIDTH], const T *row, int lane) {
    const int first = lane % 2 * (RANK / 2);
#if S == 1
    T *to = &rows[lane / 2][first];
    row += first;
    HOLD(row);
#pragma unroll
    for (int i = 0; i < RANK / 2; i += PIECE / 2) copy_async<PIECE>(to + i, row + i);
#else
#pragma unroll
    for (int i = 0; i < RANK / 2; i += PIECE / 2) copy_async<PIECE>(&rows[lane / 2][first + i], row + first + i);
#endif
}
__device__ __forceinline__ void arrived() {
    wait_for_copies();
    __syncwarp();
}
__device__ __forceinline__ unsigned two(const T *p) { return *(const unsigned *)p; }
__device__ __forceinline__ void multiply(float4 &c, const unsigned *a, unsigned b0, unsigned b1) {
#if DTYPE == 1
    multiply_bfloat16(c, a, b0, b1);
#else
    multiply_float16(c, a, b0, b1);
#endif
}
// (CHUNK, RANK) x (RANK, WIDE) -> pairs of channels; the offsets are of the lane's pairs in the product
__device__ __forceinline__ void project(
    Sizes (*sizes)[SIZES], const T (*rows)[WIDTH], const T (*weight)[WIDTH], const float2 *offsets, int lane) {
    const int row = lane / 4, column = lane % 4;
    unsigned a[WIDTH / 16][4];
#pragma unroll
    for (int k = 0; k < WIDTH / 16; ++k) {
        const int at = 16 * k + 2 * column;
        a[k][0] = two(&rows[row][at]);
        a[k][1] = two(&rows[row + 8][at]);
        a[k][2] = two(&rows[row][at + 8]);
        a[k][3] = two(&rows[row + 8][at + 8]);
    }
#pragma unroll
    for (int n = 0; n < WIDE / 8; ++n) {
        float4 c = make_float4(0.f, 0.f, 0.f, 0.f);
        const T *of_channel = weight[8 * n + row] + 2 * column;
#pragma unroll
        for (int k = 0; k < WIDTH / 16; ++k) multiply(c, a[k], two(of_channel + 16 * k), two(of_channel + 16 * k + 8));
        sizes[row][4 * n + column] = kept(pack(c.x, c.y), offsets[n]);
        sizes[row + 8][4 * n + column] = kept(pack(c.z, c.w), offsets[n]);
    }
}
#endif

#if S == 1
struct __align__(16) Step {
    float BC[2];  // B times ln 2, and C
    int row[2];   // where the step's row of u and y begins, and that of the step a chunk later
};
#endif

struct Chunk {
#if S == 1
    Step steps[CHUNK];
#else
    __align__(16) float BC[CHUNK][2 * S];
#endif
#if RANK
    __align__(16) T rows[2][CHUNK][WIDTH];  // step sizes of this chunk and the next
    Sizes sizes[CHUNK][SIZES];
#endif
};
union OfWarp {
    Chunk chunk;
#if PARTS > 1
    End<WIDE> end;
#endif
};
struct Shared {
    OfWarp of_warp[TEAM];
#if RANK
    __align__(16) T weight[WIDE][WIDTH];
#endif
};

extern "C" __global__ void CLUSTERED __launch_bounds__(32 * TEAM, WARPS / TEAM) scan_forward(
    const T *__restrict__ u, const T *__restrict__ delta, const TypeOfA *__restrict__ A, const T *__restrict__ B,
    const T *__restrict__ C, const TypeOfD *__restrict__ D, const TypeOfBias *__restrict__ bias,
    const T *__restrict__ weight, const i64 *__restrict__ order, T *__restrict__ y, T *__restrict__ states,
    int directions, int batch, int length, i64 u_k, i64 u_b, i64 delta_k, i64 delta_b, int delta_t, i64 B_k, i64 B_b,
    int B_t, i64 C_k, i64 C_b, int C_t) {
    __shared__ Shared sh;
    // of parts the compiler is to know that the lanes of a warp have the same one
    const int warp = PARTS > 1 ? __shfl_sync(0xffffffffu, threadIdx.x / 32, 0) : threadIdx.x / 32, lane = threadIdx.x % 32;
    const int channel = lane % (32 / LANES) * 2 * PAIRS, first_state = lane / (32 / LANES) * OWN;  // of the block's
    Chunk &of_chunk = sh.of_warp[warp].chunk;
#if S == 1
    Step *steps = of_chunk.steps;
#else
    float(*BC)[2 * S] = of_chunk.BC;
#endif
    constexpr int BLOCKS = (CHANNELS + WIDE - 1) / WIDE;
    const int block = blockIdx.x / CLUSTER % BLOCKS, rest = blockIdx.x / CLUSTER / BLOCKS;
    const int k = rest % directions;  // the directions of an image follow each other
#if PARTS > 1
    const int b = rest / directions, part = blockIdx.x % CLUSTER * TEAM + warp;
#else
    const int b = rest / directions * TEAM + warp, part = 0;
#endif
#if RANK
    for (int c = warp; c < WIDE; c += TEAM) {
        const T *row = weight + ((i64)k * CHANNELS + min(block * WIDE + c, CHANNELS - 1)) * RANK;
        for (int r = 2 * lane; r < WIDTH; r += 64) *(Pair *)&sh.weight[c][r] = r < RANK ? two(row + r) : 0;
    }
    __syncthreads();
#endif
    if (b >= batch) return;
    const i64 sequence = (i64)k * batch + b;
    const int chunks = (length + CHUNK - 1) / CHUNK;
    const int begin = first_chunk(part, chunks) * CHUNK, end = min(first_chunk(part + 1, chunks) * CHUNK, length);
    const int d = block * WIDE + channel;
    const bool ok0 = d < CHANNELS, ok1 = d + 1 < CHANNELS;
#if VEC
    const int d0 = ok0 ? d : 0, d1 = d0 + 1;
#else
    const int d0 = ok0 ? d : 0, d1 = ok1 ? d + 1 : 0;
#endif
    u += k * u_k + b * u_b;
    delta += k * delta_k + b * delta_b;
#if S == 1
    const int row = lane / CHUNK;  // of B, or of C
#else
    constexpr int LANES_BC = 2 * S / BC_AT_ONCE, STEPS_BC = 32 / LANES_BC;  // lanes load B and C of so many steps together
    const int row = lane % LANES_BC * BC_AT_ONCE, first_BC = lane / LANES_BC;
#endif
    const T *row_BC = row < S ? B + k * B_k + b * B_b + row : C + k * C_k + b * C_b + (row - S);
    const int time_BC = row < S ? B_t : C_t;
    y += sequence * length * CHANNELS;
    states += (sequence * chunks + begin / CHUNK) * S * CHANNELS + first_state * CHANNELS;

    A += (i64)k * CHANNELS * S;
    constexpr float SCALE = S == 1 ? 1.f : LOG2E;  // of rates
    float2 rate[PAIRS][OWN], h[PAIRS][OWN], skip[PAIRS], total[PAIRS];
#pragma unroll
    for (int p = 0; p < PAIRS; ++p) {
        float rates[2][OWN];
        load_rates<OWN>(A, d0 + 2 * p, first_state, SCALE, rates[0]);
        load_rates<OWN>(A, d1 + 2 * p, first_state, SCALE, rates[1]);
#pragma unroll
        for (int s = 0; s < OWN; ++s) {
            rate[p][s] = make_float2(rates[0][s], rates[1][s]);
            h[p][s] = make_float2(0.f, 0.f);
        }
        skip[p] = first_state == 0 ? load_float2(D + (i64)k * CHANNELS, d0 + 2 * p, d1 + 2 * p) : make_float2(0.f, 0.f);
        total[p] = make_float2(0.f, 0.f);
    }
    // of the pairs whose sizes the lane makes: its own, or those that a product of tensor cores leaves it
    constexpr int OFFSETS = READY ? WIDE / 8 : PAIRS;
    float2 offsets[OFFSETS];
#pragma unroll
    for (int i = 0; i < OFFSETS; ++i) {
        offsets[i] = make_float2(0.f, 0.f);
#if HAS_BIAS
        const int c = READY ? block * WIDE + 8 * i + lane % 4 * 2 : d + 2 * i;
        offsets[i] = load_float2(bias + (i64)k * CHANNELS, c < CHANNELS ? c : 0, c + 1 < CHANNELS ? c + 1 : 0);
        offsets[i].x *= S == 1 ? LOG2E : 1.f;
        offsets[i].y *= S == 1 ? LOG2E : 1.f;
#endif
    }
    // of pair p at a step, from this lane's states: y, and the states after it in place of those before it
    const auto advance = [&](int p, Pair raw_u, Sizes sizes, const float *BC_t) {
        BC_t += first_state;
        const float2 x = unpack(raw_u), size = made(sizes, offsets[READY ? 0 : p]);
        const float2 input = make_float2(size.x * x.x, size.y * x.y);
        total[p].x += size.x;
        total[p].y += size.y;
        float2 sum = make_float2(skip[p].x * x.x, skip[p].y * x.y);
#pragma unroll
        for (int quad = 0; quad < OWN; quad += QUAD) {
            const Quad Bs = *(const Quad *)&BC_t[quad], Cs = *(const Quad *)&BC_t[S + quad];
#pragma unroll
            for (int i = 0; i < QUAD; ++i) {
                const int s = quad + i;
                h[p][s].x = fmaf(exp2_fast(size.x * rate[p][s].x), h[p][s].x, input.x * Bs.at[i]);
                h[p][s].y = fmaf(exp2_fast(size.y * rate[p][s].y), h[p][s].y, input.y * Bs.at[i]);
                sum.x = fmaf(h[p][s].x, Cs.at[i], sum.x);
                sum.y = fmaf(h[p][s].y, Cs.at[i], sum.y);
            }
        }
        return sum;
    };
    // the part's steps; a scan that is not whole leaves states alone
    const auto walk = [&](bool whole) __attribute__((always_inline)) {
        // of this chunk and of the next one, which is asked for two chunks ahead
        int token = token_at(order, k, begin + lane % CHUNK, length);
        int next_token = token_at(order, k, begin + CHUNK + lane % CHUNK, length);
        const T *in = u + d0;  // the lane's channels
        T *out = y + d;
        HOLD(in);
        HOLD(out);
        Pairs next_u[GROUP];
#pragma unroll
        for (int j = 0; j < GROUP; ++j)
            next_u[j] = load_pairs(in + row_of(min(begin + j, length - 1), token) * CHANNELS, 0, d1 - d0);
#if RANK
        T(*rows)[CHUNK][WIDTH] = of_chunk.rows;  // even chunks of a part, odd chunks
        Sizes(*sizes)[SIZES] = of_chunk.sizes;
        for (int i = lane; RANK % 16 && i < CHUNK * WIDTH; i += 32) ((Pair *)rows)[i] = 0;  // past the rank
        __syncwarp();
        fetch(rows[0], delta + (i64)row_of(min(begin + lane / 2, length - 1), token) * delta_t, lane);
#else
        const T *delta_in = delta + d0;
        HOLD(delta_in);
        Pairs next_delta[GROUP];
#pragma unroll
        for (int j = 0; j < GROUP; ++j)
            next_delta[j] = load_pairs(delta_in + row_of(min(begin + j, length - 1), token) * CHANNELS, 0, d1 - d0);
#endif
#if S == 1
        T next_BC = row_BC[token * time_BC];
#else
        RawBC raw_BC[CHUNK / STEPS_BC];
        const auto load_BC = [&](int start, int token) {
#pragma unroll
            for (int j = 0; j < CHUNK / STEPS_BC; ++j) {
                const int t = row_of(min(start + j * STEPS_BC + first_BC, length - 1), token);
                raw_BC[j] = *(const RawBC *)(row_BC + t * time_BC);
            }
        };
        if (AHEAD) load_BC(begin, token);
#endif
#pragma unroll 1
        for (int start = begin; start < end; start += CHUNK) {
            const int later_token = token_at(order, k, start + 2 * CHUNK + lane % CHUNK, length);
#if SAVE
            if (whole) {
#pragma unroll
                for (int s = 0; s < OWN; ++s) {
                    Pairs before;
#pragma unroll
                    for (int p = 0; p < PAIRS; ++p) before.at[p] = pack_states(h[p][s].x, h[p][s].y);
                    store_pairs(states + s * CHANNELS, d, ok0, ok1, before);
                }
                states += (i64)S * CHANNELS;
            }
#endif
            __syncwarp();
#if RANK
            arrived();
            const int now = (start - begin) / CHUNK % 2;
            if (start + CHUNK < end) {
                const int step = min(start + CHUNK + lane / 2, length - 1);
                fetch(rows[1 - now], delta + (i64)row_of(step, next_token) * delta_t, lane);
            }
            project(sizes, rows[now], sh.weight, offsets, lane);
#endif
#if S == 1
            steps[lane % CHUNK].BC[row] = to_float(next_BC) * (row == 0 ? LN2 : 1.f);
            steps[lane % CHUNK].row[row] = (row == 0 ? token : next_token) * CHANNELS;
            next_BC = row_BC[next_token * time_BC];
            __syncwarp();
            const int left = length - start;
#pragma unroll
            for (int j = 0; j < CHUNK; ++j) {
                if (j % 4 == 0 && j >= left) break;  // up to three steps too many do no harm
                const Step step = steps[j];
#if RANK
                const Pairs raw_delta = *(const Pairs *)&sizes[j][PAIRS * lane];
#else
                const Pairs raw_delta = next_delta[j];
                next_delta[j] = load_pairs(delta_in + step.row[1], 0, d1 - d0);
#endif
                Pairs results;
#pragma unroll
                for (int p = 0; p < PAIRS; ++p) {
                    const float2 sum = advance(p, next_u[j].at[p], raw_delta.at[p], step.BC);
                    results.at[p] = pack(sum.x, sum.y);
                }
                next_u[j] = load_pairs(in + step.row[1], 0, d1 - d0);
                if (whole && j < left) store_pairs(out + step.row[0], 0, ok0, ok1, results);
            }
#else
            if (!AHEAD) load_BC(start, token);
#pragma unroll
            for (int j = 0; j < CHUNK / STEPS_BC; ++j) {
                *(ValuesOfBC *)&BC[j * STEPS_BC + first_BC][row] = unpack(raw_BC[j]);
            }
            if (AHEAD) load_BC(start + CHUNK, next_token);
            __syncwarp();
            const auto store = [&](int step, float2 sum) {
                const int t = row_of<TOKENS || TO_TOKENS>(step, token);
                store_pair(out + t * CHANNELS, 0, ok0 && step < length, ok1 && step < length, pack(sum.x, sum.y));
            };
#pragma unroll 1
            for (int first = start; first < min(start + CHUNK, end); first += GROUP) {
                Pair raw_u[GROUP];
                Sizes of_steps[GROUP];
#pragma unroll
                for (int j = 0; j < GROUP; ++j) {
                    raw_u[j] = next_u[j].at[0];
#if RANK
                    of_steps[j] = sizes[first - start + j][channel / 2];
#else
                    of_steps[j] = next_delta[j].at[0];
#endif
                }
#pragma unroll
                for (int j = 0; j < GROUP; ++j) {
                    const int step = min(first + GROUP + j, length - 1);
                    const int t = row_of(step, step < start + CHUNK ? token : next_token);
                    next_u[j] = load_pairs(in + t * CHANNELS, 0, d1 - d0);
#if !RANK
                    next_delta[j] = load_pairs(delta_in + t * CHANNELS, 0, d1 - d0);
#endif
                }
                float2 sums[GROUP];
#pragma unroll
                for (int j = 0; j < GROUP; ++j) {
                    if (!AHEAD && first + j >= length) break;
                    sums[j] = advance(0, raw_u[j], of_steps[j], BC[first - start + j]);
                    if (whole && LANES == 1) store(first + j, sums[j]);
                }
                if (whole && LANES > 1) {
                    // each of the lanes that share a pair gives away the sums of half its steps, until one or two are left
#pragma unroll
                    for (int apart = 32 / LANES, left = GROUP / 2; apart < 32; apart *= 2, left /= 2) {
                        const bool odd = lane & apart;
#pragma unroll
                        for (int i = 0; i < left; ++i) {
                            const float2 given = odd ? sums[2 * i] : sums[2 * i + 1];
                            sums[i] = odd ? sums[2 * i + 1] : sums[2 * i];
                            sums[i].x += __shfl_xor_sync(0xffffffffu, given.x, apart);
                            sums[i].y += __shfl_xor_sync(0xffffffffu, given.y, apart);
                        }
                    }
#pragma unroll
                    for (int i = 0; i < GROUP / LANES; ++i) store(first + i * LANES + lane / (32 / LANES), sums[i]);
                }
            }
#endif
            token = next_token;
            next_token = later_token;
        }
    };
#if PARTS > 1
    if (part < PARTS - 1) walk(false);
#if RANK
    arrived();  // a part without steps has asked for some, which would come to where its end is to stand
#else
    __syncwarp();
#endif
    End<WIDE> &own = sh.of_warp[warp].end;
#pragma unroll
    for (int s = 0; s < OWN; ++s) *(float2 *)&own.state[first_state + s][channel] = h[0][s];
    if (first_state == 0) *(float2 *)&own.size[channel] = total[0];
    const auto end_of = [&](int part) { return in_block(&sh.of_warp[part % TEAM].end, part / TEAM); };
    combine<32 * TEAM, WIDE>(end_of, A, block * WIDE, SCALE);
#pragma unroll
    for (int s = 0; s < OWN; ++s) h[0][s] = *(float2 *)&own.state[first_state + s][channel];
    __syncwarp();
#endif
    walk(true);
}
