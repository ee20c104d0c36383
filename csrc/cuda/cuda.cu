// The C interface of the CUDA kernels, for ctypes: no header of torch or Python, so that nvcc alone builds it and one build
// serves every version of both. Pointers and sizes are trusted: vllm_gqsa/kernels/cuda.py checks them. Functions that
// return int32_t return a cudaError_t; nothing waits for the device.
#include "expand.cuh"
#include "gemm.cuh"
#include "gemv.cuh"

#ifdef __CUDACC__
#include <cuda_runtime.h>
#endif

namespace gqsa::cuda {
namespace {

struct Launch {
    int blocks, threads, shared_bytes;
    bool overlap;  // programmatic dependent launch: the kernel begins while the one before it ends
    void* stream;
};

template <class... P>
int32_t launch(void (*kernel)(P...), const Launch& how, P... arguments) {
#ifdef __CUDACC__
    const void* function = reinterpret_cast<const void*>(kernel);
    cudaFuncAttributes now{};
    cudaError_t error = cudaFuncGetAttributes(&now, function);
    // Raised and never lowered: a graph may hold an earlier launch of the same kernel that needs more.
    if (error == cudaSuccess && now.maxDynamicSharedSizeBytes < how.shared_bytes)
        error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, how.shared_bytes);
    if (error != cudaSuccess) return error;
    cudaLaunchAttribute overlap{};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(how.blocks);
    config.blockDim = dim3(how.threads);
    config.dynamicSmemBytes = how.shared_bytes;
    config.stream = static_cast<cudaStream_t>(how.stream);
    config.attrs = &overlap;
    config.numAttrs = how.overlap ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, arguments...);
#else
    shim::launch(how.blocks, how.threads, how.shared_bytes, [=] { kernel(arguments...); });
    return 0;
#endif
}

// Calls f with the group size as a constant.
template <class F>
int32_t for_group_size(int32_t group_size, F f) {
    switch (group_size) {
        case 8: return f(std::integral_constant<int, 8>{});
        case 16: return f(std::integral_constant<int, 16>{});
        case 32: return f(std::integral_constant<int, 32>{});
        default: return f(std::integral_constant<int, 64>{});
    }
}

template <int M>
int32_t launch_gemv(const Weight& weight, const Product& product, int blocks, bool by_slab, bool overlap, void* stream) {
    const Launch how{by_slab ? weight.slabs : blocks, kGemvThreads, gemv_shared_bytes<M>(weight.in_features), overlap, stream};
    return for_group_size(weight.group_size, [&](auto size) { return launch(gemv<M, size>, how, weight, product, by_slab); });
}

template <class T, int N>
int32_t launch_gemm(const Weight& weight, const Product& product, int blocks, bool overlap, void* stream) {
    return for_group_size(weight.group_size, [&](auto size) {
        const Launch how{blocks, kGemmThreads, static_cast<int>(sizeof(GemmShared<size>)), overlap, stream};
        return launch(gemm<T, size, N>, how, weight, product);
    });
}

template <class T>
int32_t launch_gemm(const Weight& weight, const Product& product, int blocks, bool overlap, void* stream) {
    if (product.tokens <= 16) return launch_gemm<T, 2>(weight, product, blocks, overlap, stream);
    if (product.tokens <= 32) return launch_gemm<T, 4>(weight, product, blocks, overlap, stream);
    return launch_gemm<T, 8>(weight, product, blocks, overlap, stream);
}

}  // namespace
}  // namespace gqsa::cuda

using namespace gqsa::cuda;

