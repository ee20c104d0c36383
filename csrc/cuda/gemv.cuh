// The decode kernel: y = x W^T for 1 to 8 tokens, on ordinary (SIMT) arithmetic, one lane a row.
//
// The work is all records of the matrix, one after the other, cut into even shares: one a block, and within the block one
// a warp (task-centric, "Stream-K"). No share knows of rows, so no block waits for a long row. A warp walks through its
// share without stopping. A slab that lies within a share is stored at once; the parts of any other are added up first
// within the block, in the order of warps, and then, by the block that arrives last, in the order of blocks. Nobody
// waits for anybody. The order of all sums depends on the matrix and on the number of blocks alone: not on the order in
// which blocks run, and not on the number of tokens.
//
// Products within 16 weights are summed in float16, which is exact enough for INT4 weights (relative error about 3e-4,
// the rounding of a float16 result), everything else in float32. So that they neither overflow nor vanish, every
// token is scaled by a power of two first.
#pragma once

#include "device.cuh"

namespace gqsa::cuda {

constexpr int kGemvWarps = 16;
constexpr int kGemvThreads = kGemvWarps * kLanes;
constexpr int kGemvAhead = 2;          // records that a warp has under way
constexpr int kLargestExponent = 8;    // scaled activations are below 2^9: 8 x 15 x 2^9 is below 65504
constexpr int kParts = 2 * kGemvWarps;  // a warp has two slabs that it shares at most: its first and its last

static_assert(kParts == kLanes, "add_parts gives every part a lane");

// The shared memory of a block, beside the activations: [tokens][G / 8][groups in a row] x 16 bytes.
template <int M>
struct GemvShared {
    float parts[kParts][M][kLanes];  // sums of slabs that the warp shares: its first one, then its last
    int owners[kParts];              // 2 x slab + whether the slab ends here; -1 for none
    float largest[kGemvWarps];
    float unscale[M];
    int peers[2][2];                 // first and last block of the block's first and of its last slab
};

// The activations of a block, scaled, as float16. Eight of them are 16 bytes; the i-th eight of every group lie together.
template <int M, int G>
__device__ __forceinline__ void stage(const Weight& weight, const Product& product, uint4* x, GemvShared<M>& shared) {
    constexpr int kWarpsPerToken = kGemvWarps / M, kPlanes = G / 8;
    const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
    const int token = warp / kWarpsPerToken, octets = weight.in_features / 8, slots = octets / kPlanes;
    const bool bfloat = product.dtype == Dtype::bfloat16;
    const uint4* from = reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(product.x) + token * product.x_stride);
    uint4* to = x + int64_t{token} * octets;
    const int begin = warp % kWarpsPerToken * kLanes + lane, step = kWarpsPerToken * kLanes;
    float largest = 0;
    for (int i = begin; i < octets; i += step) {
        const uint4 v = token < product.tokens ? from[i] : uint4{0, 0, 0, 0};
        to[i % kPlanes * slots + i / kPlanes] = v;
        const auto see = [&](uint32_t pair) {
            largest = fmaxf(largest, fabsf(bfloat ? Bfloat::low(pair) : Half::low(pair)));
            largest = fmaxf(largest, fabsf(bfloat ? Bfloat::high(pair) : Half::high(pair)));
        };
        see(v.x), see(v.y), see(v.z), see(v.w);
    }
    for (int other = kLanes / 2; other > 0; other /= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, other));
    }
    if (lane == 0) shared.largest[warp] = largest;
    __syncthreads();
    for (int i = 0; i < kWarpsPerToken; ++i) largest = fmaxf(largest, shared.largest[token * kWarpsPerToken + i]);
    // A float's exponent, with its bias; both powers of two must be normal numbers.
    const int exponent = max(static_cast<int>(__float_as_uint(largest) >> 23), kLargestExponent + 1);
    const float scale = __uint_as_float(static_cast<uint32_t>(254 + kLargestExponent - exponent) << 23);
    if (begin == 0) shared.unscale[token] = __uint_as_float(static_cast<uint32_t>(exponent - kLargestExponent) << 23);
    for (int i = begin; i < octets; i += step) {
        uint4& v = to[i % kPlanes * slots + i / kPlanes];
        const auto convert = [&](uint32_t pair) {
            return bfloat ? Half::pack(Bfloat::low(pair) * scale, Bfloat::high(pair) * scale)
                          : Half::pack(Half::low(pair) * scale, Half::high(pair) * scale);
        };
        v = uint4{convert(v.x), convert(v.y), convert(v.z), convert(v.w)};
    }
    __syncthreads();
}

