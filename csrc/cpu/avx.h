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

// Twin of AppendOffsets in vectors. AVX-512 could do twice as much at a time, but compressing a vector takes it longer.
template <int G>
struct AppendOffsetsAvx {
    GQSA_INLINE uint32_t* operator()(const Weight& weight, int64_t row, uint32_t stride, uint32_t* out) const {
        constexpr int parts = units_per_group(G);
        const uint8_t* mask = weight.group_mask + row * weight.mask_stride;
        const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        const __m256i unit = _mm256_set1_epi32(static_cast<int>(stride));
        const __m256i step = _mm256_set1_epi32(static_cast<int>(stride * 8 * parts));
        __m256i offset = _mm256_mullo_epi32(lane, _mm256_set1_epi32(static_cast<int>(stride * parts)));
        const auto add = [&](uint8_t bits) GQSA_INLINE_LAMBDA {
            const __m128i set = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kSetBits.of[bits]));
            const __m256i kept = _mm256_permutevar8x32_epi32(offset, _mm256_cvtepu8_epi32(set));
            if constexpr (parts == 1) {
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), kept);
            } else {
#pragma GCC unroll 8
                for (int at = 0; at < 8 * parts; at += 8) {
                    const __m256i each = _mm256_add_epi32(lane, _mm256_set1_epi32(at));
                    const __m256i group = _mm256_srli_epi32(each, parts == 2 ? 1 : parts == 4 ? 2 : 3);
                    const __m256i part = _mm256_and_si256(each, _mm256_set1_epi32(parts - 1));
                    const __m256i first = _mm256_permutevar8x32_epi32(kept, group);
                    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + at),
                                        _mm256_add_epi32(first, _mm256_mullo_epi32(part, unit)));
                }
            }
            out += __builtin_popcount(bits) * parts;
            offset = _mm256_add_epi32(offset, step);
        };
        int64_t byte = 0;
        for (; byte + 8 <= weight.mask_stride; byte += 8) {
#pragma GCC unroll 8
            for (int i = 0; i < 8; ++i) add(mask[byte + i]);
        }
        for (; byte < weight.mask_stride; ++byte) add(mask[byte]);
        return out;
    }
};

inline float add_up(__m256 lanes) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

}  // namespace
}  // namespace gqsa::cpu
