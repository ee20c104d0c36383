// AVX-512 with VNNI and VBMI: activations rounded to int8, one scale a token; the sums over four inputs are integers.
// Compiled with -mavx512{f,bw,dq,vl,vnni,vbmi,vbmi2} -mbmi2. Group sizes from 16 on.
#include "avx512.h"

namespace gqsa::cpu {
namespace {

// Low nibbles (pair = 0) or high ones (1) of a block: byte 2 w + odd is code w % 16 of unit 2 * pair + 4 * odd + half.
// The units of the four 128-bit lanes after sorting: 2 * pair, + 1, + 4, + 5.
constexpr int unit_of_lane(int block, int pair, int lane) { return block * 8 + 2 * pair + (lane & 1) + 4 * (lane >> 1); }

constexpr Lanes<uint8_t> sorted_bytes() {
    Lanes<uint8_t> lanes{};
    for (int i = 0; i < 64; ++i) {
        const int lane = i / 16, half = lane & 1, odd = lane >> 1;
        lanes.value[i] = static_cast<uint8_t>(half * 32 + 2 * (i % 16) + odd);
    }
    return lanes;
}

constexpr Lanes<uint8_t> zero_point_bytes(int block, int pair) {
    Lanes<uint8_t> lanes{};
    for (int i = 0; i < 64; ++i) lanes.value[i] = static_cast<uint8_t>(2 * unit_of_lane(block, pair, i / 16));
    return lanes;
}

constexpr Lanes<uint32_t> units(int block, int pair) {
    Lanes<uint32_t> lanes{};
    for (int i = 0; i < 16; ++i) lanes.value[i] = static_cast<uint32_t>(unit_of_lane(block, pair, i / 4));
    return lanes;
}

constexpr Lanes<uint8_t> kSorted = sorted_bytes();
constexpr Lanes<uint8_t> kZeroPoint[2][2] = {{zero_point_bytes(0, 0), zero_point_bytes(0, 1)},
                                             {zero_point_bytes(1, 0), zero_point_bytes(1, 1)}};
constexpr Lanes<uint32_t> kUnits[2][2] = {{units(0, 0), units(0, 1)}, {units(1, 0), units(1, 1)}};

struct Multiply {
    template <int G, int Tokens>
    static GQSA_INLINE void run(const Call& call, const Row& row, int64_t token, float* sums) {
        const Weight& weight = call.weight;
        const char* x = static_cast<const char*>(call.x) + token * 16;
        const int64_t bytes = bytes_per_offset<Tokens, uint8_t>(call);
        const __m512i nibble = _mm512_set1_epi8(15), middle = _mm512_set1_epi8(static_cast<char>(128));
        __m512 totals[2][Tokens];
        for (auto& total : totals) {
            for (__m512& lanes : total) lanes = _mm512_setzero_ps();
        }
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
                    const __m512i mixed = _mm512_and_si512(pair ? _mm512_srli_epi16(codes, 4) : codes, nibble);
                    const __m512i code = _mm512_permutexvar_epi8(_mm512_load_si512(&kSorted), mixed);
                    const __m512i zero = _mm512_permutexvar_epi8(_mm512_load_si512(&kZeroPoint[block][pair]), zeros);
                    const __m512i w = _mm512_sub_epi8(code, zero);
                    const __m512 scale = _mm512_permutexvar_ps(_mm512_load_si512(&kUnits[block][pair]), scales);
                    // The instruction wants one operand unsigned: x + 128, and 128 * w is taken off again.
                    const __m512i start = _mm512_sub_epi32(_mm512_setzero_si512(),
                                                           _mm512_dpbusd_epi32(_mm512_setzero_si512(), middle, w));
                    const uint16_t* at = offsets + block * 8 + 2 * pair;
#pragma GCC unroll 8
                    for (int m = 0; m < Tokens; ++m) {
                        const char* xm = x + m * 16;
                        __m512i both = _mm512_castsi128_si512(load(xm + at[0] * bytes));
                        both = _mm512_mask_broadcast_i32x4(both, 0x00F0, load(xm + at[1] * bytes));
                        both = _mm512_mask_broadcast_i32x4(both, 0x0F00, load(xm + at[4] * bytes));
                        both = _mm512_mask_broadcast_i32x4(both, 0xF000, load(xm + at[5] * bytes));
                        const __m512 products = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(start, both, w));
                        totals[pair][m] = _mm512_fmadd_ps(products, scale, totals[pair][m]);
                    }
                }
            }
        });
        for (int m = 0; m < Tokens; ++m) {
            const float total = add_up(totals[0][m], totals[1][m]);
            sums[m] = total * call.x_scales[token + m];
        }
    }

    static __m128i load(const char* x) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(x)); }
};

void multiply(const Call& call, int64_t begin, int64_t end, uint16_t* offsets) {
    for_group_size(call.weight.group_size, [&](auto size) {
        if constexpr (size >= 16) for_rows<Multiply, size>(call, begin, end, offsets, AppendOffsets512<size>{});
    });
}

bool supported() {
    return has_avx512() && has_vbmi() && __builtin_cpu_supports("avx512vnni");
}

}  // namespace

const Kernel avx512_vnni{"avx512_vnni", supported, Operand::int8, 1, multiply, dequantize_512};

}  // namespace gqsa::cpu
