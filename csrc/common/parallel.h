// Threads: those of torch, which vLLM binds to cores, through torch_parallel_for of libtorch's stable C interface.
#pragma once

#include <cstdint>

namespace gqsa {

using Task = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, Task, void* context);

// Calls f(share) for every share; `parallel_for` may be null, then one after the other.
template <class F>
void in_parallel(ParallelFor parallel_for, int64_t shares, F f) {
    const Task task = [](int64_t begin, int64_t end, void* context) {
        for (int64_t share = begin; share < end; ++share) (*static_cast<F*>(context))(share);
    };
    if (parallel_for == nullptr || shares <= 1) {
        task(0, shares, &f);
    } else {
        parallel_for(0, shares, 1, task, &f);
    }
}

}  // namespace gqsa
