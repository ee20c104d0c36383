// AVX-512 (F, BW, DQ, VL): float32 sums, exact weights, any activations. Compiled with -mavx512{f,bw,dq,vl}.
#include "avx512.h"

namespace gqsa::cpu {
namespace {

struct Multiply {
    template <int G, int Tokens>
    static GQSA_INLINE void run(const Call& call, const Row& row, int64_t token, float* sums) {
        constexpr int length = unit_size(G), chunk_blocks = G < 16 ? 1 : 2;
        const Weight& weight = call.weight;
        const char* x = static_cast<const char*>(call.x) + token * length * sizeof(float);
        const int64_t bytes = bytes_per_offset<Tokens, float>(call);
        const __m512 code_values = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        __m512 totals[2][Tokens];
        for (auto& total : totals) {
            for (__m512& lanes : total) lanes = _mm512_setzero_ps();
        }
        for_chunks(row, [&](auto whole, int64_t chunk, const uint16_t* offsets) GQSA_INLINE_LAMBDA {
            // weight = scale * code + shift, without rounding
            alignas(64) float scales[16], shifts[16];
            const __m256i scale_zero = load_scale_zero<G, whole, Tokens>(weight, chunk, row);
            const __m512 scale = scales_of(scale_zero);
            const __m512i zero = _mm512_and_si512(_mm512_cvtepu16_epi32(scale_zero), _mm512_set1_epi32(15));
            _mm512_store_ps(scales, scale);
            _mm512_store_ps(shifts, _mm512_fnmadd_ps(scale, _mm512_cvtepi32_ps(zero), _mm512_setzero_ps()));
            for (int block = 0; block < chunk_blocks; ++block) {
                const uint16_t* words = weight.words + (chunk * chunk_blocks + block) * 32;
                if (G >= 16 && !whole && !row.touches(chunk * 16 + block * 8)) continue;
                fetch(words, kCodesAhead);
#pragma GCC unroll 2
                for (int half = 0; half < 2; ++half) {
                    const __m512i codes =
                        _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(words + half * 16)));
#pragma GCC unroll 4
                    for (int n = 0; n < 4; ++n) {
                        const int unit = block * 8 + 2 * n + half;
                        __m512* total = totals[half];
                        // The permutation looks at the lowest four bits only.
                        const __m512 code = _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4 * n), code_values);
                        if constexpr (G >= 16) {
                            const __m512 values =
                                _mm512_fmadd_ps(code, _mm512_set1_ps(scales[unit]), _mm512_set1_ps(shifts[unit]));
                            const float* xu = reinterpret_cast<const float*>(x + offsets[unit] * bytes);
#pragma GCC unroll 8
                            for (int m = 0; m < Tokens; ++m) {
                                total[m] = _mm512_fmadd_ps(values, _mm512_loadu_ps(xu + m * 16), total[m]);
                            }
                        } else {  // two groups, with scales and inputs of their own
                            const int a = 2 * unit, b = 2 * unit + 1;
                            const __m512 scale_ab = join(scales[a], scales[b]);
                            const __m512 shift_ab = join(shifts[a], shifts[b]);
                            const __m512 values = _mm512_fmadd_ps(code, scale_ab, shift_ab);
                            const float* xa = reinterpret_cast<const float*>(x + offsets[a] * bytes);
                            const float* xb = reinterpret_cast<const float*>(x + offsets[b] * bytes);
#pragma GCC unroll 8
                            for (int m = 0; m < Tokens; ++m) {
                                const __m512 xm = join(_mm256_loadu_ps(xa + m * 8), _mm256_loadu_ps(xb + m * 8));
                                total[m] = _mm512_fmadd_ps(values, xm, total[m]);
                            }
                        }
                    }
                }
            }
        });
        for (int m = 0; m < Tokens; ++m) sums[m] = add_up(totals[0][m], totals[1][m]);
    }
};

void multiply(const Call& call, int64_t begin, int64_t end, uint16_t* offsets) {
    for_group_size(call.weight.group_size, [&](auto size) {
        for_rows<Multiply, size>(call, begin, end, offsets, AppendOffsetsAvx<size>{});
    });
}

}  // namespace

const Kernel avx512{"avx512", has_avx512, Operand::float32, 1, multiply, dequantize_512};

}  // namespace gqsa::cpu
