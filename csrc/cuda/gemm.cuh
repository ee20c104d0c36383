// The kernel for 9 to 64 tokens: load sparse, compute dense. The tensor cores want dense tiles, so kept groups are
// scattered, still as INT4, into a window of columns in shared memory, where a pruned group has the scale 0. Weights
// are then expanded in registers, rounded as in a dense model of the same dtype, and multiplied by mma.
//
// A block has eight warps and takes the 64 rows of a panel together: its two slabs, record by record, in step. The
// window moves with the bases of the records: no later record has columns below the base, so these are complete. A record
// that reaches beyond the window is scattered in several passes: slower, and as right.
//
// Work is divided as in gemv.cuh, by steps of a panel (a record of both slabs); parts of panels are added up in the order of blocks.
#pragma once

#include "device.cuh"

namespace gqsa::cuda {

constexpr int kGemmWarps = 8;
constexpr int kGemmThreads = kGemmWarps * kLanes;
constexpr int kStepsAtOnce = kGemmWarps / 2;  // every warp scatters one record of one of the two slabs
constexpr int kMatrixRows = 16;               // rows of an mma
constexpr int kTiles = kPanelRows / kMatrixRows;

// Columns that the window holds; about 84 KB, so that the smallest of the supported GPUs (99 KB a block) can run it.
template <int G>
constexpr int kWindow = G == 8 ? 160 : G == 16 ? 112 : G == 32 ? 64 : 36;

template <class T>
constexpr uint32_t kMagic = 0x6400;  // 1024 as float16: its last four bits count ones
template <>
constexpr uint32_t kMagic<Bfloat> = 0x4300;  // 128 as bfloat16

template <int G>
struct GemmShared {
    uint32_t words[kWindow<G>][G / 8][kPanelRows];
    uint32_t scales[kWindow<G>][kPanelRows];  // the scale, and above it magic + zero point; 0 for a pruned group
    float sums[kGemmWarps][kLanes][8];
    int last;
};

// The groups of a record whose columns lie in begin..begin + kWindow; returns whether some lie beyond.
template <class T, int G>
__device__ __forceinline__ bool scatter(const Record<G>& record, int row, int begin, GemmShared<G>& shared) {
    bool beyond = false;
#pragma unroll
    for (int j = 0; j < Record<G>::groups; ++j) {
        const uint32_t meta = record.meta(j);
        const int column = record.column(j);
        if (meta == 0 || column < begin) continue;
        if (column >= begin + kWindow<G>) {
            beyond = true;
            continue;
        }
        const int at = column % kWindow<G>;
#pragma unroll
        for (int w = 0; w < G / 8; ++w) shared.words[at][w][row] = record.codes[j * (G / 8) + w];
        const uint32_t scale = T::pack(Half::low(scale_bits(meta)), 0) & 0xffffu;
        shared.scales[at][row] = scale | (kMagic<T> | (meta & 15)) << 16;
    }
    return beyond;
}

// Two weights of one row: codes 2q and 2q + 1 of a word, q being the lane's place among four.
template <class T>
__device__ __forceinline__ uint32_t expand_pair(uint32_t word, uint32_t scale, uint32_t magic) {
    const uint32_t codes = mask_or<0x000f000f>(word >> (threadIdx.x % 4 * 4), magic);
    return mul2<T>(sub2<T>(codes, __byte_perm(scale, 0, 0x3232)), __byte_perm(scale, 0, 0x1010));
}

// Activations of 16 columns from `k` on and 8 tokens from `first` on, in the order of mma.
__device__ __forceinline__ void load_tokens(const Weight& weight, const Product& product, int first, int k,
                                            uint32_t (&out)[2]) {
    const int lane = threadIdx.x % kLanes, token = first + lane / 4, at = k + lane % 4 * 2;
    const uint16_t* row = static_cast<const uint16_t*>(product.x) + token * product.x_stride + at;
    const bool used = token < product.tokens;
    out[0] = used && k < weight.in_features ? *reinterpret_cast<const uint32_t*>(row) : 0;
    out[1] = used && k + 8 < weight.in_features ? *reinterpret_cast<const uint32_t*>(row + 8) : 0;
}

// 16 columns from `k` on: all rows of the panel by all tokens.
template <class T, int G, int N>
__device__ __forceinline__ void multiply_step(const Weight& weight, const Product& product, int k, uint32_t magic,
                                              const GemmShared<G>& shared, float (&sums)[kTiles][N][4]) {
    uint32_t x[N][2];
#pragma unroll
    for (int n = 0; n < N; ++n) load_tokens(weight, product, n * 8, k, x[n]);
    // The two halves of the 16 columns lie in one group, or, if groups are of 8, in two.
    const int low = k / G % kWindow<G>, high = (k + 8) / G % kWindow<G>, low_word = k % G / 8, high_word = (k + 8) % G / 8;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
        uint32_t a[4];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = tile * kMatrixRows + half * 8 + threadIdx.x % kLanes / 4;
            const uint32_t low_scale = shared.scales[low][row], high_scale = G == 8 ? shared.scales[high][row] : low_scale;
            a[half] = expand_pair<T>(shared.words[low][low_word][row], low_scale, magic);
            a[2 + half] = expand_pair<T>(shared.words[high][high_word][row], high_scale, magic);
        }
#pragma unroll
        for (int n = 0; n < N; ++n) mma(T{}, sums[tile][n], a, x[n]);
    }
}