// Eight weights, less their scale, as four pairs of float16.
__device__ __forceinline__ void expand_word(uint32_t word, uint32_t low_zero, uint32_t high_zero, uint32_t magic,
                                            uint32_t (&out)[4]) {
    constexpr uint32_t kSixteenth = 0x2c002c00;
    out[0] = sub2<Half>(mask_or<0x000f000f>(word, magic), low_zero);
    out[1] = fma2<Half>(mask_or<0x00f000f0>(word, magic), kSixteenth, high_zero);
    out[2] = sub2<Half>(mask_or<0x000f000f>(word >> 8, magic), low_zero);
    out[3] = fma2<Half>(mask_or<0x00f000f0>(word >> 8, magic), kSixteenth, high_zero);
}

__device__ __forceinline__ uint32_t dot(const uint32_t (&weights)[4], const uint4& x) {
    uint32_t sum = mul2<Half>(weights[0], x.x);
    sum = fma2<Half>(weights[1], x.y, sum);
    sum = fma2<Half>(weights[2], x.z, sum);
    return fma2<Half>(weights[3], x.w, sum);
}

// Adds the products of one record to the sums of its row.
template <int M, int G>
__device__ __forceinline__ void add_record(const Record<G>& record, const uint4* x, int octets, uint32_t magic,
                                           float (&sums)[M]) {
    constexpr int kPlanes = G / 8;
    const int slots = octets / kPlanes;
#pragma unroll
    for (int j = 0; j < Record<G>::groups; ++j) {
        const uint32_t meta = record.meta(j), zero = meta & 15;
        const uint32_t low_zero = 0x64006400u | zero * 0x10001u;           // 1024 + zero
        const uint32_t high_zero = 0xd400d400u | (zero * 0x10001u) << 4;   // -(64 + zero)
        const float scale = Half::low(scale_bits(meta));
        const uint4* at = x + record.column(j);
        float group[M];
#pragma unroll
        for (int w = 0; w < kPlanes; w += 2) {
            constexpr int kPair = kPlanes > 1 ? 2 : 1;
            uint32_t weights[kPair][4];
#pragma unroll
            for (int i = 0; i < kPair; ++i) {
                expand_word(record.codes[j * kPlanes + w + i], low_zero, high_zero, magic, weights[i]);
            }
#pragma unroll
            for (int m = 0; m < M; ++m) {
                uint32_t sum = dot(weights[0], at[m * octets + w * slots]);
                if constexpr (kPair > 1) sum = add2<Half>(sum, dot(weights[1], at[m * octets + (w + 1) * slots]));
                const float both = Half::low(sum) + Half::high(sum);
                group[m] = w == 0 ? both : group[m] + both;
            }
        }
#pragma unroll
        for (int m = 0; m < M; ++m) sums[m] += scale * group[m];
    }
}

template <int M>
__device__ __forceinline__ void store(const Weight& weight, const Product& product, const GemvShared<M>& shared, int row,
                                      const float (&sums)[M]) {
    if (row < 0) return;
    const float bias = product.bias == nullptr ? 0 : load_value(product.bias, product.dtype, row);
#pragma unroll
    for (int m = 0; m < M; ++m) {
        if (m < product.tokens) {
            store_value(product.y, product.dtype, m * product.y_stride + row, sums[m] * shared.unscale[m] + bias);
        }
    }
}

// The block's part of a slab that other blocks share. The one that comes last adds all parts in the order of blocks.
template <int M>
__device__ __forceinline__ void add_blocks(const Weight& weight, const Product& product, const GemvShared<M>& shared,
                                           int slab, bool begins, float (&sums)[M]) {
    const int lane = threadIdx.x % kLanes;
    const int first = shared.peers[begins][0], last = shared.peers[begins][1];
    // A block shares its first slab (unless it begins it) and the last one.
    const auto part = [&](int block, int m) {
        const bool beginning = block == first;
        return product.workspace + ((int64_t{block} * 2 + beginning) * M + m) * kLanes + lane;
    };
#pragma unroll
    for (int m = 0; m < M; ++m) *part(blockIdx.x, m) = sums[m];
    __threadfence();
    __syncwarp();
    uint32_t before = 0;
    if (lane == 0) before = atomicAdd(weight.counters + slab, 1u);
    if (__shfl_sync(kAllLanes, before, 0) != static_cast<uint32_t>(last - first)) return;
    __threadfence();
#pragma unroll
    for (int m = 0; m < M; ++m) {
        sums[m] = 0;
        for (int block = first; block <= last; ++block) sums[m] += __ldcg(part(block, m));
    }
    store(weight, product, shared, weight.rows[slab * kLanes + lane], sums);
    if (lane == 0) weight.counters[slab] = 0;
}

