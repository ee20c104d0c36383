// Plain C++ for any processor; the compiler makes what vectors it can of it.
#include "rows.h"

namespace gqsa::cpu {
namespace {

struct Multiply {
    template <int G, int Tokens>
    static void run(const Call& call, const Row& row, int64_t token, float* sums) {
        constexpr int length = unit_size(G), parts = units_per_group(G);
        const Weight& weight = call.weight;
        const int64_t bytes = bytes_per_offset<Tokens, float>(call);
        float lanes[Tokens][16] = {};
        for (int64_t unit = row.begin; unit < row.end; ++unit) {
            const uint16_t scale_zero = weight.scale_zero[unit / parts];
            const float scale = scale_of(scale_zero);
            const int zero = scale_zero & 15;
            const int64_t whole = G < 16 ? unit / 2 : unit;
            const int shift = 4 * (whole >> 1 & 3);
            const uint16_t* words = weight.words + (whole >> 3) * 32 + (whole & 1) * 16 + (G < 16 ? (unit & 1) * 8 : 0);
            const char* x = static_cast<const char*>(call.x) + row.offsets[unit - (row.begin & ~15)] * bytes;
            float values[length];
            for (int i = 0; i < length; ++i) values[i] = scale * static_cast<float>((words[i] >> shift & 15) - zero);
            for (int m = 0; m < Tokens; ++m) {
                const float* xm = reinterpret_cast<const float*>(x) + (token + m) * length;
                for (int i = 0; i < length; ++i) lanes[m][i] += values[i] * xm[i];
            }
        }
        for (int m = 0; m < Tokens; ++m) {
            float* lane = lanes[m];
            for (int width = 8; width; width /= 2) {
                for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
            }
            sums[m] = lane[0];
        }
    }
};

void multiply(const Call& call, int64_t begin, int64_t end, uint16_t* offsets) {
    for_group_size(call.weight.group_size, [&](auto size) {
        for_rows<Multiply, size>(call, begin, end, offsets, AppendOffsets<size>{});
    });
}

}  // namespace

const Kernel portable{"portable", [] { return true; }, Operand::float32, 1, multiply, dequantize};

}  // namespace gqsa::cpu
