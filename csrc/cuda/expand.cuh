// Dense weights from slabs: whole rows for prefill, single ones for an embedding. Both write to memory that is zero.
#pragma once

#include "device.cuh"

namespace gqsa::cuda {

constexpr int kExpandThreads = 256;

// The weights of one group, to `out`, 8 at a time; computed in float32, which is exact, and rounded once.
template <int G>
__device__ __forceinline__ void expand_group(const Record<G>& record, int j, Dtype dtype, void* out, int64_t at) {
    const uint32_t meta = record.meta(j);
    const float scale = Half::low(scale_bits(meta)), zero = static_cast<float>(meta & 15);
#pragma unroll
    for (int w = 0; w < G / 8; ++w) {
        const uint32_t word = record.codes[j * (G / 8) + w];
        const auto value = [&](int i) {
            return scale * (static_cast<float>(word >> (i / 2 * 4 + i % 2 * 16) & 15u) - zero);
        };
        const int64_t to = at + w * 8;
        if (dtype == Dtype::float32) {
            float4* p = reinterpret_cast<float4*>(static_cast<float*>(out) + to);
            p[0] = float4{value(0), value(1), value(2), value(3)};
            p[1] = float4{value(4), value(5), value(6), value(7)};
        } else {
            const bool bfloat = dtype == Dtype::bfloat16;
            const auto pair = [&](int i) {
                return bfloat ? Bfloat::pack(value(i), value(i + 1)) : Half::pack(value(i), value(i + 1));
            };
            *reinterpret_cast<uint4*>(static_cast<uint16_t*>(out) + to) = uint4{pair(0), pair(2), pair(4), pair(6)};
        }
    }
}

// Slabs first..first + gridDim.x, whose rows begin at `first_row`, to `out` [rows, in_features]; a block a slab.
template <int G>
__global__ void __launch_bounds__(kExpandThreads) expand(Weight weight, int first, int first_row, Dtype dtype, void* out) {
    const int slab = first + blockIdx.x, lane = threadIdx.x % kLanes, row = weight.rows[slab * kLanes + lane];
    for (int at = weight.slab_ptr[slab] + threadIdx.x / kLanes; at < weight.slab_ptr[slab + 1];
         at += kExpandThreads / kLanes) {
        Record<G> record;
        record.load(weight, at, lane);
#pragma unroll
        for (int j = 0; j < Record<G>::groups; ++j) {
            if (record.meta(j) == 0) continue;
            const int64_t to = int64_t{row - first_row} * weight.in_features + record.column(j) * G;
            expand_group<G>(record, j, dtype, out, to);
        }
    }
}

// Rows `ids` to `out` [ids, in_features]; a block an id. An id that is no row gets NaN.
template <int G>
__global__ void __launch_bounds__(kExpandThreads) look_up(Weight weight, const int64_t* ids, Dtype dtype, void* out) {
    const int64_t id = ids[blockIdx.x], start = int64_t{blockIdx.x} * weight.in_features;
    if (id < 0 || id >= weight.out_features) {
        for (int k = threadIdx.x; k < weight.in_features; k += kExpandThreads) {
            store_value(out, dtype, start + k, __uint_as_float(0x7fc00000u));
        }
        return;
    }
    const int place = weight.lanes[id], slab = place / kLanes, lane = place % kLanes;
    for (int at = weight.slab_ptr[slab] + threadIdx.x; at < weight.slab_ptr[slab + 1]; at += kExpandThreads) {
        Record<G> record;
        record.load(weight, at, lane);
#pragma unroll
        for (int j = 0; j < Record<G>::groups; ++j) {
            if (record.meta(j) != 0) expand_group<G>(record, j, dtype, out, start + record.column(j) * G);
        }
    }
}

}  // namespace gqsa::cuda
