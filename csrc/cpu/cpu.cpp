// The C interface of the CPU kernels, for ctypes: no header of torch or Python, no OpenMP of its own. Pointers and sizes
// are trusted: vllm_gqsa/kernels/cpu.py checks them.
#include <algorithm>
#include <cmath>
#include <new>
#include <vector>

#include "../common/parallel.h"
#include "../common/partition.h"
#include "rows.h"

namespace gqsa::cpu {
namespace {

constexpr int64_t kRowCost = 8;       // what a row costs beside its groups, in groups
constexpr int64_t kRowMultiple = 32;  // rows of bfloat16 in a cache line
constexpr int64_t kShareWork = 4096;  // groups times tokens below which another thread does not pay

const Kernel* const kKernels[] = {
    &portable,
#if defined(__x86_64__)
    &avx2, &avx512, &avx512_bf16, &avx512_vnni,
#endif
};

// Memory that begins with a cache line: vectors that cross two lines cost twice as much to load.
template <class T>
struct Aligned {
    using value_type = T;
    T* allocate(size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t{64})); }
    void deallocate(T* memory, size_t) { ::operator delete(memory, std::align_val_t{64}); }
    friend bool operator==(Aligned, Aligned) { return true; }
    friend bool operator!=(Aligned, Aligned) { return false; }
};

// The tokens of `call` from [tokens, in_features] to [in_features / length + 1, padded_tokens, length], the rest `zero`.
template <class T>
std::vector<T, Aligned<T>> arrange(const Call& call, const T* x, int64_t stride, T zero) {
    const int64_t in_features = call.weight.in_features, length = unit_size(call.weight.group_size);
    std::vector<T, Aligned<T>> out(static_cast<size_t>((in_features + length) * call.padded_tokens), zero);
    T* at = out.data();
    for (int64_t k = 0; k < in_features; k += length, at += call.padded_tokens * length) {
        for (int64_t m = 0; m < call.tokens; ++m) std::copy_n(x + m * stride + k, length, at + m * length);
    }
    return out;
}

std::vector<float> to_floats(const void* x, Dtype dtype, int64_t stride, int64_t tokens, int64_t in_features) {
    std::vector<float> out(static_cast<size_t>(tokens * in_features));
    for (int64_t m = 0; m < tokens; ++m) {
        for (int64_t k = 0; k < in_features; ++k) out[m * in_features + k] = load(x, dtype, m * stride + k);
    }
    return out;
}

// To int8 plus 128, with one scale a token; a token that is not finite gets a scale of NaN.
std::vector<uint8_t> to_bytes(const std::vector<float>& x, int64_t tokens, float* scales) {
    const size_t in_features = x.size() / tokens;
    std::vector<uint8_t> out(x.size());
    for (int64_t m = 0; m < tokens; ++m) {
        const float* row = x.data() + m * in_features;
        float largest = 0;
        bool finite = true;
        for (size_t k = 0; k < in_features; ++k) {
            largest = std::max(largest, std::abs(row[k]));
            finite = finite && std::isfinite(row[k]);
        }
        scales[m] = finite ? largest / 127 : NAN;
        const float inverse = finite && largest > 0 ? 127 / largest : 0;
        for (size_t k = 0; k < in_features; ++k) {
            const float value = finite ? row[k] * inverse : 0;
            out[m * in_features + k] = static_cast<uint8_t>(value + 128.5f);
        }
    }
    return out;
}

void multiply(const Kernel& kernel, const Call& call, int64_t threads, ParallelFor parallel_for) {
    const Weight& weight = call.weight;
    const int64_t groups = weight.crow_indices[weight.rows] - weight.crow_indices[0];
    const int64_t work = (groups + weight.rows * kRowCost) * call.tokens;
    const int64_t shares = std::clamp<int64_t>(work / kShareWork, 1, threads);
    in_parallel(parallel_for, shares, [&](int64_t share) {
        const auto cut = [&](int64_t at) {
            return first_row(weight.crow_indices, weight.rows, shares, at, kRowMultiple, kRowCost);
        };
        std::vector<uint16_t> offsets(static_cast<size_t>(2 * offsets_size(weight.in_features)));
        kernel.multiply(call, cut(share), cut(share + 1), offsets.data());
    });
}

