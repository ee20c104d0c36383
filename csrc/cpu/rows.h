// What the kernels of all instruction sets share: walking the kept groups of a row. Unnamed namespace, see numbers.h.
#pragma once

#include <type_traits>

#include "numbers.h"

#define GQSA_INLINE __attribute__((always_inline)) inline
#define GQSA_INLINE_LAMBDA __attribute__((always_inline))

namespace gqsa::cpu {
namespace {

// Units are counted in groups for G = 8, where the activations come in eights too.
constexpr int units_per_group(int group_size) { return group_size <= 16 ? 1 : group_size / 16; }
constexpr int unit_size(int group_size) { return group_size < 16 ? group_size : 16; }

inline int lowest_bit(uint32_t bits) { return __builtin_ctz(bits); }

// The set bits of every byte, the lowest first.
struct SetBits {
    alignas(8) uint8_t of[256][8];
};

constexpr SetBits set_bits() {
    SetBits bits{};
    for (int byte = 0; byte < 256; ++byte) {
        int count = 0;
        for (uint8_t bit = 0; bit < 8; ++bit) {
            if (byte >> bit & 1) bits.of[byte][count++] = bit;
        }
    }
    return bits;
}

constexpr SetBits kSetBits = set_bits();

// Appends the offsets of a row's units to `out`: half of the column that each begins with, so that 16 bits do. Eight groups
// at a time and without a branch, since which are kept is hard to foretell: up to 8 * units_per_group(G) numbers too many are
// written.
template <int G>
struct AppendOffsets {
    GQSA_INLINE uint16_t* operator()(const Weight& weight, int64_t row, uint16_t* out) const {
        constexpr int parts = units_per_group(G), step = unit_size(G) / 2;
        const uint8_t* mask = weight.group_mask + row * weight.mask_stride;
        for (int64_t byte = 0; byte < weight.mask_stride; ++byte) {
            const uint8_t* set = kSetBits.of[mask[byte]];
            for (int i = 0; i < 8; ++i) {
                const int64_t unit = (byte * 8 + set[i]) * parts;
                for (int part = 0; part < parts; ++part) {
                    out[i * parts + part] = static_cast<uint16_t>((unit + part) * step);
                }
            }
            out += __builtin_popcount(mask[byte]) * parts;
        }
        return out;
    }
};

// Bytes of prepared activations to each 1 of an offset. A single token is never one of several.
template <int Tokens, class Element>
GQSA_INLINE int64_t bytes_per_offset(const Call& call) {
    return static_cast<int64_t>(2 * sizeof(Element)) * (Tokens == 1 ? 1 : call.padded_tokens);
}

template <int G, class T, class Round>
inline void dequantize_row(const Weight& weight, int64_t row, T* out, Round round) {
    constexpr int pieces = G < 16 ? 1 : G / 16, length = unit_size(G);
    std::memset(out, 0, static_cast<size_t>(weight.in_features) * sizeof(T));
    const uint8_t* mask = weight.group_mask + row * weight.mask_stride;
    int64_t group = weight.crow_indices[row];
    for (int64_t byte = 0; byte < weight.mask_stride; ++byte) {
        for (uint32_t bits = mask[byte]; bits; bits &= bits - 1, ++group) {
            const uint16_t scale_zero = weight.scale_zero[group];
            const float scale = scale_of(scale_zero);
            const int zero = scale_zero & 15;
            T* target = out + (byte * 8 + lowest_bit(bits)) * G;
            for (int piece = 0; piece < pieces; ++piece, target += 16) {
                const int64_t unit = G < 16 ? group / 2 : group * pieces + piece;
                const int k = unit & 7, shift = 4 * (k >> 1);
                const uint16_t* words = weight.words + (unit >> 3) * 32 + (k & 1) * 16 + (G < 16 ? (group & 1) * 8 : 0);
                for (int i = 0; i < length; ++i) {
                    target[i] = round(scale * static_cast<float>((words[i] >> shift & 15) - zero));
                }
            }
        }
    }
}

template <int G>
inline void dequantize_rows(const Weight& weight, int64_t begin, int64_t end, Dtype dtype, void* out) {
    const int64_t k = weight.in_features;
    for (int64_t row = begin; row < end; ++row) {
        const int64_t at = (row - begin) * k;
        switch (dtype) {
            case Dtype::bfloat16: dequantize_row<G>(weight, row, static_cast<uint16_t*>(out) + at, to_bfloat16); break;
            case Dtype::float16: dequantize_row<G>(weight, row, static_cast<uint16_t*>(out) + at, to_float16); break;
            default: dequantize_row<G>(weight, row, static_cast<float*>(out) + at, [](float value) { return value; });
        }
    }
}

// Calls f(std::integral_constant<int, G>) for the group size at run time.
template <class F>
inline void for_group_size(int group_size, F f) {
    switch (group_size) {
        case 8: return f(std::integral_constant<int, 8>{});
        case 16: return f(std::integral_constant<int, 16>{});
        case 32: return f(std::integral_constant<int, 32>{});
        case 64: return f(std::integral_constant<int, 64>{});
        default: return f(std::integral_constant<int, 128>{});
    }
}

inline void dequantize(const Weight& weight, int64_t begin, int64_t end, Dtype dtype, void* out) {
    for_group_size(weight.group_size, [&](auto size) { dequantize_rows<size>(weight, begin, end, dtype, out); });
}

// Calls f(std::integral_constant<int, tokens>) for 1..kTokenBlock tokens.
template <class F>
inline void for_tokens(int64_t tokens, F f) {
    switch (tokens) {
        case 1: return f(std::integral_constant<int, 1>{});
        case 2: return f(std::integral_constant<int, 2>{});
        case 3: return f(std::integral_constant<int, 3>{});
        case 4: return f(std::integral_constant<int, 4>{});
        case 5: return f(std::integral_constant<int, 5>{});
        case 6: return f(std::integral_constant<int, 6>{});
        case 7: return f(std::integral_constant<int, 7>{});
        default: return f(std::integral_constant<int, 8>{});
    }
}

// A row of the weight: its units [begin, end), counted over the whole matrix, and the offsets of the 16 units of each chunk
// that it touches; those of units outside of the row lead to zeros.
struct Row {
    int64_t begin, end;
    const uint16_t* offsets;