// Columns begin..end of the window, which are empty afterwards; warps take them in turn.
template <class T, int G, int N>
__device__ __forceinline__ void multiply(const Weight& weight, const Product& product, int begin, int end,
                                         uint32_t magic, GemmShared<G>& shared, float (&sums)[kTiles][N][4]) {
    constexpr int kUnit = G == 8 ? 2 : 1, kWidth = kUnit * G;  // columns that mma takes at least, and their weights
    const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
    for (int column = begin + warp * kUnit; column < end; column += kGemmWarps * kUnit) {
#pragma unroll 1
        for (int k = 0; k < kWidth; k += 16) {
            multiply_step<T, G, N>(weight, product, column * G + k, magic, shared, sums);
        }
        __syncwarp();
        for (int i = 0; i < kUnit; ++i) {
            uint32_t* scales = shared.scales[(column + i) % kWindow<G>];
            scales[lane] = scales[lane + kLanes] = 0;
        }
    }
}

// Steps begin..end of a panel.
template <class T, int G, int N>
__device__ __forceinline__ void walk(const Weight& weight, const Product& product, int panel, int begin, int end,
                                     GemmShared<G>& shared, float (&sums)[kTiles][N][4]) {
    constexpr int kUnit = G == 8 ? 2 : 1;
    const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes, half = warp % 2;
    const int slab = panel * 2 + half, columns = (weight.in_features / G + kUnit - 1) / kUnit * kUnit;
    const int first = weight.slab_ptr[panel * 2];
    const int own = slab < weight.slabs ? weight.slab_ptr[slab] : -1;
    const uint32_t magic = in_register<kMagic<T> * 0x10001u>();
    const auto base = [&](int step) { return head_base(weight.heads[first + step]) / kUnit * kUnit; };
    Record<G> ahead;
    const auto load = [&](int at) {
        const int step = at + warp / 2;
        if (own >= 0 && step < end) ahead.load(weight, own + step, lane);
    };
    // Nothing is asked of memory when it is needed, but a round earlier.
    load(begin);
    int start = base(begin), next = begin + kStepsAtOnce < end ? base(begin + kStepsAtOnce) : columns;
    for (int at = begin; at < end; at += kStepsAtOnce) {
        const bool has = own >= 0 && at + warp / 2 < end, final = at + kStepsAtOnce >= end;
        const Record<G> record = ahead;
        load(at + kStepsAtOnce);
        const int after_next = at + 2 * kStepsAtOnce < end ? base(at + 2 * kStepsAtOnce) : columns;
        bool more = true;
        for (int from = start; more; from += kWindow<G>) {
            more = __syncthreads_or(has && scatter<T, G>(record, half * kLanes + lane, from, shared));
            const bool all = more || from != start || final;  // leave nothing behind
            // Of columns further than a window nothing is in shared memory: their places are those of earlier ones.
            const int to = all || next > from + kWindow<G> ? from + kWindow<G> : next;
            multiply<T, G, N>(weight, product, from, to < columns ? to : columns, magic, shared, sums);
            __syncthreads();
        }
        start = next;
        next = after_next;
    }
}

