// Shared by the AVX-512 kernels. Unnamed namespace, see numbers.h.
#pragma once

#include <cstdlib>

#include "avx.h"

namespace gqsa::cpu {
namespace {

// A vector's worth of constants.
template <class T>
struct alignas(64) Lanes {
    T value[64 / sizeof(T)];
};

#ifdef __AVX512VBMI2__
constexpr Lanes<uint16_t> offsets_of_first() {
    Lanes<uint16_t> lanes{};
    for (int unit = 0; unit < 32; ++unit) lanes.value[unit] = static_cast<uint16_t>(unit * 8);
    return lanes;
}

constexpr Lanes<uint16_t> kFirstOffsets = offsets_of_first();

// Twin of AppendOffsets for G >= 16, 32 units at a time.
template <int G>
struct AppendOffsets512 {
    GQSA_INLINE uint16_t* operator()(const Weight& weight, int64_t row, uint16_t* out) const {
        constexpr int parts = units_per_group(G), groups = 32 / parts;
        constexpr uint32_t first_units = 0xFFFFFFFF / ((uint64_t{1} << parts) - 1);  // a bit in every `parts`
        const uint8_t* mask = weight.group_mask + row * weight.mask_stride;
        __m512i offset = _mm512_load_si512(&kFirstOffsets);
        const auto add = [&](uint32_t kept) GQSA_INLINE_LAMBDA {  // bits for 32 groups
#pragma GCC unroll 8
            for (int from = 0; from < 32; from += groups) {
                const uint32_t units =
                    parts == 1 ? kept : _pdep_u32(kept >> from, first_units) * ((1u << parts) - 1);
                _mm512_storeu_si512(out, _mm512_maskz_compress_epi16(units, offset));
                out += __builtin_popcount(units);
                offset = _mm512_add_epi16(offset, _mm512_set1_epi16(32 * 8));
            }
        };
        const auto load = [&](int64_t byte) GQSA_INLINE_LAMBDA {
            uint32_t kept;
            std::memcpy(&kept, mask + byte, sizeof kept);
            return kept;
        };
        const int64_t rest = weight.mask_stride & 3, whole = weight.mask_stride - rest;
        for (int64_t byte = 0; byte < whole; byte += 4) add(load(byte));
        if (rest && whole) {  // some of the bytes before once more, since none may be read behind
            add(load(weight.mask_stride - 4) >> (32 - 8 * rest));
        } else if (rest) {
            add(mask[0] | (rest > 1 ? mask[1] << 8 : 0) | (rest > 2 ? mask[2] << 16 : 0));
        }
        return out;
    }
};
#endif

inline uint32_t ones(int64_t from, int64_t to) {  // bits from..to - 1 of 16, clamped
    const auto below = [](int64_t bit) {
        const int64_t positive = bit < 0 ? 0 : bit;
        return (1u << (positive > 16 ? 16 : positive)) - 1;
    };
    return below(to) & ~below(from);
}

// 2, 4, 8 or 16 words of 16 bits, the first in the lowest lane; the lanes behind them hold anything.
template <int count>
inline __m256i load_words(const uint16_t* from) {
    if constexpr (count == 16) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    } else if constexpr (count == 8) {
        return _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    } else if constexpr (count == 4) {
        return _mm256_castsi128_si256(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
    } else {
        int32_t both;
        std::memcpy(&both, from, sizeof both);
        return _mm256_castsi128_si256(_mm_cvtsi32_si128(both));
    }
}

// The 16-bit words of the 16 units of a chunk, 0 for those outside of the row: scale 0 and zero point 0.
template <int G, bool whole, int Tokens>
inline __m256i load_scale_zero(const Weight& weight, int64_t chunk, const Row& row) {
    constexpr int parts = units_per_group(G), groups = 16 / parts;
    const int64_t first = chunk * groups;
    const uint16_t* from = weight.scale_zero + first;
    // With one token the hardware keeps up by itself, and is slower when it is helped.
    if (Tokens > 1) fetch(from, kScalesAhead);
    __m256i words;
    if constexpr (whole) {
        words = load_words<groups>(from);
    } else {
        // A row begins and ends with a whole group. Masked loads of what is not in a cache are slow, so there is one only
        // where the matrix ends.
        const auto inside = static_cast<__mmask16>(ones(row.begin / parts - first, row.end / parts - first));
        words = first + groups <= weight.crow_indices[weight.rows]
                    ? _mm256_maskz_mov_epi16(inside, load_words<groups>(from))
                    : _mm256_maskz_loadu_epi16(inside, from);
    }
    if constexpr (parts == 1) {
        return words;
    } else {
        const __m256i lane = _mm256_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        return _mm256_permutexvar_epi16(_mm256_srli_epi16(lane, parts == 2 ? 1 : parts == 4 ? 2 : 3), words);
    }
}

// Calls add(whole, chunk, offsets) for every chunk of a row; `whole`, known when compiled, says that all 16 units are the
// row's and need no mask.
template <class Add>
GQSA_INLINE void for_chunks(const Row& row, Add add) {
    const uint16_t* offsets = row.offsets;
    for (int64_t chunk = row.begin >> 4; chunk << 4 < row.end; ++chunk, offsets += 16) {
        if (row.holds_chunk(chunk)) {
            add(std::true_type{}, chunk, offsets);
        } else {
            add(std::false_type{}, chunk, offsets);
        }
    }
}

inline __m512 join(__m256 low, __m256 high) { return _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1); }
inline __m512 join(float low, float high) { return join(_mm256_set1_ps(low), _mm256_set1_ps(high)); }

inline __m512 scales_of(__m256i scale_zero) {
    const __m256i bits = _mm256_and_si256(scale_zero, _mm256_set1_epi16(static_cast<short>(0xFFF0)));
    return _mm512_cvtph_ps(_mm256_srli_epi16(bits, 1));
}

inline float add_up(__m512 a, __m512 b) {
    const __m512 both = _mm512_add_ps(a, b);
    return add_up(_mm256_add_ps(_mm512_castps512_ps256(both), _mm512_extractf32x8_ps(both, 1)));
}

// Stores floats as `dtype`, rounded to nearest even: 16 of them, or 8 and 8 where the group size is 8.
template <int G, Dtype dtype>
inline void store_unit(__m512 values, char* first, char* second) {
    if constexpr (dtype == Dtype::float32) {
        if constexpr (G < 16) {
            _mm256_storeu_ps(reinterpret_cast<float*>(first), _mm512_castps512_ps256(values));
            _mm256_storeu_ps(reinterpret_cast<float*>(second), _mm512_extractf32x8_ps(values, 1));
        } else {
            _mm512_storeu_ps(first, values);
        }
    } else {
        __m256i halves;
        if constexpr (dtype == Dtype::float16) {
            halves = _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        } else {  // a weight is never NaN
            const __m512i bits = _mm512_castps_si512(values);
            const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
            const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7FFF));
            halves = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
        }
        if constexpr (G < 16) {
            _mm_storeu_si128(reinterpret_cast<__m128i*>(first), _mm256_castsi256_si128(halves));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(second), _mm256_extracti128_si256(halves, 1));
        } else {
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(first), halves);
        }
    }
}

