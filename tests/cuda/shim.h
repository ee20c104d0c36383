// Runs CUDA kernels on a CPU, as plain C++: a block is a set of fibers on one thread of the operating system, one fiber for
// each thread of the block, and they take turns only where the kernel has them meet (barriers, shuffles, mma). Which
// fiber goes first changes from turn to turn, shared memory begins as garbage, blocks run in any order, and what the kernel
// before would still be writing is garbage until wait_for_inputs: so what a GPU would get wrong now and then is wrong
// here too. A barrier that some threads never reach is reported, not waited for.
//
// It shows what a kernel computes, not how fast, nor what a weaker order of memory could do: fences do nothing here.
#pragma once

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

namespace shim {

constexpr int kWarp = 32;
constexpr size_t kStack = 128 << 10;

struct Dim {
    unsigned x;
};

// Where a fiber, or what runs the fibers, was interrupted. Not swapcontext where it can be helped: it makes a system call,
// about signals, on every switch.
#if defined(__x86_64__)
struct Context {
    void* stack;
};
extern "C" void shim_switch(void** from, void* to);
asm(R"(
.text
shim_switch:
    push %rbx; push %rbp; push %r12; push %r13; push %r14; push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15; pop %r14; pop %r13; pop %r12; pop %rbp; pop %rbx
    ret
)");
inline void switch_to(Context& from, Context& to) { shim_switch(&from.stack, to.stack); }
inline void begin_at(Context& context, char* stack, size_t size, void (*function)()) {
    void** top = reinterpret_cast<void**>(stack + size) - 4;
    top[0] = reinterpret_cast<void*>(function);  // what `ret` jumps to, with the stack as after a call
    context.stack = top - 6;
}
#else
struct Context {
    ucontext_t value;
};
inline void switch_to(Context& from, Context& to) { swapcontext(&from.value, &to.value); }
inline void begin_at(Context& context, char* stack, size_t size, void (*function)()) {
    getcontext(&context.value);
    context.value.uc_stack.ss_sp = stack;
    context.value.uc_stack.ss_size = size;
    context.value.uc_link = nullptr;
    makecontext(&context.value, function, 0);
}
#endif

struct Fiber {
    Context context;
    bool done;
};

// Where threads meet: everybody who has not returned must arrive before anybody goes on.
struct Meeting {
    int arrived = 0;
    unsigned generation = 0;
};

struct State {
    std::vector<Fiber> fibers;
    std::vector<char> stacks;
    char* shared = nullptr;              // exactly as many bytes as asked for: a sanitizer sees any access beyond
    std::vector<Meeting> warps;
    Meeting block;
    int now = 0;                         // the fiber that runs
    bool progress = false;               // whether any fiber passed a meeting or ended in this round
    unsigned block_index = 0, blocks = 0;
    std::vector<char> votes;             // __syncthreads_or
    unsigned char exchange[64][kWarp][32];
    std::function<void()> body;
    Context scheduler;
    std::mt19937 random{1};
    bool shuffle = false;                // blocks in random order
    char* inputs = nullptr;              // what only wait_for_inputs makes valid
    std::vector<char> saved;
    bool waited = false;
};
inline State state;

inline void yield() { switch_to(state.fibers[state.now].context, state.scheduler); }

inline int alive(int begin, int end) {
    return static_cast<int>(std::count_if(state.fibers.begin() + begin, state.fibers.begin() + end,
                                          [](const Fiber& fiber) { return !fiber.done; }));
}

inline void meet(Meeting& meeting, int begin, int end) {
    const unsigned generation = meeting.generation;
    ++meeting.arrived;
    while (meeting.generation == generation) {
        if (meeting.arrived >= alive(begin, end)) {
            meeting.arrived = 0;
            ++meeting.generation;
            state.progress = true;
        } else {
            yield();
        }
    }
}

inline void meet_block() { meet(state.block, 0, static_cast<int>(state.fibers.size())); }
inline void meet_warp() {
    const int warp = state.now / kWarp;
    meet(state.warps[warp], warp * kWarp, warp * kWarp + kWarp);
}

// Everybody shows a value and sees those of the others in the warp: f(lane) gives lane's.
template <class T, class F>
auto exchange(const T& value, F f) {
    static_assert(sizeof(T) <= sizeof state.exchange[0][0]);
    auto& slots = state.exchange[state.now / kWarp];
    std::memcpy(slots[state.now % kWarp], &value, sizeof value);
    meet_warp();
    const auto result = f([&](int lane) {
        T other;
        std::memcpy(&other, slots[lane % kWarp], sizeof other);
        return other;
    });
    meet_warp();
    return result;
}

inline void wait_for_inputs() {
    if (!state.waited && state.inputs != nullptr) std::copy(state.saved.begin(), state.saved.end(), state.inputs);
    state.waited = true;
}

inline void* dynamic_shared() { return state.shared; }

inline void run_fiber() {
    state.body();
    state.fibers[state.now].done = true;
    state.progress = true;
    yield();
}

inline void run_block(int threads) {
    state.block = {};
    state.warps.assign(threads / kWarp, {});
    state.votes.assign(threads, false);
    state.waited = false;
    if (state.inputs != nullptr) std::fill_n(state.inputs, state.saved.size(), '\xff');
    for (int i = 0; i < threads; ++i) {
        state.fibers[i].done = false;
        begin_at(state.fibers[i].context, state.stacks.data() + i * kStack, kStack, run_fiber);
    }
    while (alive(0, threads) > 0) {
        state.progress = false;
        const int first = static_cast<int>(state.random() % threads);
        for (int i = 0; i < threads; ++i) {
            state.now = (first + i) % threads;
            if (!state.fibers[state.now].done) switch_to(state.scheduler, state.fibers[state.now].context);
        }
        if (!state.progress) {
            std::fprintf(stderr, "shim: block %u waits at a barrier that some of its threads never reach\n", state.block_index);
            std::abort();
        }
    }
    wait_for_inputs();  // for kernels that never do
}

inline void launch(int blocks, int threads, int shared_bytes, std::function<void()> body) {
    state.fibers.resize(threads);
    state.stacks.resize(threads * kStack);
    state.body = std::move(body);
    state.blocks = blocks;
    std::vector<unsigned> order(blocks);
    std::iota(order.begin(), order.end(), 0u);
    if (state.shuffle) std::shuffle(order.begin(), order.end(), state.random);
    for (const unsigned block : order) {
        state.block_index = block;
        constexpr std::align_val_t kAlignment{128};
        state.shared = static_cast<char*>(::operator new(shared_bytes, kAlignment));
        std::fill_n(state.shared, shared_bytes, '\xa5');
        run_block(threads);
        ::operator delete(state.shared, kAlignment);
    }
}

inline float half_to_float(uint32_t bits) {
    const uint16_t low = static_cast<uint16_t>(bits);
    _Float16 value;
    std::memcpy(&value, &low, 2);
    return static_cast<float>(value);
}
inline uint32_t double_to_half(double value) {
    const _Float16 rounded = static_cast<_Float16>(value);
    uint16_t bits;
    std::memcpy(&bits, &rounded, 2);
    return bits;
}
inline float bits_to_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline uint32_t float_to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}
inline uint32_t float_to_bfloat(float value) {
    const uint32_t bits = float_to_bits(value);
    return std::isnan(value) ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
}