// Adds the sums of the warps, 32 rows by 8 tokens at a time, and calls f(row in panel, token, sum).
template <int G, int N, class F>
__device__ __forceinline__ void add_warps(GemmShared<G>& shared, float (&sums)[kTiles][N][4], F f) {
    const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int row = tile * kMatrixRows + i / 2 * 8 + lane / 4, token = lane % 4 * 2 + i % 2;
                    shared.sums[warp][row][token] = sums[half * 2 + tile][n][i];
                    sums[half * 2 + tile][n][i] = 0;
                }
            }
            __syncthreads();
            float sum = 0;
            for (int w = 0; w < kGemmWarps; ++w) sum += shared.sums[w][lane][warp];
            f(half * kLanes + lane, n * 8 + warp, sum);
            __syncthreads();
        }
    }
}

__device__ __forceinline__ void store_sum(const Weight& weight, const Product& product, int panel, int row, int token,
                                          float sum) {
    const int slab = panel * 2 + row / kLanes;
    if (slab >= weight.slabs || token >= product.tokens) return;
    const int to = weight.rows[slab * kLanes + row % kLanes];
    if (to < 0) return;
    const float bias = product.bias == nullptr ? 0 : load_value(product.bias, product.dtype, to);
    store_value(product.y, product.dtype, token * product.y_stride + to, sum + bias);
}

template <class T, int G, int N>
__global__ void __launch_bounds__(kGemmThreads, 1) gemm(Weight weight, Product product) {
    DYNAMIC_SHARED(GemmShared<G>, memory);
    GemmShared<G>& shared = *memory;
    const int blocks = gridDim.x, block = blockIdx.x;
    // A panel at the end may have one slab.
    const int tail = weight.slabs % 2 == 0 ? weight.records : weight.slab_ptr[weight.slabs - 1];
    const int steps = tail / 2 + weight.records - tail;
    const int begin = share_begin(steps, blocks, block), end = share_begin(steps, blocks, block + 1);
    for (int i = threadIdx.x; i < kWindow<G> * kPanelRows; i += kGemmThreads) {
        shared.scales[i / kPanelRows][i % kPanelRows] = 0;
    }
    let_next_kernel_start();
    wait_for_inputs();
    __syncthreads();
    float sums[kTiles][N][4] = {};
    for (int at = begin; at < end;) {
        const int record = min(2 * at, weight.records - 1), panel = head_slab(weight.heads[record]) / 2;
        const int first = weight.slab_ptr[panel * 2], start = first / 2;  // the panel's first record and first step
        const int stop = start + weight.slab_ptr[panel * 2 + 1] - first, until = stop < end ? stop : end;
        walk<T, G, N>(weight, product, panel, at - start, until - start, shared, sums);
        if (at == start && until == stop) {
            add_warps<G, N>(shared, sums, [&](int row, int token, float sum) {
                store_sum(weight, product, panel, row, token, sum);
            });
        } else {
            const int first_block = share_of(steps, blocks, start), last_block = share_of(steps, blocks, stop - 1);
            const auto part = [&](int from, int row, int token) {
                const bool beginning = from == first_block;
                return product.workspace + ((int64_t{from} * 2 + beginning) * N * 8 + token) * kPanelRows + row;
            };
            add_warps<G, N>(shared, sums, [&](int row, int token, float sum) { *part(block, row, token) = sum; });
            __threadfence();
            __syncthreads();
            if (threadIdx.x == 0) {
                shared.last = atomicAdd(weight.counters + panel * 2, 1u) == static_cast<uint32_t>(last_block - first_block);
            }
            __syncthreads();
            if (shared.last) {
                __threadfence();
                for (int i = threadIdx.x; i < N * 8 * kPanelRows; i += kGemmThreads) {
                    float sum = 0;
                    for (int b = first_block; b <= last_block; ++b) sum += __ldcg(part(b, i % kPanelRows, i / kPanelRows));
                    store_sum(weight, product, panel, i % kPanelRows, i / kPanelRows, sum);
                }
                if (threadIdx.x == 0) weight.counters[panel * 2] = 0;
            }
        }
        at = until;
    }
}

}  // namespace gqsa::cuda