// Adds up what the warps of a block share: the warp that holds the first part of a slab does it.
template <int M>
__device__ __forceinline__ void add_parts(const Weight& weight, const Product& product, const GemvShared<M>& shared) {
    const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
    for (int part = 2 * warp; part < 2 * warp + 2; ++part) {
        const int owner = shared.owners[part];
        if (owner < 0) continue;
        const int other = shared.owners[lane];
        const unsigned all = __ballot_sync(kAllLanes, other >= 0 && other / 2 == owner / 2);
        if (__ffs(all) - 1 != part) continue;
        float sums[M] = {};
        for (unsigned rest = all; rest != 0; rest &= rest - 1) {
#pragma unroll
            for (int m = 0; m < M; ++m) sums[m] += shared.parts[__ffs(rest) - 1][m][lane];
        }
        const int slab = owner / 2;
        const bool begins = part % 2 == 1, ends = shared.owners[31 - __clz(all)] % 2 == 1;
        if (begins && ends) {
            store(weight, product, shared, weight.rows[slab * kLanes + lane], sums);
        } else {
            add_blocks(weight, product, shared, slab, begins, sums);
        }
    }
}

// Blocks: any number up to that of records; with `by_slab` one a slab (data-centric), for comparison.
template <int M, int G>
__global__ void __launch_bounds__(kGemvThreads, 1) gemv(Weight weight, Product product, bool by_slab) {
    DYNAMIC_SHARED(uint4, x);
    const int octets = weight.in_features / 8;
    GemvShared<M>& shared = *reinterpret_cast<GemvShared<M>*>(x + M * octets);
    const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
    const int blocks = gridDim.x, block = blockIdx.x;
    const int first = by_slab ? weight.slab_ptr[block] : share_begin(weight.records, blocks, block);
    const int last = by_slab ? weight.slab_ptr[block + 1] : share_begin(weight.records, blocks, block + 1);
    const int begin = first + share_begin(last - first, kGemvWarps, warp);
    const int end = first + share_begin(last - first, kGemvWarps, warp + 1);

    // Weights do not depend on the kernel before this one: have the first of them under way while it ends.
    Record<G> ahead[kGemvAhead];
#pragma unroll
    for (int i = 0; i < kGemvAhead; ++i) {
        if (begin + i < end) ahead[i].load(weight, begin + i, lane);
    }
    if (begin + kGemvAhead + lane / 8 < end) {
        prefetch(static_cast<const char*>(weight.codes) + int64_t{begin + kGemvAhead} * 1024 + lane * 128);
    }
    if (threadIdx.x < kParts) shared.owners[threadIdx.x] = -1;
    if (threadIdx.x < 2 && !by_slab) {
        const int slab = head_slab(weight.heads[threadIdx.x == 0 ? first : last - 1]);
        shared.peers[threadIdx.x][0] = share_of(weight.records, blocks, weight.slab_ptr[slab]);
        shared.peers[threadIdx.x][1] = share_of(weight.records, blocks, weight.slab_ptr[slab + 1] - 1);
    }
    let_next_kernel_start();
    wait_for_inputs();
    stage<M, G>(weight, product, x, shared);

    const uint32_t magic = in_register<0x64006400>();
    float sums[M] = {};
    bool begins = begin < end && head_first(ahead[0].head);
    int row = begin < end ? weight.rows[head_slab(ahead[0].head) * kLanes + lane] : -1;
#pragma unroll 1
    for (int at = begin; at < end; at += kGemvAhead) {
#pragma unroll
        for (int i = 0; i < kGemvAhead; ++i) {
            if (at + i >= end) break;
            const Record<G> record = ahead[i];
            if (at + i + kGemvAhead < end) ahead[i].load(weight, at + i + kGemvAhead, lane);
            add_record<M, G>(record, x, octets, magic, sums);
            const bool ends = head_last(record.head);
            if (!ends && at + i + 1 < end) continue;
            const int slab = head_slab(record.head);
            if (begins && ends) {
                store(weight, product, shared, row, sums);
            } else {
                const int part = 2 * warp + begins;
#pragma unroll
                for (int m = 0; m < M; ++m) shared.parts[part][m][lane] = sums[m];
                if (lane == 0) shared.owners[part] = 2 * slab + ends;
            }
#pragma unroll
            for (int m = 0; m < M; ++m) sums[m] = 0;
            begins = true;
            if (at + i + 1 < end) row = weight.rows[(slab + 1) * kLanes + lane];
        }
    }
    __syncthreads();
    add_parts(weight, product, shared);
}

template <int M>
constexpr int gemv_shared_bytes(int in_features) {
    return M * in_features * 2 + static_cast<int>(sizeof(GemvShared<M>));
}

}  // namespace gqsa::cuda