// One block of words from 64 bytes in the checkpoint's order, and back: see kernel.h.
void pack_block(const uint8_t* bytes, uint16_t* words) {
    for (int w = 0; w < 32; ++w) {
        const int half = w / 16, i = w % 16;
        uint32_t word = 0;
        for (int n = 0; n < 4; ++n) {
            const uint32_t code = bytes[(2 * n + half) * 8 + i / 2] >> (i % 2 * 4) & 15;
            word |= code << (4 * n);
        }
        words[w] = static_cast<uint16_t>(word);
    }
}

void unpack_block(const uint16_t* words, uint8_t* bytes) {
    std::fill_n(bytes, 64, uint8_t{0});
    for (int w = 0; w < 32; ++w) {
        const int half = w / 16, i = w % 16;
        for (int n = 0; n < 4; ++n) {
            bytes[(2 * n + half) * 8 + i / 2] |= static_cast<uint8_t>((words[w] >> (4 * n) & 15) << (i % 2 * 4));
        }
    }
}

}  // namespace
}  // namespace gqsa::cpu

using namespace gqsa::cpu;
using gqsa::in_parallel;
using gqsa::ParallelFor;

#pragma GCC visibility push(default)
extern "C" {

// Name of kernel `index`, ascending by what it demands of the processor; null past the last one.
const char* gqsa_cpu_kernel(int32_t index) {
    constexpr int32_t count = sizeof kKernels / sizeof *kKernels;
    return index >= 0 && index < count ? kKernels[index]->name : nullptr;
}

// Whether this processor can run it.
int32_t gqsa_cpu_supported(int32_t index) { return kKernels[index]->supported(); }

// y = x W^T + bias by kernel `index`; `dtype` is that of x, bias and y, strides are in elements, bias may be null.
void gqsa_cpu_linear(int32_t index, const Weight* weight, const void* x, int64_t x_stride, int64_t tokens,
                     int32_t dtype, const void* bias, void* y, int64_t threads, ParallelFor parallel_for) {
    const Kernel& kernel = *kKernels[index];
    const int64_t in_features = weight->in_features, size = dtype == 0 ? 4 : 2;
    const int64_t batches = (tokens + kMaxTokens - 1) / kMaxTokens;
    for (int64_t batch = 0; batch < batches; ++batch) {
        const int64_t first = tokens * batch / batches, count = tokens * (batch + 1) / batches - first;
        const char* from = static_cast<const char*>(x) + first * x_stride * size;
        char* to = static_cast<char*>(y) + first * weight->rows * size;
        const int64_t multiple = count > 1 ? kernel.token_multiple : 1;
        const int64_t padded = (count + multiple - 1) / multiple * multiple;
        Call call{*weight, nullptr, nullptr, count, padded, bias, to, weight->rows, Dtype{dtype}};
        if (kernel.operand == Operand::bfloat16) {
            const auto values = arrange(call, reinterpret_cast<const uint16_t*>(from), x_stride, uint16_t{0});
            call.x = values.data();
            multiply(kernel, call, threads, parallel_for);
        } else if (kernel.operand == Operand::int8) {
            float scales[kMaxTokens];
            const auto bytes = to_bytes(to_floats(from, call.dtype, x_stride, count, in_features), count, scales);
            const auto values = arrange(call, bytes.data(), in_features, uint8_t{128});
            call.x = values.data();
            call.x_scales = scales;
            multiply(kernel, call, threads, parallel_for);
        } else {
            const auto floats = to_floats(from, call.dtype, x_stride, count, in_features);
            const auto values = arrange(call, floats.data(), in_features, 0.0f);
            call.x = values.data();
            multiply(kernel, call, threads, parallel_for);
        }
    }
}

// Rows begin..end of the dense weight, to `out` [end - begin, in_features] of `dtype`.
void gqsa_cpu_dequantize(int32_t index, const Weight* weight, int64_t begin, int64_t end, int32_t dtype, void* out,
                         int64_t threads, ParallelFor parallel_for) {
    const int64_t shares = std::clamp<int64_t>(end - begin, 1, threads);
    const int64_t row_size = weight->in_features * (dtype == 0 ? 4 : 2);
    in_parallel(parallel_for, shares, [&](int64_t share) {
        const int64_t from = begin + gqsa::share_begin(end - begin, shares, share);
        const int64_t to = begin + gqsa::share_begin(end - begin, shares, share + 1);
        char* at = static_cast<char*>(out) + (from - begin) * row_size;
        kKernels[index]->dequantize(*weight, from, to, Dtype{dtype}, at);
    });
}

// Rows ids[0..count) of the dense weight, to `out` [count, in_features] of `dtype`.
void gqsa_cpu_look_up(int32_t index, const Weight* weight, const int64_t* ids, int64_t count, int32_t dtype, void* out,
                      int64_t threads, ParallelFor parallel_for) {
    const int64_t shares = std::clamp<int64_t>(count, 1, threads);
    const int64_t row_size = weight->in_features * (dtype == 0 ? 4 : 2);
    in_parallel(parallel_for, shares, [&](int64_t share) {
        const int64_t end = gqsa::share_begin(count, shares, share + 1);
        for (int64_t i = gqsa::share_begin(count, shares, share); i < end; ++i) {
            char* at = static_cast<char*>(out) + i * row_size;
            kKernels[index]->dequantize(*weight, ids[i], ids[i] + 1, Dtype{dtype}, at);
        }
    });
}

// Fills group_mask, words and scale_zero of `target` (whose pointers may be written to) from a matrix in the
// checkpoint's order, `qweight` being [nnz, group_size / 2]. Every thread writes the rows that it will multiply by, so
// that their memory lies on its NUMA node.
void gqsa_cpu_pack(const Weight* target, const uint8_t* group_mask, const uint8_t* qweight, const uint16_t* scale_zero,
                   int64_t threads, ParallelFor parallel_for) {
    const Weight& weight = *target;
    const int32_t* crow_indices = weight.crow_indices;
    const int64_t row_bytes = weight.group_size / 2, bytes = crow_indices[weight.rows] * row_bytes;
    in_parallel(parallel_for, threads, [&](int64_t share) {
        const auto cut = [&](int64_t at) {
            return gqsa::first_row(crow_indices, weight.rows, threads, at, kRowMultiple, kRowCost);
        };
        const int64_t begin = cut(share), end = cut(share + 1);
        const int64_t stride = weight.mask_stride, first = crow_indices[begin], last = crow_indices[end];
        std::copy_n(group_mask + begin * stride, (end - begin) * stride,
                    const_cast<uint8_t*>(weight.group_mask) + begin * stride);
        std::copy_n(scale_zero + first, last - first, const_cast<uint16_t*>(weight.scale_zero) + first);
        // A block on the border of two shares belongs to the one that it begins in.
        for (int64_t at = (first * row_bytes + 63) / 64 * 64; at < last * row_bytes; at += 64) {
            uint8_t block[64] = {};
            std::copy_n(qweight + at, std::min<int64_t>(64, bytes - at), block);
            pack_block(block, const_cast<uint16_t*>(weight.words) + at / 2);
        }
    });
}

// The inverse: qweight [nnz, group_size / 2] of `bytes` bytes from words.
void gqsa_cpu_unpack(const uint16_t* words, int64_t bytes, uint8_t* qweight) {
    for (int64_t at = 0; at < bytes; at += 64) {
        uint8_t block[64];
        unpack_block(words + at / 2, block);
        std::copy_n(block, std::min<int64_t>(64, bytes - at), qweight + at);
    }
}

// First row of every one of `shares` shares, and the number of rows: what each thread multiplies by.
void gqsa_cpu_partition(const int32_t* crow_indices, int64_t rows, int64_t shares, int64_t* first_rows) {
    for (int64_t share = 0; share <= shares; ++share) {
        first_rows[share] = gqsa::first_row(crow_indices, rows, shares, share, kRowMultiple, kRowCost);
    }
}

}  // extern "C"
#pragma GCC visibility pop
