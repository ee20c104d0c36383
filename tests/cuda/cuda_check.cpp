// The CUDA kernels over shim.h on random cases against float64, without Python or torch, for sanitizers: every buffer has
// exactly the size that the interface asks for. Argument: number of cases.
#include "../../csrc/common/slab.cpp"
// After slab.cpp, whose namespace it uses.
#include "../../csrc/cuda/cuda.cu"
#include "../kernels/random_matrix.h"

namespace {

struct Packed {
    std::vector<uint32_t> codes, heads, counters;
    std::vector<uint16_t> scale_zero;
    std::vector<uint8_t> columns;
    std::vector<int32_t> slab_ptr, rows, lanes;
    gqsa::cuda::Weight weight;
};

// Vectors are at least 16 bytes aligned, as the kernels need.
void pack(const Matrix& m, Packed& p) {
    gqsa::SlabPlan* plan = gqsa_slab_plan(m.crow_indices.data(), m.mask.data(), m.qweight.data(), m.scale_zero.data(), m.rows,
                                          (m.groups + 7) / 8, m.groups, m.group_size, 1, nullptr);
    const int64_t records = gqsa_slab_records(plan), slabs = (m.rows + 31) / 32;
    const int stored = gqsa::stored_group_size(m.group_size), groups = 64 / stored;
    p.codes.resize(records * 256), p.heads.resize(records), p.counters.resize(slabs);
    p.scale_zero.resize(records * 32 * groups), p.columns.resize(records * 32 * groups);
    p.slab_ptr.resize(slabs + 1), p.rows.resize(slabs * 32), p.lanes.resize(m.rows);
    const gqsa::SlabTensors to{p.codes.data(), p.scale_zero.data(), p.columns.data(), p.heads.data(), p.slab_ptr.data(), p.rows.data()};
    gqsa_slab_fill(plan, &to, 1, nullptr);
    gqsa_slab_free(plan);
    for (size_t i = 0; i < p.rows.size(); ++i) {
        if (p.rows[i] >= 0) p.lanes[p.rows[i]] = static_cast<int32_t>(i);
    }
    p.weight = {p.codes.data(), p.scale_zero.data(), p.columns.data(), p.heads.data(), p.slab_ptr.data(), p.rows.data(),
                p.lanes.data(), p.counters.data(), int32_t(records), int32_t(slabs), m.rows, m.columns, stored};
}

bool unpacked_alike(const Matrix& m, Packed& p) {
    std::vector<uint8_t> mask(m.mask.size()), qweight(m.qweight.size());
    std::vector<uint16_t> scale_zero(m.scale_zero.size());
    const gqsa::SlabTensors from{p.codes.data(), p.scale_zero.data(), p.columns.data(), p.heads.data(), p.slab_ptr.data(), p.rows.data()};
    gqsa_slab_unpack(&from, p.weight.slabs, m.crow_indices.data(), (m.groups + 7) / 8, m.groups, m.group_size, mask.data(),
                     qweight.data(), scale_zero.data());
    return mask == m.mask && qweight == m.qweight && scale_zero == m.scale_zero;
}

double to_double(uint16_t bits, bool bfloat) { return bfloat ? shim::Bfloat::low(bits) : shim::half_to_float(bits); }

// Largest error, of what the products' magnitudes add up to.
double multiply(const Matrix& m, Packed& p, bool gemm, bool bfloat) {
    const int tokens = gemm ? 1 + below(64) : 1 + below(8), sizes[] = {1, 2, 4, 8, 16, 32, 64};
    const int padded = *std::lower_bound(sizes + (gemm ? 4 : 0), sizes + 7, tokens);
    const int blocks = 1 + below(std::min(p.weight.records, 7)), by_slab = !gemm && below(4) == 0;
    std::vector<uint16_t> x(tokens * m.columns), bias(m.rows), y(tokens * m.rows, 0x7fff);
    const auto draw = [&] {
        const float value = std::normal_distribution<float>()(rng);
        return static_cast<uint16_t>(bfloat ? shim::Bfloat::pack(value, 0) : shim::Half::pack(value, 0));
    };
    std::generate(x.begin(), x.end(), draw);
    std::generate(bias.begin(), bias.end(), draw);
    std::vector<float> workspace(static_cast<size_t>(blocks) * 2 * (gemm ? 64 : 32) * padded, NAN);
    const auto dtype = bfloat ? gqsa::cuda::Dtype::bfloat16 : gqsa::cuda::Dtype::float16;
    const gqsa::cuda::Product product{x.data(), bias.data(), y.data(), workspace.data(), m.columns, m.rows, tokens, dtype};
    gqsa_shim_shuffle(rng());
    gqsa_shim_inputs(x.data(), x.size() * 2);
    if (gemm) gqsa_cuda_gemm(&p.weight, &product, blocks, 1, nullptr);
    else gqsa_cuda_gemv(&p.weight, &product, blocks, by_slab, 1, nullptr);
    gqsa_shim_inputs(nullptr, 0);
    double worst = 0;
    for (int t = 0; t < tokens; ++t) {
        for (int r = 0; r < m.rows; ++r) {
            double exact = to_double(bias[r], bfloat), size = std::abs(exact);
            for (int k = 0; k < m.columns; ++k) {
                const double term = to_double(x[t * m.columns + k], bfloat) * m.dense[r * m.columns + k];
                exact += term, size += std::abs(term);
            }
            const double error = std::abs(to_double(y[t * m.rows + r], bfloat) - exact) / std::max(size, 1e-3);
            worst = error <= worst ? worst : error;  // NaN too
        }
    }
    return worst;
}

bool expanded_alike(const Matrix& m, Packed& p) {
    std::vector<float> out(m.dense.size());
    gqsa_cuda_expand(&p.weight, 0, p.weight.slabs, 0, 0, out.data(), nullptr);
    const std::vector<int64_t> ids{m.rows - 1, 0};
    std::vector<float> rows(ids.size() * m.columns);
    gqsa_cuda_look_up(&p.weight, ids.data(), 2, 0, rows.data(), nullptr);
    return std::equal(out.begin(), out.end(), m.dense.begin()) &&
           std::equal(rows.begin(), rows.begin() + m.columns, m.dense.end() - m.columns) &&
           std::equal(rows.begin() + m.columns, rows.end(), m.dense.begin());
}

void check_partition() {
    for (int total = 0; total < 40; ++total) {
        for (int shares = 1; shares < 45; ++shares) {
            for (int share = 0; share < shares; ++share) {
                for (int unit = gqsa::share_begin(total, shares, share); unit < gqsa::share_begin(total, shares, share + 1); ++unit) {
                    if (gqsa::share_of(total, shares, unit) != share) std::abort();
                }
            }
            if (gqsa::share_begin(total, shares, shares) != total) std::abort();
        }
    }
}

}  // namespace

int main(int, char** arguments) {
    check_partition();
    const int cases = std::atoi(arguments[1]);
    for (int i = 0; i < cases; ++i) {
        const Matrix m = random_matrix();
        Packed p;
        pack(m, p);
        const bool gemm = below(2), bfloat = below(2);
        const double error = multiply(m, p, gemm, bfloat);
        const bool clean = std::all_of(p.counters.begin(), p.counters.end(), [](uint32_t c) { return c == 0; });
        if (!(error < (bfloat ? 6e-3 : 1.5e-3)) || !clean || !unpacked_alike(m, p) || !expanded_alike(m, p)) {
            std::printf("case %d: %d x %d, groups of %d, %s in %s: error %g, counters %s\n", i, m.rows, m.columns, m.group_size,
                        gemm ? "gemm" : "gemv", bfloat ? "bfloat16" : "float16", error, clean ? "zero" : "not zero");
            return 1;
        }
    }
    std::printf("%d cases\n", cases);
}
