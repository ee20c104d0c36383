// What the CUDA kernels are given: the same for all of them, passed by value.
#pragma once

#include <cstdint>

namespace gqsa::cuda {

enum class Dtype : int32_t { float32 = 0, bfloat16 = 1, float16 = 2 };

// A weight in slabs: see csrc/common/slab.h.
struct Weight {
    const void* codes;
    const void* scale_zero;
    const void* columns;
    const uint32_t* heads;
    const int32_t* slab_ptr;
    const int32_t* rows;
    const int32_t* lanes;    // [out_features], place of each row in `rows`
    uint32_t* counters;      // [slabs], zero between launches
    int32_t records, slabs, out_features, in_features;
    int32_t group_size;      // as stored: 8, 16, 32 or 64
};

// A product y = x W^T + bias. Rows of x begin at multiples of 16 bytes.
struct Product {
    const void* x;
    const void* bias;        // [out_features] in the dtype of x, or null
    void* y;
    float* workspace;        // partial sums of slabs that several blocks share
    int64_t x_stride, y_stride;  // elements
    int32_t tokens;
    Dtype dtype;             // of x, bias and y
};

}  // namespace gqsa::cuda
