// What every CPU kernel is given, and the table of kernels.
//
// The codes are stored as 16-bit words, in blocks of 32 words (64 bytes) for 8 consecutive units. A unit is 16 weights:
// one kept group of G = 16, two of G = 8, a part of one of G = 32, 64 or 128. Units are counted over the whole matrix,
// so a row may begin in the middle of a block. Word i of half h of a block holds code i of the units h, 2 + h, 4 + h
// and 6 + h, the lowest four bits first. From this order vectors of every width unpack without crossing lanes. It is a
// permutation of the checkpoint's bytes: nothing is padded but the last block.
//
// Activations are prepared once a call as [K / b + 1][padded_tokens][b], b = min(G, 16): what one unit (or, for G = 8, one
// group) needs of all tokens is contiguous, and the last entry is zero, for the units of a block outside of the row.
#pragma once

#include <cstdint>

namespace gqsa::cpu {

enum class Dtype : int32_t { float32 = 0, bfloat16 = 1, float16 = 2 };
enum class Operand : int32_t { float32, bfloat16, int8 };  // what the activations are prepared as

constexpr int kMaxTokens = 16;   // tokens a call of Kernel::multiply, at most
constexpr int kTokenBlock = 8;   // tokens whose sums are kept in registers at a time, at most
// Numbers in the offsets of a row: its units, up to 15 before and 16 after them, and up to 64 that are written too many.
constexpr int64_t offsets_size(int64_t in_features) { return in_features / 8 + 31 + 64; }

struct Weight {
    const int32_t* crow_indices;   // [rows + 1]
    const uint8_t* group_mask;     // [rows, mask_stride]
    const uint16_t* words;         // [blocks, 2, 16]
    const uint16_t* scale_zero;    // [nnz]
    int64_t rows;
    int64_t in_features;
    int64_t mask_stride;           // bytes
    int32_t group_size;
};

struct Call {
    Weight weight;
    const void* x;          // prepared activations
    const float* x_scales;  // [tokens], only for Operand::int8
    int64_t tokens;         // 1..kMaxTokens
    int64_t padded_tokens;  // in x: tokens, up to a multiple of Kernel::token_multiple
    const void* bias;       // [rows] in the dtype of y, or null
    void* y;                // [tokens, y_stride]
    int64_t y_stride;       // elements
    Dtype dtype;            // of bias and y
};

struct Kernel {
    const char* name;
    bool (*supported)();
    Operand operand;
    int token_multiple;  // what the number of tokens in x is rounded up to, if it is more than one
    // Rows begin..end of y; `offsets` is scratch memory for two rows, offsets_size(in_features) each.
    void (*multiply)(const Call&, int64_t begin, int64_t end, uint16_t* offsets);
    // Rows begin..end of the dense weight, to [end - begin, in_features].
    void (*dequantize)(const Weight&, int64_t begin, int64_t end, Dtype, void* out);
};

extern const Kernel portable;
#if defined(__x86_64__)
extern const Kernel avx2, avx512, avx512_bf16, avx512_vnni;
#endif

}  // namespace gqsa::cpu
