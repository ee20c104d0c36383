// Every kernel of csrc/cpu on random cases against float64, without Python or torch, for sanitizers and valgrind: every
// buffer has exactly the size that the interface asks for. Arguments: number of cases, then kernels to leave out.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/common/parallel.h"
#include "../../csrc/cpu/kernel.h"
#include "random_matrix.h"

using gqsa::ParallelFor;
using gqsa::Task;
using gqsa::cpu::Weight;

extern "C" {
const char* gqsa_cpu_kernel(int32_t);
int32_t gqsa_cpu_supported(int32_t);
void gqsa_cpu_linear(int32_t, const Weight*, const void*, int64_t, int64_t, int32_t, const void*, void*, int64_t,
                     ParallelFor);
void gqsa_cpu_dequantize(int32_t, const Weight*, int64_t, int64_t, int32_t, void*, int64_t, ParallelFor);
void gqsa_cpu_pack(const Weight*, const uint8_t*, const uint8_t*, const uint16_t*, int64_t, ParallelFor);
void gqsa_cpu_unpack(const uint16_t*, int64_t, uint8_t*);
}

namespace {

int32_t on_threads(int64_t begin, int64_t end, int64_t, Task task, void* context) {
    std::vector<std::thread> threads;
    for (int64_t i = begin; i < end; ++i) threads.emplace_back(task, i, i + 1, context);
    for (std::thread& thread : threads) thread.join();
    return 0;
}

[[noreturn]] void fail(const char* kernel, const char* what, const Matrix& m, int tokens) {
    std::printf("%s: %s: %d x %d, group size %d, %d tokens\n", kernel, what, m.rows, m.columns, m.group_size, tokens);
    std::exit(1);
}

void check(const Matrix& m, const Weight& weight, int32_t index, const char* name) {
    const bool bfloat16 = std::strcmp(name, "avx512_bf16") == 0, int8 = std::strcmp(name, "avx512_vnni") == 0;
    const int tokens = 1 + below(below(2) ? 3 : 40), threads = 1 + below(3), stride = m.columns + below(2) * 3;
    std::vector<float> x(stride * (tokens - 1) + m.columns), bias(m.rows);
    std::normal_distribution<float> normal;
    // Few enough bits that bfloat16 holds them too.
    for (float& value : x) value = std::round(normal(rng) * 16) / 16;
    for (float& value : bias) value = std::round(normal(rng) * 16) / 16;
    const auto halves = [](const std::vector<float>& values) {
        std::vector<uint16_t> out;
        for (float value : values) {
            uint32_t bits;
            std::memcpy(&bits, &value, 4);
            out.push_back(static_cast<uint16_t>(bits >> 16));
        }
        return out;
    };
    std::vector<float> y(tokens * m.rows, NAN);
    if (bfloat16) {
        const auto x16 = halves(x), bias16 = halves(bias);
        std::vector<uint16_t> y16(tokens * m.rows);
        gqsa_cpu_linear(index, &weight, x16.data(), stride, tokens, 1, bias16.data(), y16.data(), threads, on_threads);
        for (size_t i = 0; i < y.size(); ++i) {
            const uint32_t bits = uint32_t{y16[i]} << 16;
            std::memcpy(&y[i], &bits, 4);
        }
    } else {
        gqsa_cpu_linear(index, &weight, x.data(), stride, tokens, 0, bias.data(), y.data(), threads, on_threads);
    }
    const double limit = bfloat16 ? 4e-3 : int8 ? 2e-2 : 1e-6;
    for (int t = 0; t < tokens; ++t) {
        for (int row = 0; row < m.rows; ++row) {
            double sum = bias[row], size = std::abs(bias[row]), largest = 0;
            for (int k = 0; k < m.columns; ++k) {
                const double product = m.dense[row * m.columns + k] * x[t * stride + k];
                sum += product;
                size += std::abs(product);
                largest = std::max(largest, std::abs(double{x[t * stride + k]}));
            }
            if (int8) {  // rounding to int8 is as large for small activations as for the largest
                for (int k = 0; k < m.columns; ++k) size += std::abs(m.dense[row * m.columns + k]) * largest;
            }
            if (!(std::abs(y[t * m.rows + row] - sum) <= limit * size)) fail(name, "wrong result", m, tokens);
        }
    }
    std::vector<float> dense(m.rows * m.columns, NAN);
    gqsa_cpu_dequantize(index, &weight, 0, m.rows, 0, dense.data(), threads, on_threads);
    for (size_t i = 0; i < dense.size(); ++i) {
        if (dense[i] != m.dense[i]) fail(name, "wrong weight", m, tokens);
    }
}

}  // namespace

int main(int count, char** arguments) {
    const int cases = std::atoi(arguments[1]);
    const std::set<std::string> left_out(arguments + 2, arguments + count);
    int done = 0;
    for (int i = 0; i < cases; ++i) {
        const Matrix m = random_matrix();
        std::vector<uint16_t> words((m.qweight.size() + 63) / 64 * 32), scale_zero(m.scale_zero.size());
        std::vector<uint8_t> mask(m.mask.size()), qweight(m.qweight.size());
        const int stride = (m.groups + 7) / 8;
        const Weight weight{m.crow_indices.data(), mask.data(), words.data(), scale_zero.data(), m.rows,
                            m.columns,             stride,      m.group_size};
        gqsa_cpu_pack(&weight, m.mask.data(), m.qweight.data(), m.scale_zero.data(), 1 + below(3), on_threads);
        gqsa_cpu_unpack(words.data(), qweight.size(), qweight.data());
        if (qweight != m.qweight) fail("pack", "not undone", m, 0);
        for (int32_t index = 0; const char* name = gqsa_cpu_kernel(index); ++index) {
            const bool units = std::strncmp(name, "avx512_", 7) == 0;  // these work in units of 16
            if (left_out.count(name) || !gqsa_cpu_supported(index) || (units && m.group_size < 16)) continue;
            check(m, weight, index, name);
            ++done;
        }
    }
    std::printf("%d checks\n", done);
    return 0;
}
