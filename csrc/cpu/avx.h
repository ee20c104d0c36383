// Shared by the AVX2 and AVX-512 kernels. Unnamed namespace, see numbers.h.
#pragma once

#include <immintrin.h>

#include "rows.h"

namespace gqsa::cpu {
namespace {

// How many bytes ahead of their use codes and scales are fetched from memory.
constexpr int64_t kCodesAhead = 4096, kScalesAhead = 512;

// Not _mm_prefetch: g++ 12 takes a function that only prefetches for one that does nothing, and drops the calls.
GQSA_INLINE void fetch(const void* at, int64_t ahead) {
    asm volatile("prefetcht0 %0" : : "m"(static_cast<const char*>(at)[ahead]));
}

inline float add_up(__m256 lanes) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

}  // namespace
}  // namespace gqsa::cpu
