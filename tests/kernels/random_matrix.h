// A random matrix in the checkpoint's order, and what it stands for: for the programs that check native kernels.
#pragma once

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

namespace {

std::mt19937 rng(1);

int below(int limit) { return static_cast<int>(rng() % limit); }

struct Matrix {
    int group_size, rows, groups, columns;
    std::vector<int32_t> crow_indices{0};
    std::vector<uint8_t> mask, qweight;
    std::vector<uint16_t> scale_zero;
    std::vector<double> dense;
};

Matrix random_matrix() {
    const int sizes[] = {8, 16, 32, 64, 128};
    Matrix m;
    m.group_size = sizes[below(5)];
    m.rows = 1 + below(below(2) ? 8 : 140);
    m.groups = 1 + below(below(2) ? 5 : 90);
    m.columns = m.groups * m.group_size;
    const int stride = (m.groups + 7) / 8, density = below(11);
    m.mask.resize(m.rows * stride);
    m.dense.resize(m.rows * m.columns);
    for (int row = 0; row < m.rows; ++row) {
        const int keep_of_ten = below(4) ? density : below(2) * 10;  // some rows empty or full
        for (int group = 0; group < m.groups; ++group) {
            if (below(10) >= keep_of_ten) continue;
            m.mask[row * stride + group / 8] |= 1 << (group % 8);
            const uint16_t word = static_cast<uint16_t>((0x100 + below(0x400)) << 4 | below(16));
            const double scale = std::ldexp(1 + (word >> 4 & 127) / 128.0, (word >> 11) - 15);
            m.scale_zero.push_back(word);
            for (int i = 0; i < m.group_size; i += 2) {
                const int low = below(16), high = below(16);
                m.qweight.push_back(static_cast<uint8_t>(low | high << 4));
                double* at = &m.dense[row * m.columns + group * m.group_size + i];
                at[0] = scale * (low - (word & 15));
                at[1] = scale * (high - (word & 15));
            }
        }
        m.crow_indices.push_back(static_cast<int32_t>(m.scale_zero.size()));
    }
    return m;
}

}  // namespace
