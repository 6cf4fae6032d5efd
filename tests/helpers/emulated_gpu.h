// Runs a CUDA kernel on a CPU: its threads take turns on one thread of the host, each until it waits for others, in an order
// drawn at random, the same in each run. This text stands in the place of arm_zoo/ops/cuda/instructions.cuh, before the
// kernel's own; tests/helpers/emulated_gpu.py compiles it.
//
// Shared memory begins as NaN. Copies into it arrive when they are asked for or when they are waited for, which is drawn too.
// All else that is written is seen at once, and the lanes of a warp go on together, from the first or from the last: of what
// they forget to wait for, only a part shows. What is not aligned as a GPU needs it ends the process.

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <exception>
#include <random>
#include <utility>
#include <vector>

using std::max;
using std::min;
#define __device__
#define __global__
#define __forceinline__ inline
#define __restrict__
#define __align__(bytes) alignas(bytes)
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define HOLD(pointer)

struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float __uint_as_float(unsigned bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
inline unsigned __float_as_uint(float value) {
    unsigned bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

namespace emulated {
constexpr int STACK = 1 << 18;  // bytes
constexpr int TURNS = 256;      // of a warp, at most
constexpr int PATIENCE = 1000;  // with each warp, before it counts as waiting for good

// threads that wait for each other
struct Group {
    int size = 0, waiting = 0;
    long meetings = 0;
    void meet_if_all_wait() {
        if (waiting != size) return;
        waiting = 0;
        ++meetings;
    }
};
struct Copy {
    void *to;
    const void *from;
    int bytes;
};
struct Warp : Group {
    alignas(16) char given[32][32];  // what each lane shows the others
};
struct Index {
    unsigned x;
};
struct Thread {
    Index thread, block;
    Warp *warp;
    Group *in_block, *in_cluster;
    char *shared;
    int rank;  // of the block in its cluster
    std::vector<Copy> copies;
    std::vector<char> stack;
    ucontext_t beginning;
    jmp_buf rest;
    bool begun = false, done = false;
};
inline Thread *current;
inline jmp_buf scheduler;
inline long waits_ended;
inline std::minstd_rand drawn;
inline size_t shared_bytes;  // of a block, a multiple of 16

inline void let_others_run() {
    if (!_setjmp(current->rest)) _longjmp(scheduler, 1);
}
inline void run(Thread &thread) {
    current = &thread;
    if (_setjmp(scheduler)) return;
    if (thread.begun) _longjmp(thread.rest, 1);
    thread.begun = true;
    setcontext(&thread.beginning);
}
inline void wait_for(Group *group) {
    const long meeting = group->meetings;
    ++group->waiting;
    group->meet_if_all_wait();
    while (group->meetings == meeting) let_others_run();
    ++waits_ended;
}
inline int lane() { return current->thread.x % 32; }
// what `use` makes of the values that the warp's lanes give
template <class X, class Use> auto together(const X &value, Use use) {
    static_assert(sizeof(X) <= sizeof(current->warp->given[0]));
    Warp &warp = *current->warp;
    memcpy(warp.given[lane()], &value, sizeof(X));
    wait_for(&warp);
    const auto result = use([&](int lane) -> const X & { return *(const X *)warp.given[lane]; });
    wait_for(&warp);
    return result;
}
template <class X> X exchanged(const X &value, int from) {
    return together(value, [&](auto given) { return given(from); });
}
// Every lane has some elements of a, b and c, as the manual of PTX describes. `of_a(given, row, k)` and `of_b(given, k, column)`
// find an element with the lane that gives it; c has two adjacent columns of rows lane / 4 and lane / 4 + 8.
template <class Own, class OfA, class OfB> void multiply(float4 &c, const Own &own, int inner, OfA of_a, OfB of_b) {
    const float4 product = together(own, [&](auto given) {
        float out[4] = {};
        for (int i = 0; i < 4; ++i)
            for (int k = 0; k < inner; ++k)
                out[i] += of_a(given, lane() / 4 + i / 2 * 8, k) * of_b(given, k, lane() % 4 * 2 + i % 2);
        return make_float4(out[0], out[1], out[2], out[3]);
    });
    c = make_float4(c.x + product.x, c.y + product.y, c.z + product.z, c.w + product.w);
}

template <class... P, size_t... I>
void call(void (*kernel)(P...), const long long *arguments, std::index_sequence<I...>) {
    kernel((P)arguments[I]...);
}
inline void (*kernel_call)(const long long *);
inline const long long *kernel_arguments;
inline void run_thread() {
    kernel_call(kernel_arguments);
    current->done = true;
    for (Group *group : {(Group *)current->warp, current->in_block, current->in_cluster}) {
        --group->size;
        if (group->size) group->meet_if_all_wait();
    }
    _longjmp(scheduler, 1);
}
// One cluster of blocks after the other; returns what is wrong, or null.
inline const char *launch(int grid, int block, int cluster) {
    if (grid % cluster || block % 32) return "the grid has no whole clusters, or its blocks no whole warps";
    for (int first = 0; first < grid; first += cluster) {
        std::vector<char> memory(shared_bytes * cluster + 16, (char)0xff);
        char *shared = memory.data() + (-(size_t)memory.data() % 16);
        std::vector<Warp> warps(cluster * block / 32);
        std::vector<Group> blocks(cluster);
        Group whole;
        whole.size = cluster * block;
        for (Warp &warp : warps) warp.size = 32;
        for (Group &group : blocks) group.size = block;
        std::vector<Thread> threads(cluster * block);
        for (int i = 0; i < (int)threads.size(); ++i) {
            Thread &thread = threads[i];
            thread.rank = i / block;
            thread.thread.x = i % block;
            thread.block.x = first + thread.rank;
            thread.warp = &warps[i / 32];
            thread.in_block = &blocks[thread.rank];
            thread.in_cluster = &whole;
            thread.shared = shared + shared_bytes * thread.rank;
            thread.stack.resize(STACK);
            getcontext(&thread.beginning);
            thread.beginning.uc_stack.ss_sp = thread.stack.data();
            thread.beginning.uc_stack.ss_size = STACK;
            makecontext(&thread.beginning, run_thread, 0);
        }
        long in_vain = 0;
        for (int left = threads.size(); left;) {
            if (++in_vain > PATIENCE * (long)warps.size()) return "threads wait for others that never come";
            const int warp = drawn() % warps.size();  // it goes on for some time, or until it waits for other warps
            long before = -1;
            for (int turns = drawn() % TURNS; turns >= 0 && before != waits_ended; --turns) {
                before = waits_ended;
                const int first = drawn() % 2 * 31;  // of its lanes
                for (int i = 0; i < 32; ++i) {
                    Thread &thread = threads[32 * warp + (i ^ first)];
                    if (thread.done) continue;
                    run(thread);
                    left -= thread.done;
                    if (thread.done) in_vain = 0;
                }
                if (before != waits_ended) in_vain = 0;
            }
        }
    }
    return nullptr;
}
}  // namespace emulated

#define threadIdx (emulated::current->thread)
#define blockIdx (emulated::current->block)
inline void __syncwarp() { emulated::wait_for(emulated::current->warp); }
inline void __syncthreads() { emulated::wait_for(emulated::current->in_block); }
template <class X> X __shfl_sync(unsigned, X value, int lane) { return emulated::exchanged(value, lane & 31); }
template <class X> X __shfl_xor_sync(unsigned, X value, int mask) {
    return emulated::exchanged(value, emulated::lane() ^ mask);
}

inline float exp2_fast(float x) { return exp2f(x); }
inline void hold(float &) {}
inline void prefetch(const void *) {}
inline float from_bfloat16(unsigned bits) { return __uint_as_float(bits << 16); }
inline unsigned short to_bfloat16(float v) {
    const unsigned bits = __float_as_uint(v);
    return v != v ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline float from_float16(unsigned short bits) {
    const int exponent = bits >> 10 & 31, digits = bits & 1023;
    const float value = exponent == 31 ? (digits ? NAN : INFINITY)
                                       : ldexpf(exponent ? digits + 1024 : digits, max(exponent, 1) - 25);
    return bits >> 15 ? -value : value;
}
inline unsigned short to_float16(float v) {
    const unsigned short sign = std::signbit(v) ? 0x8000 : 0;
    v = fabsf(v);
    if (!(v < 65520.f)) return sign | (v != v ? 0x7fff : 0x7c00);
    const int exponent = max(v > 0.f ? ilogbf(v) : -14, -14);
    const int digits = (int)nearbyintf(ldexpf(v, 10 - exponent));  // 2048 carries into the exponent
    return sign | (digits < 1024 ? digits : ((exponent + 15) << 10) + digits - 1024);
}
inline unsigned to_bfloat16(float x, float y) { return to_bfloat16(x) | (unsigned)to_bfloat16(y) << 16; }
inline unsigned to_float16(float x, float y) { return to_float16(x) | (unsigned)to_float16(y) << 16; }

template <int BYTES> void copy_async(void *shared, const void *from) {
    static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16);
    if ((size_t)shared % BYTES || (size_t)from % BYTES) std::terminate();
    if (emulated::drawn() % 2)
        memcpy(shared, from, BYTES);
    else
        emulated::current->copies.push_back({shared, from, BYTES});
}
inline void wait_for_copies() {
    for (const emulated::Copy &copy : emulated::current->copies) memcpy(copy.to, copy.from, copy.bytes);
    emulated::current->copies.clear();
}

struct HalvesOfLane {
    unsigned a[4], b[2];
};
template <class Number>
void multiply_halves(float4 &c, const unsigned *a, unsigned b0, unsigned b1, Number number) {
    const HalvesOfLane own = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
    const auto half = [&](unsigned pair, int k) { return number((unsigned short)(pair >> k % 2 * 16)); };
    const auto of_a = [&](const auto &all, int row, int k) {
        return half(all(row % 8 * 4 + k % 8 / 2).a[row / 8 + k / 8 * 2], k);
    };
    const auto of_b = [&](const auto &all, int k, int column) { return half(all(column * 4 + k % 8 / 2).b[k / 8], k); };
    emulated::multiply(c, own, 16, of_a, of_b);
}
inline void multiply_float16(float4 &c, const unsigned *a, unsigned b0, unsigned b1) {
    multiply_halves(c, a, b0, b1, from_float16);
}
inline void multiply_bfloat16(float4 &c, const unsigned *a, unsigned b0, unsigned b1) {
    multiply_halves(c, a, b0, b1, from_bfloat16);
}
struct FloatsOfLane {
    float a[4], b[2];
};
inline void multiply_tf32(float4 &c, const float4 a, const float2 b) {
    const FloatsOfLane own = {{a.x, a.y, a.z, a.w}, {b.x, b.y}};
    const auto cut = [](float x) { return __uint_as_float(__float_as_uint(x) & 0xffffe000u); };
    const auto of_a = [&](const auto &all, int row, int k) { return cut(all(row % 8 * 4 + k % 4).a[row / 8 + k / 4 * 2]); };
    const auto of_b = [&](const auto &all, int k, int column) { return cut(all(column * 4 + k % 4).b[k / 4]); };
    emulated::multiply(c, own, 8, of_a, of_b);
}

inline void meet_in_cluster() { emulated::wait_for(emulated::current->in_cluster); }
template <class X> X *in_block_of_cluster(X *place, int block) {
    return (X *)((char *)place + (block - emulated::current->rank) * (long)emulated::shared_bytes);
}
