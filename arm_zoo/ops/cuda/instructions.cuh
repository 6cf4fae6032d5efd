// What the kernels ask of the GPU in its own instructions (PTX). All else is C++, so that tests can run the kernels on a CPU
// with other functions in this file's place. It stands before common.cuh.

__device__ __forceinline__ float exp2_fast(float x) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}
// float16 and bfloat16 by their bits, rounded to the nearest; of two numbers the first has the low bits
__device__ __forceinline__ float from_float16(unsigned short v) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v));
    return f;
}
__device__ __forceinline__ unsigned short to_float16(float v) {
    unsigned short r;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(v));
    return r;
}
__device__ __forceinline__ unsigned short to_bfloat16(float v) {
    unsigned short r;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(v));
    return r;
}
__device__ __forceinline__ unsigned to_float16(float x, float y) {
    unsigned r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(y), "f"(x));
    return r;
}
__device__ __forceinline__ unsigned to_bfloat16(float x, float y) {
    unsigned r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(y), "f"(x));
    return r;
}

// copies into shared memory, which the thread that asked for them has when it has waited for them
template <int BYTES> __device__ __forceinline__ void copy_async(void *shared, const void *from) {
    unsigned to = (unsigned)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(BYTES) : "memory");
}
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
__device__ __forceinline__ void prefetch(const void *p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// c += a b by a warp's tensor cores: (16, 16) x (16, 8) of 16 bits, (16, 8) x (8, 8) of float32 without its last 13 bits
#define MULTIPLY(NAME, TYPE)                                                                                             \
    __device__ __forceinline__ void NAME(float4 &c, const unsigned *a, unsigned b0, unsigned b1) {                        \
        asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 "                                                \
            "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                                                       \
            : "+f"(c.x), "+f"(c.y), "+f"(c.z), "+f"(c.w)                                                                  \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                              \
    }
MULTIPLY(multiply_float16, "f16")
MULTIPLY(multiply_bfloat16, "bf16")
__device__ __forceinline__ void multiply_tf32(float4 &c, const float4 a, const float2 b) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c.x), "+f"(c.y), "+f"(c.z), "+f"(c.w)
        : "r"(__float_as_uint(a.x)), "r"(__float_as_uint(a.y)), "r"(__float_as_uint(a.z)), "r"(__float_as_uint(a.w)),
          "r"(__float_as_uint(b.x)), "r"(__float_as_uint(b.y)));
}

// waits for all warps of a cluster's blocks, and shows them what was written into shared memory
__device__ __forceinline__ void meet_in_cluster() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// the same place in the shared memory of another block of the cluster
template <class X> __device__ __forceinline__ X *in_block_of_cluster(X *place, int block) {
    asm("mapa.u64 %0, %0, %1;" : "+l"(place) : "r"(block));
    return place;
}

// keeps a pointer to global memory in registers: an access is then it plus a constant, not a sum made anew of its parts
#define HOLD(p) \
    asm volatile("" : "+l"(p)); \
    __builtin_assume(__isGlobal(p))
// likewise a number, instead of its being made anew
__device__ __forceinline__ void hold(float &v) { asm volatile("" : "+f"(v)); }
