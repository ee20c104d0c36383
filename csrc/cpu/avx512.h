// Shared by the AVX-512 kernels. Unnamed namespace, see numbers.h.
#pragma once

#include <immintrin.h>

#include "rows.h"

namespace gqsa::cpu {
namespace {

// A vector's worth of constants.
template <class T>
struct alignas(64) Lanes {
    T value[64 / sizeof(T)];
};

constexpr int64_t kAhead = 4096;  // bytes of codes fetched ahead of their use: about the latency of memory

inline void fetch_ahead(const uint16_t* words) {
    _mm_prefetch(reinterpret_cast<const char*>(words) + kAhead, _MM_HINT_T0);
}

inline uint32_t ones(int64_t from, int64_t to) {  // bits from..to - 1 of 16, clamped
    const uint32_t below = to >= 16 ? 0xFFFF : to <= 0 ? 0 : (1u << to) - 1;
    return from <= 0 ? below : from >= 16 ? 0 : below >> from << from;
}

// The 16-bit words of the 16 units of a chunk, 0 for those outside of the row: scale 0 and zero point 0.
template <int G, bool whole>
inline __m256i load_scale_zero(const Weight& weight, int64_t chunk, const Row& row) {
    constexpr int parts = units_per_group(G);
    const int64_t first = chunk * 16;
    if constexpr (parts == 1 && whole) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weight.scale_zero + first));
    } else if constexpr (parts == 1) {
        const uint32_t inside = ones(row.begin - first, row.end - first);
        return _mm256_maskz_loadu_epi16(static_cast<__mmask16>(inside), weight.scale_zero + first);
    } else {
        // A row begins and ends with a whole group, so its units are inside together.
        constexpr int groups = 16 / parts;
        const uint32_t mask = ones((row.begin - first) / parts, (row.end - first + parts - 1) / parts);
        const __m256i words = _mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask & ((1u << groups) - 1)),
                                                       weight.scale_zero + first / parts);
        const __m256i lane = _mm256_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        return _mm256_permutexvar_epi16(_mm256_srli_epi16(lane, parts == 2 ? 1 : parts == 4 ? 2 : 3), words);
    }
}

#define GQSA_INLINE_LAMBDA __attribute__((always_inline))

// Calls add(whole, chunk, offsets) for every chunk of a row; `whole`, known when compiled, says that all 16 units are the
// row's and need no mask.
template <class Add>
GQSA_INLINE void for_chunks(const Row& row, Add add) {
    const uint32_t* offsets = row.offsets;
    for (int64_t chunk = row.begin >> 4; chunk << 4 < row.end; ++chunk, offsets += 16) {
        if (row.holds_chunk(chunk)) {
            add(std::true_type{}, chunk, offsets);
        } else {
            add(std::false_type{}, chunk, offsets);
        }
    }
}

inline __m512 scales_of(__m256i scale_zero) {
    const __m256i bits = _mm256_and_si256(scale_zero, _mm256_set1_epi16(static_cast<short>(0xFFF0)));
    return _mm512_cvtph_ps(_mm256_srli_epi16(bits, 1));
}

// Twin of append_offsets, 16 groups at a time.
template <int G>
inline uint32_t* append_offsets_512(const Weight& weight, int64_t row, uint32_t stride, uint32_t* out) {
    if constexpr (units_per_group(G) > 1) {
        return append_offsets<G>(weight, row, stride, out);
    } else {
        const uint8_t* mask = weight.group_mask + row * weight.mask_stride;
        const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        const __m512i step = _mm512_set1_epi32(static_cast<int>(stride * 16));
        __m512i offset = _mm512_mullo_epi32(lane, _mm512_set1_epi32(static_cast<int>(stride)));
        for (int64_t byte = 0; byte < weight.mask_stride; byte += 2) {
            uint32_t bits = mask[byte];
            if (byte + 1 < weight.mask_stride) bits |= uint32_t{mask[byte + 1]} << 8;
            _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(static_cast<__mmask16>(bits), offset));
            out += __builtin_popcount(bits);
            offset = _mm512_add_epi32(offset, step);
        }
        return out;
    }
}

inline float add_up(__m256 lanes) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

inline float add_up(__m512 a, __m512 b) {
    const __m512 both = _mm512_add_ps(a, b);
    return add_up(_mm256_add_ps(_mm512_castps512_ps256(both), _mm512_extractf32x8_ps(both, 1)));
}

// 16 floats to `out`, rounded to nearest even; `count` of them.
inline void store_values(__m512 values, Dtype dtype, void* out, int64_t at, int count) {
    const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1);
    if (dtype == Dtype::float32) {
        _mm512_mask_storeu_ps(static_cast<float*>(out) + at, mask, values);
        return;
    }
    __m256i halves;
    if (dtype == Dtype::float16) {
        halves = _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    } else {  // a weight is never NaN
        const __m512i bits = _mm512_castps_si512(values), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7FFF));
        halves = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
    }
    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(out) + at, mask, halves);
}

// Twin of dequantize.
inline void dequantize_512(const Weight& weight, int64_t begin, int64_t end, Dtype dtype, void* out) {
    const int size = weight.group_size, pieces = size < 16 ? 1 : size / 16, length = unit_size(size);
    const int64_t row_bytes = weight.in_features * (dtype == Dtype::float32 ? 4 : 2);
    std::memset(out, 0, static_cast<size_t>((end - begin) * row_bytes));
    const __m512 code_values = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    int64_t group = weight.crow_indices[begin];
    for (int64_t row = begin; row < end; ++row) {
        const uint8_t* mask = weight.group_mask + row * weight.mask_stride;
        for (int64_t byte = 0; byte < weight.mask_stride; ++byte) {
            for (uint32_t bits = mask[byte]; bits; bits &= bits - 1, ++group) {
                const uint16_t word = weight.scale_zero[group];
                const __m512 scale = scales_of(_mm256_set1_epi16(static_cast<short>(word)));
                const __m512 zero = _mm512_set1_ps(static_cast<float>(word & 15));
                int64_t at = (row - begin) * weight.in_features + (byte * 8 + lowest_bit(bits)) * size;
                for (int piece = 0; piece < pieces; ++piece, at += 16) {
                    const int64_t unit = size < 16 ? group / 2 : group * pieces + piece;
                    const uint16_t* words = weight.words + (unit >> 3) * 32 + (unit & 1) * 16;
                    const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words));
                    const __m128i shift = _mm_cvtsi32_si128(static_cast<int>(4 * (unit >> 1 & 3)));
                    const __m512i codes = _mm512_srl_epi32(_mm512_cvtepu16_epi32(packed), shift);
                    __m512 values = _mm512_permutexvar_ps(codes, code_values);
                    values = _mm512_mul_ps(_mm512_sub_ps(values, zero), scale);
                    if (size < 16 && group & 1) values = _mm512_shuffle_f32x4(values, values, 0x4E);
                    store_values(values, dtype, out, at, length);
                }
            }
        }
    }
}

inline bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

}  // namespace
}  // namespace gqsa::cpu