struct Half {
    static uint32_t pack(float low, float high) { return pack_double(low, high); }
    static uint32_t pack_double(double low, double high) { return double_to_half(low) | double_to_half(high) << 16; }
    static float low(uint32_t v) { return half_to_float(v & 0xffff); }
    static float high(uint32_t v) { return half_to_float(v >> 16); }
};
struct Bfloat {
    static uint32_t pack(float low, float high) { return float_to_bfloat(low) | float_to_bfloat(high) << 16; }
    static float low(uint32_t v) { return bits_to_float(v << 16); }
    static float high(uint32_t v) { return bits_to_float(v & 0xffff0000u); }
};

// d += a b in the fragment layout of mma.m16n8k16: the registers of all lanes make the two matrices.
template <class T>
void mma(T, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    struct Fragments {
        uint32_t a[4], b[2];
    } own;
    std::memcpy(own.a, a, sizeof a);
    std::memcpy(own.b, b, sizeof b);
    const int lane = state.now % kWarp;
    const auto half = [](uint32_t pair, int k) { return k % 2 == 0 ? T::low(pair) : T::high(pair); };
    exchange(own, [&](auto of) {
        for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
            double sum = d[i];
            for (int k = 0; k < 16; ++k) {
                const Fragments left = of(row % 8 * 4 + k % 8 / 2), right = of(column * 4 + k % 8 / 2);
                sum += double(half(left.a[row / 8 + k / 8 * 2], k)) * half(right.b[k / 8], k);
            }
            d[i] = static_cast<float>(sum);
        }
        return 0;
    });
}

}  // namespace shim