#pragma GCC visibility push(default)
extern "C" {

// Compute capability (times ten) that the code which runs on the current device was made for, and its multiprocessors and
// shared memory a block; an error also if this library holds no code for it. A newer device may run code that the driver
// makes from PTX of an older one, without what only newer ones have, such as the wait for the kernel before.
int32_t gqsa_cuda_device(int32_t* capability, int32_t* multiprocessors, int32_t* shared_bytes) {
#ifdef __CUDACC__
    int device = 0, major = 0, minor = 0;
    cudaFuncAttributes attributes{};
    cudaError_t error = cudaGetDevice(&device);
    if (!error) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (!error) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    if (!error) error = cudaDeviceGetAttribute(multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (!error) error = cudaDeviceGetAttribute(shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (!error) error = cudaFuncGetAttributes(&attributes, gemv<1, 16>);
    *capability = major * 10 + minor;
    if (attributes.ptxVersion < *capability) *capability = attributes.ptxVersion;
    if (error) cudaGetLastError();  // or torch would find it and take it for its own
    return error;
#else
    *capability = 90, *multiprocessors = 6, *shared_bytes = 232448;
    return 0;
#endif
}

const char* gqsa_cuda_message(int32_t error) {
#ifdef __CUDACC__
    return cudaGetErrorString(static_cast<cudaError_t>(error));
#else
    return error == 0 ? "no error" : "unknown error";
#endif
}

// Shared memory that gqsa_cuda_gemv needs for `tokens` (1, 2, 4 or 8).
int32_t gqsa_cuda_gemv_shared(int32_t tokens, int32_t in_features) {
    switch (tokens) {
        case 1: return gemv_shared_bytes<1>(in_features);
        case 2: return gemv_shared_bytes<2>(in_features);
        case 4: return gemv_shared_bytes<4>(in_features);
        default: return gemv_shared_bytes<8>(in_features);
    }
}

// For 1 to 8 tokens of float16 or bfloat16; blocks is at most the number of records. Workspace: blocks x 2 x 32 floats for
// every token, tokens rounded up to 1, 2, 4 or 8.
int32_t gqsa_cuda_gemv(const Weight* weight, const Product* product, int32_t blocks, int32_t by_slab, int32_t overlap,
                       void* stream) {
    if (product->tokens == 1) return launch_gemv<1>(*weight, *product, blocks, by_slab, overlap, stream);
    if (product->tokens == 2) return launch_gemv<2>(*weight, *product, blocks, by_slab, overlap, stream);
    if (product->tokens <= 4) return launch_gemv<4>(*weight, *product, blocks, by_slab, overlap, stream);
    return launch_gemv<8>(*weight, *product, blocks, by_slab, overlap, stream);
}

// For 1 to 64 tokens of float16 or bfloat16. Workspace: blocks x 2 x 64 floats for every token, tokens rounded up to 16,
// 32 or 64.
int32_t gqsa_cuda_gemm(const Weight* weight, const Product* product, int32_t blocks, int32_t overlap, void* stream) {
    if (product->dtype == Dtype::bfloat16) return launch_gemm<Bfloat>(*weight, *product, blocks, overlap, stream);
    return launch_gemm<Half>(*weight, *product, blocks, overlap, stream);
}

// Dense weights of slabs first..first + count, whose rows are first_row and so on, to `out` of `dtype`, which is all zero.
int32_t gqsa_cuda_expand(const Weight* weight, int32_t first, int32_t count, int32_t first_row, int32_t dtype, void* out,
                         void* stream) {
    const Launch how{count, kExpandThreads, 0, false, stream};
    return for_group_size(weight->group_size, [&](auto size) {
        return launch(expand<size>, how, *weight, first, first_row, Dtype{dtype}, out);
    });
}

// Dense rows ids[0..count) to `out` [count, in_features] of `dtype`, which is all zero.
int32_t gqsa_cuda_look_up(const Weight* weight, const int64_t* ids, int32_t count, int32_t dtype, void* out, void* stream) {
    const Launch how{count, kExpandThreads, 0, false, stream};
    return for_group_size(weight->group_size,
                          [&](auto size) { return launch(look_up<size>, how, *weight, ids, Dtype{dtype}, out); });
}

}  // extern "C"
#pragma GCC visibility pop
