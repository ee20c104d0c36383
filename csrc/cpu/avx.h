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

// Writes the offsets of the `parts` units of each of eight groups, given those of the first units.
template <int parts>
GQSA_INLINE void store_units(__m128i first, uint16_t* out) {
    if constexpr (parts == 1) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out), first);
    } else {
        const __m128i middle = _mm_add_epi16(first, _mm_set1_epi16(parts / 2 * 8));
        store_units<parts / 2>(_mm_unpacklo_epi16(first, middle), out);
        store_units<parts / 2>(_mm_unpackhi_epi16(first, middle), out + parts / 2 * 8);
    }
}

// Twin of AppendOffsets in vectors.
template <int G>
struct AppendOffsetsAvx {
    GQSA_INLINE uint16_t* operator()(const Weight& weight, int64_t row, uint16_t* out) const {
        constexpr int parts = units_per_group(G);
        const uint8_t* mask = weight.group_mask + row * weight.mask_stride;
        const __m128i group = _mm_set1_epi16(G / 2), byte_groups = _mm_set1_epi16(8 * (G / 2));
        __m128i first = _mm_setzero_si128();
        const auto add = [&](uint8_t kept) GQSA_INLINE_LAMBDA {
            const __m128i set = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kSetBits.of[kept]));
            store_units<parts>(_mm_add_epi16(first, _mm_mullo_epi16(_mm_cvtepu8_epi16(set), group)), out);
            out += __builtin_popcount(kept) * parts;
            first = _mm_add_epi16(first, byte_groups);
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
