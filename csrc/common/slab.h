// The layout that the CUDA kernels read: "slabs" of 32 rows, one row a lane of a warp.
//
// Rows are sorted by their number of kept groups, longest first, within each run of kSortRows rows, and cut into slabs
// of 32. A slab is a sequence of records, and a record holds kRecordWeights kept weights of every one of its 32 rows, so
// 64 / G groups a lane (groups of 128 are stored as two of 64). All loads of a warp are whole, aligned and contiguous:
//
//     codes       [records][2][32] x 16 bytes   8 words a lane, 8 codes a word; words 0..3 first, then 4..7
//     scale_zero  [records][32][64 / G] x 2     as in the checkpoint; 0 where a row has no more groups (no valid scale)
//     columns     [records][32][64 / G] x 1     group's place in its row, less the base of the record
//     heads       [records] x 4                 slab, base, first and last record of a slab: see make_head
//     slab_ptr    [slabs + 1] x 4               first record of every slab
//     rows        [slabs][32] x 4               the row of every lane, -1 for none
//
// Code i of a word stands at bit kCodeBit[i]: `word & 0x000f000f` are codes 0 and 1, `word & 0x00f000f0` codes 2 and 3,
// and the same of `word >> 8` codes 4 to 7, each pair as two halves want it.
//
// The order of a row's groups is free. It is chosen so that the eight lanes which read shared memory together find
// their activations in different banks (groups whose numbers differ modulo 8), and otherwise ascending. The two slabs of
// a panel (64 rows) take their records in step, with the same bases, so that the kernel for many tokens walks both at once.
#pragma once

#include <cstdint>

#include "partition.h"

namespace gqsa {

constexpr int kLanes = 32;           // rows of a slab
constexpr int kPanelRows = 64;       // rows that share their bases
constexpr int kSortRows = 1024;      // rows that are sorted together; prefill expands this many at a time
constexpr int kRecordWeights = 64;   // kept weights of one row in a record
constexpr int kColumnWindow = 256;   // columns of a record span less than this
constexpr int kMaxColumns = 1 << 14;  // what a head can number

// Group size as stored.
GQSA_BOTH constexpr int stored_group_size(int group_size) { return group_size < 64 ? group_size : 64; }

// A head: bit 0 the first record of its slab, bit 1 the last one, bits 2..15 the base, bits 16..31 the slab.
GQSA_BOTH constexpr uint32_t make_head(uint32_t slab, uint32_t base, bool first, bool last) {
    return slab << 16 | base << 2 | uint32_t{last} << 1 | uint32_t{first};
}
GQSA_BOTH constexpr int head_slab(uint32_t head) { return static_cast<int>(head >> 16); }
GQSA_BOTH constexpr int head_base(uint32_t head) { return static_cast<int>(head >> 2 & (kMaxColumns - 1)); }
GQSA_BOTH constexpr bool head_first(uint32_t head) { return head & 1; }
GQSA_BOTH constexpr bool head_last(uint32_t head) { return head >> 1 & 1; }

}  // namespace gqsa