template <int G, Dtype dtype>
inline void dequantize_rows_512(const Weight& weight, int64_t begin, int64_t end, char* out) {
    constexpr int parts = units_per_group(G), chunk_blocks = G < 16 ? 1 : 2, units_in_block = G < 16 ? 16 : 8;
    constexpr int64_t element = dtype == Dtype::float32 ? 4 : 2;
    const __m512 code_values = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const int64_t row_size = weight.in_features * element;
    // No std::vector: its code, made for these instructions, could be linked into files that are not.
    const size_t count = static_cast<size_t>(offsets_size(weight.in_features));
    uint16_t* const scratch = static_cast<uint16_t*>(std::malloc(count * sizeof(uint16_t)));
    alignas(64) char nowhere[64];  // for units of other rows
    for (int64_t r = begin; r < end; ++r, out += row_size) {
        std::memset(out, 0, static_cast<size_t>(row_size));
        const Row row{int64_t{weight.crow_indices[r]} * parts, int64_t{weight.crow_indices[r + 1]} * parts,
                      scratch};
        AppendOffsetsAvx<G>{}(weight, r, scratch + (row.begin & 15));
        for_chunks(row, [&](auto whole, int64_t chunk, const uint16_t* offsets) GQSA_INLINE_LAMBDA {
            alignas(64) float scales[16], zeros[16];
            const __m256i scale_zero = load_scale_zero<G, whole, 1>(weight, chunk, row);
            const __m512i zero = _mm512_and_si512(_mm512_cvtepu16_epi32(scale_zero), _mm512_set1_epi32(15));
            _mm512_store_ps(scales, scales_of(scale_zero));
            _mm512_store_ps(zeros, _mm512_cvtepi32_ps(zero));
            const auto target = [&](int unit) {
                const int64_t at = chunk * 16 + unit;
                return whole || (at >= row.begin && at < row.end) ? out + offsets[unit] * (2 * element) : nowhere;
            };
            for (int block = 0; block < chunk_blocks; ++block) {
                if (!whole && G >= 16 && !row.touches(chunk * 16 + block * units_in_block)) continue;
                const uint16_t* words = weight.words + (chunk * chunk_blocks + block) * 32;
                for (int half = 0; half < 2; ++half) {
                    const __m512i codes =
                        _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(words + half * 16)));
#pragma GCC unroll 4
                    for (int n = 0; n < 4; ++n) {
                        const int unit = block * 8 + 2 * n + half;
                        const int a = G < 16 ? 2 * unit : unit, b = G < 16 ? 2 * unit + 1 : unit;
                        const __m512 code = _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4 * n), code_values);
                        const __m512 scale = G < 16 ? join(scales[a], scales[b]) : _mm512_set1_ps(scales[a]);
                        const __m512 middle = G < 16 ? join(zeros[a], zeros[b]) : _mm512_set1_ps(zeros[a]);
                        store_unit<G, dtype>(_mm512_mul_ps(_mm512_sub_ps(code, middle), scale), target(a), target(b));
                    }
                }
            }
        });
    }
    std::free(scratch);
}

// Twin of dequantize.
inline void dequantize_512(const Weight& weight, int64_t begin, int64_t end, Dtype dtype, void* out) {
    char* bytes = static_cast<char*>(out);
    for_group_size(weight.group_size, [&](auto size) {
        switch (dtype) {
            case Dtype::bfloat16: return dequantize_rows_512<size, Dtype::bfloat16>(weight, begin, end, bytes);
            case Dtype::float16: return dequantize_rows_512<size, Dtype::float16>(weight, begin, end, bytes);
            default: return dequantize_rows_512<size, Dtype::float32>(weight, begin, end, bytes);
        }
    });
}

inline bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

inline bool has_vbmi() {
    return __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("bmi2");
}

}  // namespace
}  // namespace gqsa::cpu
