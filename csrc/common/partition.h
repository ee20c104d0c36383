// How work is cut into shares: the one function behind CPU threads and, on a GPU, Stream-K blocks.
#pragma once

#include <cstdint>

// Marks what both processors call.
#ifdef __CUDACC__
#define GQSA_BOTH __host__ __device__
#else
#define GQSA_BOTH
#endif

namespace gqsa {

// First unit of share `share` when `total` units are cut into `shares` parts that differ by at most one unit.
// share_begin(total, shares, shares) is `total`.
template <class Int>
GQSA_BOTH inline Int share_begin(Int total, Int shares, Int share) {
    const Int each = total / shares, rest = total % shares;
    return each * share + (share < rest ? share : rest);
}

// The share that unit `unit` of `total` falls into; the inverse of share_begin. There are at least as many units as shares.
template <class Int>
GQSA_BOTH inline Int share_of(Int total, Int shares, Int unit) {
    const Int each = total / shares, rest = total % shares, longer = rest * (each + 1);
    return unit < longer ? unit / (each + 1) : rest + (unit - longer) / each;
}

// First row of share `share` when rows are cut so that every share has about the same number of kept groups. Whole
// rows only, and multiples of `multiple` rows, so that no two threads write to one cache line. A row costs
// `row_cost` groups on top of its own: without it, a thousand empty rows would count as nothing. The rows may be some of
// a larger matrix, whose pointers do not start at 0.
inline int64_t first_row(const int32_t* crow_indices, int64_t rows, int64_t shares, int64_t share, int64_t multiple,
                         int64_t row_cost) {
    if (share >= shares) return rows;
    const int64_t start = crow_indices[0];
    const int64_t target = share_begin(crow_indices[rows] - start + rows * row_cost, shares, share);
    int64_t low = 0, high = rows;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (crow_indices[middle] - start + middle * row_cost < target) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    const int64_t rounded = (low + multiple / 2) / multiple * multiple;
    return rounded < rows ? rounded : rows;
}

}  // namespace gqsa
