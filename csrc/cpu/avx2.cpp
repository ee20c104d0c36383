// AVX2 + FMA + F16C: float32 sums, exact weights. Compiled with -mavx2 -mfma -mf16c.
#include "avx.h"

namespace gqsa::cpu {
namespace {

// weight = scale * code + shift for the 16 units of a chunk, 0 for those outside of [begin, end).
template <int G>
void load_scales(const uint16_t* scale_zero, int64_t chunk, int64_t begin, int64_t end, float* scales, float* shifts) {
    constexpr int parts = units_per_group(G);
    alignas(32) uint16_t words[16];
    const int64_t first = chunk * 16;
    if (parts == 1 && first >= begin && first + 16 <= end) {
        std::memcpy(words, scale_zero + first, sizeof words);
    } else {
        for (int i = 0; i < 16; ++i) {
            const bool inside = first + i >= begin && first + i < end;
            words[i] = inside ? scale_zero[(first + i) / parts] : 0;
        }
    }
    for (int i = 0; i < 16; i += 8) {
        const __m128i word = _mm_loadu_si128(reinterpret_cast<const __m128i*>(words + i));
        const __m128i half = _mm_srli_epi16(_mm_and_si128(word, _mm_set1_epi16(static_cast<short>(0xFFF0))), 1);
        const __m256 scale = _mm256_cvtph_ps(half);
        const __m256i zero = _mm256_cvtepu16_epi32(_mm_and_si128(word, _mm_set1_epi16(15)));
        _mm256_storeu_ps(scales + i, scale);
        _mm256_storeu_ps(shifts + i, _mm256_fnmadd_ps(scale, _mm256_cvtepi32_ps(zero), _mm256_setzero_ps()));
    }
}

struct Multiply {
    template <int G, int Tokens>
    static GQSA_INLINE void run(const Call& call, const Row& row, int64_t token, float* sums) {
        constexpr int length = unit_size(G), chunk_blocks = G < 16 ? 1 : 2;
        const Weight& weight = call.weight;
        const char* x = static_cast<const char*>(call.x) + token * length * sizeof(float);
        const int64_t bytes = bytes_per_offset<Tokens, float>(call);
        __m256 low[Tokens], high[Tokens];
        for (int m = 0; m < Tokens; ++m) low[m] = high[m] = _mm256_setzero_ps();
        const uint16_t* offsets = row.offsets;
        for (int64_t chunk = row.begin >> 4; chunk << 4 < row.end; ++chunk, offsets += 16) {
            alignas(32) float scales[16], shifts[16];
            load_scales<G>(weight.scale_zero, chunk, row.begin, row.end, scales, shifts);
            for (int block = 0; block < chunk_blocks; ++block) {
                const uint16_t* words = weight.words + (chunk * chunk_blocks + block) * 32;
                if (G >= 16 && !row.touches(chunk * 16 + block * 8)) continue;
                fetch(words, kCodesAhead);
                for (int half = 0; half < 2; ++half) {
                    const __m128i* codes = reinterpret_cast<const __m128i*>(words + half * 16);
                    const __m256i first = _mm256_cvtepu16_epi32(_mm_loadu_si128(codes));
                    const __m256i second = _mm256_cvtepu16_epi32(_mm_loadu_si128(codes + 1));
#pragma GCC unroll 4
                    for (int n = 0; n < 4; ++n) {
                        const int unit = block * 8 + 2 * n + half;
                        // For G = 8 the two halves of a unit are groups with scales and inputs of their own.
                        const int a = G < 16 ? 2 * unit : unit, b = G < 16 ? 2 * unit + 1 : unit;
                        const __m256i mask = _mm256_set1_epi32(15);
                        const __m256 code_a = _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(first, 4 * n), mask));
                        const __m256 code_b = _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(second, 4 * n), mask));
                        const __m256 weight_a =
                            _mm256_fmadd_ps(code_a, _mm256_broadcast_ss(scales + a), _mm256_broadcast_ss(shifts + a));
                        const __m256 weight_b =
                            _mm256_fmadd_ps(code_b, _mm256_broadcast_ss(scales + b), _mm256_broadcast_ss(shifts + b));
                        const float* x_a = reinterpret_cast<const float*>(x + offsets[a] * bytes);
                        const float* x_b = reinterpret_cast<const float*>(x + offsets[b] * bytes) + (G < 16 ? 0 : 8);
#pragma GCC unroll 8
                        for (int m = 0; m < Tokens; ++m) {
                            low[m] = _mm256_fmadd_ps(weight_a, _mm256_loadu_ps(x_a + m * length), low[m]);
                            high[m] = _mm256_fmadd_ps(weight_b, _mm256_loadu_ps(x_b + m * length), high[m]);
                        }
                    }
                }
            }
        }
        for (int m = 0; m < Tokens; ++m) sums[m] = add_up(_mm256_add_ps(low[m], high[m]));
    }
};

void multiply(const Call& call, int64_t begin, int64_t end, uint16_t* offsets) {
    for_group_size(call.weight.group_size, [&](auto size) {
        for_rows<Multiply, size>(call, begin, end, offsets, AppendOffsetsAvx<size>{});
    });
}

bool supported() {
    // F16C is older than AVX2, and clang knows no name for it here.
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

}  // namespace

const Kernel avx2{"avx2", supported, Operand::float32, 1, multiply, dequantize};

}  // namespace gqsa::cpu
