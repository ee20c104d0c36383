// AVX-512 with BF16 and VBMI: bfloat16 activations times code - zero point, which bfloat16 holds exactly; the products
// are exact, the sums float32. Compiled with -mavx512{f,bw,dq,vl,bf16,vbmi,vbmi2} -mbmi2. Group sizes from 16 on.
#include "avx512.h"

namespace gqsa::cpu {
namespace {

// Low nibbles (pair = 0) or high ones (1) of a block: byte 2 w + odd belongs to unit 2 * pair + 4 * odd + half.
// For each byte, which byte of 16-bit scale_zero words holds the zero point of its unit.
constexpr Lanes<uint8_t> zero_point_bytes(int block, int pair) {
    Lanes<uint8_t> lanes{};
    for (int i = 0; i < 64; ++i) {
        const int half = i / 32, odd = i & 1;
        lanes.value[i] = static_cast<uint8_t>(2 * (block * 8 + 2 * pair + 4 * odd + half));
    }
    return lanes;
}

// For each float of a product, which unit of the chunk it belongs to: 8 of `unit`, 8 of the next.
constexpr Lanes<uint32_t> units_from(int unit) {
    Lanes<uint32_t> lanes{};
    for (int i = 0; i < 16; ++i) lanes.value[i] = static_cast<uint32_t>(unit + i / 8);
    return lanes;
}

// bfloat16 of the signed 5-bit numbers -16..15.
constexpr Lanes<uint16_t> five_bit_values() {
    const uint16_t powers[] = {0, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0, 0x4100,
                               0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170, 0x4180};  // 0..16
    Lanes<uint16_t> lanes{};
    for (int i = 0; i < 16; ++i) lanes.value[i] = powers[i];
    for (int i = 16; i < 32; ++i) lanes.value[i] = static_cast<uint16_t>(powers[32 - i] | 0x8000);
    return lanes;
}

constexpr Lanes<uint8_t> kZeroPoint[2][2] = {{zero_point_bytes(0, 0), zero_point_bytes(0, 1)},
                                             {zero_point_bytes(1, 0), zero_point_bytes(1, 1)}};
constexpr Lanes<uint32_t> kUnitPair[8] = {units_from(0), units_from(2),  units_from(4),  units_from(6),
                                          units_from(8), units_from(10), units_from(12), units_from(14)};
constexpr Lanes<uint16_t> kFiveBitValues = five_bit_values();

// One token: a vector of activations is 16 of one unit and 16 of the next. More tokens: 16 of one token and 16 of the
// next, for one unit, which halves the loads. The sums are the same, bit for bit: even and odd units add up separately.
struct Multiply {
    template <int G, int Tokens>
    static GQSA_INLINE void run(const Call& call, const Row& row, int64_t token, float* sums) {
        constexpr int pairs = Tokens / 2 + Tokens % 2;
        const Weight& weight = call.weight;
        const char* x = static_cast<const char*>(call.x) + token * 32;
        const int64_t bytes = bytes_per_offset<Tokens, uint16_t>(call);
        __m512i values = _mm512_load_si512(&kFiveBitValues), zero_point[2][2], unit_pair[8];
        const __m512i nibble = _mm512_set1_epi8(15);
        for (int i = 0; i < 4; ++i) zero_point[i / 2][i % 2] = _mm512_load_si512(&kZeroPoint[i / 2][i % 2]);
        for (int i = 0; i < 8; ++i) unit_pair[i] = _mm512_load_si512(&kUnitPair[i]);
        if (Tokens == 1) keep_in_registers(values, zero_point, unit_pair);
        __m512 one[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()}, even[2][pairs], odds[2][pairs];
        for (int p = 0; p < pairs; ++p) even[0][p] = even[1][p] = odds[0][p] = odds[1][p] = _mm512_setzero_ps();
        for_chunks(row, [&](auto whole, int64_t chunk, const uint16_t* offsets) GQSA_INLINE_LAMBDA {
            const __m256i scale_zero = load_scale_zero<G, whole, Tokens>(weight, chunk, row);
            const __m512 scales = scales_of(scale_zero);
            const __m512i zeros = _mm512_castsi256_si512(_mm256_and_si256(scale_zero, _mm256_set1_epi16(15)));
#pragma GCC unroll 2
            for (int block = 0; block < 2; ++block) {
                if (!whole && !row.touches(chunk * 16 + block * 8)) continue;
                const uint16_t* words = weight.words + (chunk * 2 + block) * 32;
                fetch(words, kCodesAhead);
                const __m512i codes = _mm512_loadu_si512(words);
#pragma GCC unroll 2
                for (int pair = 0; pair < 2; ++pair) {
                    // 64 bytes of code - zero point, for the units 2 * pair, + 1 (even bytes), + 4, + 5 (odd bytes)
                    const __m512i code = _mm512_and_si512(pair ? _mm512_srli_epi16(codes, 4) : codes, nibble);
                    const __m512i zero = _mm512_permutexvar_epi8(zero_point[block][pair], zeros);
                    const __m512i byte = _mm512_sub_epi8(code, zero);
#pragma GCC unroll 2
                    for (int odd = 0; odd < 2; ++odd) {
                        const int unit = block * 8 + 2 * pair + 4 * odd;
                        // The permutation looks at the lowest five bits of each 16 only.
                        const __m512i w = _mm512_permutexvar_epi16(odd ? _mm512_srli_epi16(byte, 8) : byte, values);
                        const char *first = x + offsets[unit] * bytes, *second = x + offsets[unit + 1] * bytes;
                        if constexpr (Tokens == 1) {
                            const __m512 scale = _mm512_permutexvar_ps(unit_pair[unit / 2], scales);
                            const __m512i low = _mm512_castsi256_si512(load256(first));
                            const __m512i both = _mm512_inserti64x4(low, load256(second), 1);
                            one[pair] = _mm512_fmadd_ps(dot(w, both), scale, one[pair]);
                        } else {
                            const __m512i w_even = _mm512_shuffle_i64x2(w, w, 0x44);
                            const __m512i w_odd = _mm512_shuffle_i64x2(w, w, 0xEE);
                            const __m512 scale_even = _mm512_permutexvar_ps(_mm512_set1_epi32(unit), scales);
                            const __m512 scale_odd = _mm512_permutexvar_ps(_mm512_set1_epi32(unit + 1), scales);
#pragma GCC unroll 4
                            for (int p = 0; p < pairs; ++p) {
                                const __m512 a = dot(w_even, _mm512_loadu_si512(first + p * 64));
                                even[pair][p] = _mm512_fmadd_ps(a, scale_even, even[pair][p]);
                                const __m512 b = dot(w_odd, _mm512_loadu_si512(second + p * 64));
                                odds[pair][p] = _mm512_fmadd_ps(b, scale_odd, odds[pair][p]);
                            }
                        }
                    }
                }
            }
        });
        if constexpr (Tokens == 1) {
            const __m512 both = _mm512_add_ps(one[0], one[1]);
            sums[0] = add_up(_mm256_add_ps(_mm512_castps512_ps256(both), _mm512_extractf32x8_ps(both, 1)));
        } else {
            for (int m = 0; m < Tokens; ++m) {
                const int p = m / 2;
                const __m512 a = _mm512_add_ps(even[0][p], even[1][p]), b = _mm512_add_ps(odds[0][p], odds[1][p]);
                const __m512 both = _mm512_add_ps(a, b);
                sums[m] = add_up(m % 2 ? _mm512_extractf32x8_ps(both, 1) : _mm512_castps512_ps256(both));
            }
        }
    }

