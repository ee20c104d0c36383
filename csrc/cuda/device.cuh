// Instructions in small wrappers. Every one has a twin in plain C++, so that the kernels also run on a CPU, a fiber for
// each thread, and are tested there (tests/cuda/shim.h).
#pragma once

#include <cstdint>

#include "../common/slab.h"
#include "arguments.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#else
#include "shim.h"
#endif

namespace gqsa::cuda {

// The shared memory that the launch asks for.
#ifdef __CUDACC__
#define DYNAMIC_SHARED(type, name)                            \
    extern __shared__ __align__(16) unsigned char name##_bytes[]; \
    type* const name = reinterpret_cast<type*>(name##_bytes)
#else
#define DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(shim::dynamic_shared())
#endif

constexpr unsigned kAllLanes = 0xffffffffu;

#ifdef __CUDACC__

// Two numbers of 16 bits in a register, the first in the low half: as float16 or as bfloat16.
struct Half {
    static __device__ __forceinline__ __half2 as(uint32_t v) { return *reinterpret_cast<__half2*>(&v); }
    static __device__ __forceinline__ uint32_t bits(__half2 v) { return *reinterpret_cast<uint32_t*>(&v); }
    static __device__ __forceinline__ uint32_t pack(float low, float high) { return bits(__floats2half2_rn(low, high)); }
    static __device__ __forceinline__ float low(uint32_t v) { return __low2float(as(v)); }
    static __device__ __forceinline__ float high(uint32_t v) { return __high2float(as(v)); }
};
struct Bfloat {
    static __device__ __forceinline__ __nv_bfloat162 as(uint32_t v) { return *reinterpret_cast<__nv_bfloat162*>(&v); }
    static __device__ __forceinline__ uint32_t bits(__nv_bfloat162 v) { return *reinterpret_cast<uint32_t*>(&v); }
    static __device__ __forceinline__ uint32_t pack(float low, float high) { return bits(__floats2bfloat162_rn(low, high)); }
    static __device__ __forceinline__ float low(uint32_t v) { return __uint_as_float(v << 16); }
    static __device__ __forceinline__ float high(uint32_t v) { return __uint_as_float(v & 0xffff0000u); }
};

template <class T>
__device__ __forceinline__ uint32_t sub2(uint32_t a, uint32_t b) { return T::bits(__hsub2(T::as(a), T::as(b))); }
template <class T>
__device__ __forceinline__ uint32_t mul2(uint32_t a, uint32_t b) { return T::bits(__hmul2(T::as(a), T::as(b))); }
template <class T>
__device__ __forceinline__ uint32_t add2(uint32_t a, uint32_t b) { return T::bits(__hadd2(T::as(a), T::as(b))); }
template <class T>
__device__ __forceinline__ uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
    return T::bits(__hfma2(T::as(a), T::as(b), T::as(c)));
}

// A constant that must stay in a register: as an immediate it would keep (x & mask) | magic from being one instruction.
template <uint32_t magic>
__device__ __forceinline__ uint32_t in_register() {
    uint32_t value;
    asm volatile("mov.b32 %0, %1;" : "=r"(value) : "n"(magic));
    return value;
}
template <uint32_t mask>
__device__ __forceinline__ uint32_t mask_or(uint32_t x, uint32_t magic) {
    uint32_t value;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(value) : "r"(x), "n"(mask), "r"(magic));
    return value;
}