    bool holds_chunk(int64_t chunk) const { return chunk * 16 >= begin && chunk * 16 + 16 <= end; }
    // Whether any of the eight units from `first` on is the row's.
    bool touches(int64_t first) const { return first < end && first + 8 > begin; }
};

// Rows begin..end for the tokens from `token` on: Multiply::run<G, Tokens>(call, row, first token, sums). One row after
// the other: with several in turn, memory is read in more places at once, and up to three times as slowly. Never inlined:
// the code for all numbers of tokens in one function would spill registers.
template <class Multiply, int G, int Tokens, class Append>
__attribute__((noinline)) void run_rows(const Call& call, int64_t begin, int64_t end, int64_t token, uint16_t* offsets,
                                        Append append) {
    const Weight& weight = call.weight;
    const uint16_t zeros = static_cast<uint16_t>(weight.in_features / 2);
    const auto offsets_of = [&](int64_t r, uint16_t* at) GQSA_INLINE_LAMBDA {
        const Row row{int64_t{weight.crow_indices[r]} * units_per_group(G),
                      int64_t{weight.crow_indices[r + 1]} * units_per_group(G), at};
        // As many as there may be: a loop that ends sooner or later is one more branch that is hard to foretell.
        for (int before = 0; before < 16; ++before) at[before] = zeros;
        at = append(weight, r, at + (row.begin & 15));
        for (int after = 0; after < 16; ++after) at[after] = zeros;
        return row;
    };
    // A row's offsets are made before the row in front of it is multiplied, so that none are read just after.
    uint16_t* const buffers[2] = {offsets, offsets + offsets_size(weight.in_features)};
    Row next{};
    if (begin < end) next = offsets_of(begin, buffers[begin & 1]);
    for (int64_t r = begin; r < end; ++r) {
        const Row row = next;
        if (r + 1 < end) next = offsets_of(r + 1, buffers[(r + 1) & 1]);
        float sums[Tokens];
        Multiply::template run<G, Tokens>(call, row, token, sums);
        for (int m = 0; m < Tokens; ++m) store_sum(call, r, token + m, sums[m]);
    }
}

// Runs Multiply for all rows and tokens; `append` is an AppendOffsets or a faster twin.
template <class Multiply, int G, class Append>
inline void for_rows(const Call& call, int64_t begin, int64_t end, uint16_t* offsets, Append append) {
    if (call.tokens <= kTokenBlock) {
        for_tokens(call.tokens, [&](auto tokens) {
            run_rows<Multiply, G, tokens>(call, begin, end, 0, offsets, append);
        });
        return;
    }
    // Two blocks of about the same size, the first one even: 9 are 4 and 5. Row by row, so that the second finds the
    // row's codes in the first cache.
    static_assert(kMaxTokens == 2 * kTokenBlock);
    const int64_t first = (call.tokens / 2 + 1) / 2 * 2;
    for (int64_t r = begin; r < end; ++r) {
        const auto run_block = [&](int64_t token, int64_t count) {
            for_tokens(count, [&](auto tokens) {
                run_rows<Multiply, G, tokens>(call, r, r + 1, token, offsets, append);
            });
        };
        run_block(0, first);
        run_block(first, call.tokens - first);
    }
}

}  // namespace
}  // namespace gqsa::cpu