#define threadIdx (shim::Dim{static_cast<unsigned>(shim::state.now)})
#define blockIdx (shim::Dim{shim::state.block_index})
#define gridDim (shim::Dim{shim::state.blocks})

inline void __syncthreads() { shim::meet_block(); }
inline void __syncwarp() { shim::meet_warp(); }
inline bool __syncthreads_or(bool vote) {
    shim::state.votes[shim::state.now] = vote;
    shim::meet_block();
    const auto& votes = shim::state.votes;
    const bool any = std::find(votes.begin(), votes.end(), true) != votes.end();
    shim::meet_block();
    return any;
}
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
    return shim::exchange(value, [&](auto of) { return of(lane); });
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    return shim::exchange(value, [&](auto of) { return of((shim::state.now % shim::kWarp) ^ mask); });
}
inline unsigned __ballot_sync(unsigned, bool vote) {
    return shim::exchange(vote, [&](auto of) {
        unsigned all = 0;
        for (int lane = 0; lane < shim::kWarp; ++lane) all |= unsigned{of(lane)} << lane;
        return all;
    });
}
inline void __threadfence() {}
inline uint32_t atomicAdd(uint32_t* p, uint32_t value) {
    const uint32_t before = *p;
    *p += value;
    return before;
}
template <class T>
T __ldcg(const T* p) {
    return *p;
}
inline int __ffs(unsigned v) { return __builtin_ffs(static_cast<int>(v)); }
inline int __clz(unsigned v) { return v == 0 ? 32 : __builtin_clz(v); }
inline uint32_t __float_as_uint(float v) { return shim::float_to_bits(v); }
inline float __uint_as_float(uint32_t v) { return shim::bits_to_float(v); }
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t bytes = uint64_t{b} << 32 | a;
    uint32_t out = 0;
    for (int i = 0; i < 4; ++i) out |= static_cast<uint32_t>(bytes >> (selector >> (4 * i) & 7) * 8 & 0xff) << (8 * i);
    return out;
}
using std::max;
using std::min;

#pragma GCC visibility push(default)
extern "C" {

// From now on blocks run in a random order that depends on `seed`; 0 for ascending order.
inline void gqsa_shim_shuffle(uint32_t seed) __attribute__((used));
inline void gqsa_shim_shuffle(uint32_t seed) {
    shim::state.shuffle = seed != 0;
    shim::state.random.seed(seed);
}

// What the kernel before would have written: garbage until a block waits for it. Null for none.
inline void gqsa_shim_inputs(void* memory, size_t bytes) __attribute__((used));
inline void gqsa_shim_inputs(void* memory, size_t bytes) {
    shim::state.inputs = static_cast<char*>(memory);
    shim::state.saved.assign(shim::state.inputs, shim::state.inputs + (memory == nullptr ? 0 : bytes));
}
}
#pragma GCC visibility pop