// Weights are read exactly once and should not push out of the caches what is read again.
__device__ __forceinline__ uint4 load_once(const uint4* p) { return __ldcs(p); }
__device__ __forceinline__ uint2 load_once(const uint2* p) { return __ldcs(p); }
__device__ __forceinline__ uint32_t load_once(const uint32_t* p) { return __ldcs(p); }
__device__ __forceinline__ uint16_t load_once(const uint16_t* p) { return __ldcs(p); }
__device__ __forceinline__ uint8_t load_once(const uint8_t* p) { return __ldcs(p); }
__device__ __forceinline__ void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// Programmatic dependent launch: until wait_for_inputs returns, the kernel before this one may still be running, and
// only weights may be read. Before sm_90 kernels simply follow one another.
__device__ __forceinline__ void wait_for_inputs() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// d += a b: 16 x 16 times 16 x 8, in the fragment layout of mma.m16n8k16.
__device__ __forceinline__ void mma(Half, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma(Bfloat, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#else

using shim::Bfloat;
using shim::Half;

template <class T>
uint32_t sub2(uint32_t a, uint32_t b) { return T::pack(T::low(a) - T::low(b), T::high(a) - T::high(b)); }
template <class T>
uint32_t mul2(uint32_t a, uint32_t b) { return T::pack(T::low(a) * T::low(b), T::high(a) * T::high(b)); }
template <class T>
uint32_t add2(uint32_t a, uint32_t b) { return T::pack(T::low(a) + T::low(b), T::high(a) + T::high(b)); }
template <class T>
uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
    return T::pack_double(double(T::low(a)) * T::low(b) + T::low(c), double(T::high(a)) * T::high(b) + T::high(c));
}
template <uint32_t magic>
uint32_t in_register() { return magic; }
template <uint32_t mask>
uint32_t mask_or(uint32_t x, uint32_t magic) { return (x & mask) | magic; }
template <class T>
T load_once(const T* p) { return *p; }
inline void prefetch(const void*) {}
inline void wait_for_inputs() { shim::wait_for_inputs(); }
inline void let_next_kernel_start() {}
using shim::mma;

#endif

// Bytes / 4 registers, or one for fewer bytes, in a single load.
template <int bytes>
__device__ __forceinline__ void load_words(const void* p, uint32_t* out) {
    if constexpr (bytes == 16) {
        const uint4 v = load_once(static_cast<const uint4*>(p));
        out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
    } else if constexpr (bytes == 8) {
        const uint2 v = load_once(static_cast<const uint2*>(p));
        out[0] = v.x, out[1] = v.y;
    } else if constexpr (bytes == 4) {
        out[0] = load_once(static_cast<const uint32_t*>(p));
    } else if constexpr (bytes == 2) {
        out[0] = load_once(static_cast<const uint16_t*>(p));
    } else {
        out[0] = load_once(static_cast<const uint8_t*>(p));
    }
}

// One lane's part of a record.
template <int G>
struct Record {
    static constexpr int groups = kRecordWeights / G, words = G / 8;  // words of codes a group
    uint32_t codes[8], scale_zero[(groups + 1) / 2], columns[(groups + 3) / 4], head;

    __device__ __forceinline__ void load(const Weight& weight, int record, int lane) {
        const uint4* from = static_cast<const uint4*>(weight.codes) + int64_t{record} * 2 * kLanes + lane;
        const int64_t at = int64_t{record} * kLanes + lane;
        load_words<16>(from, codes);
        load_words<16>(from + kLanes, codes + 4);
        load_words<2 * groups>(static_cast<const char*>(weight.scale_zero) + at * 2 * groups, scale_zero);
        load_words<groups>(static_cast<const char*>(weight.columns) + at * groups, columns);
        head = weight.heads[record];
    }
    // The word of group `j` as in the checkpoint; 0 for no group.
    __device__ __forceinline__ uint32_t meta(int j) const { return scale_zero[j / 2] >> (j % 2 * 16) & 0xffffu; }
    __device__ __forceinline__ int column(int j) const {
        return head_base(head) + static_cast<int>(columns[j / 4] >> (j % 4 * 8) & 0xffu);
    }
};

// The scale of a checkpoint's word, as the bits of a float16.
__device__ __forceinline__ uint32_t scale_bits(uint32_t meta) { return meta >> 1 & 0x7ff8u; }

__device__ __forceinline__ float load_value(const void* p, Dtype dtype, int64_t at) {
    if (dtype == Dtype::float32) return static_cast<const float*>(p)[at];
    const uint32_t bits = static_cast<const uint16_t*>(p)[at];
    return dtype == Dtype::bfloat16 ? Bfloat::low(bits) : Half::low(bits);
}
__device__ __forceinline__ void store_value(void* p, Dtype dtype, int64_t at, float value) {
    if (dtype == Dtype::float32) {
        static_cast<float*>(p)[at] = value;
    } else {
        const uint32_t bits = dtype == Dtype::bfloat16 ? Bfloat::pack(value, 0) : Half::pack(value, 0);
        static_cast<uint16_t*>(p)[at] = static_cast<uint16_t>(bits);
    }
}

}  // namespace gqsa::cuda