    // The compiler would load these again and again: there are registers enough, and it makes an eighth of the time.
    static GQSA_INLINE void keep_in_registers(__m512i& values, __m512i (&zero_point)[2][2], __m512i (&unit_pair)[8]) {
        asm volatile("" : "+v"(values));
        for (auto& block : zero_point) asm volatile("" : "+v"(block[0]), "+v"(block[1]));
        for (__m512i& lanes : unit_pair) asm volatile("" : "+v"(lanes));
    }

    static __m256i load256(const char* x) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)); }

    static __m512 dot(__m512i w, __m512i x) {
        return _mm512_dpbf16_ps(_mm512_setzero_ps(), reinterpret_cast<__m512bh>(w), reinterpret_cast<__m512bh>(x));
    }
};

void multiply(const Call& call, int64_t begin, int64_t end, uint16_t* offsets) {
    for_group_size(call.weight.group_size, [&](auto size) {
        if constexpr (size >= 16) for_rows<Multiply, size>(call, begin, end, offsets, AppendOffsets512<size>{});
    });
}

bool supported() {
    return has_avx512() && has_vbmi() && __builtin_cpu_supports("avx512bf16");
}

}  // namespace

const Kernel avx512_bf16{"avx512_bf16", supported, Operand::bfloat16, 2, multiply, dequantize_512};

}  // namespace gqsa::cpu
