// Repacks a matrix from the checkpoint's order into slabs (slab.h), and back. Runs on the CPU while a model is loaded.
#include "slab.h"

#include "parallel.h"

#include <algorithm>
#include <numeric>
#include <vector>

namespace gqsa {
namespace {

constexpr int kCodeBit[8] = {0, 16, 4, 20, 8, 24, 12, 28};
constexpr int kBanks = 8;  // 16-byte words in a pass of shared memory, and lanes that read in one

// A matrix in the checkpoint's order; sizes are in stored groups, of which a group of 128 is two.
struct Source {
    const int32_t* crow_indices;
    const uint8_t* group_mask;
    const uint8_t* qweight;
    const uint16_t* scale_zero;
    int64_t rows, mask_stride;
    int32_t columns, group_size, split;  // split: stored groups a group of the checkpoint

    int32_t length(int64_t row) const { return (crow_indices[row + 1] - crow_indices[row]) * split; }
    bool kept(int64_t row, int32_t column) const {
        const int32_t group = column / split;
        return group_mask[row * mask_stride + group / 8] >> (group % 8) & 1;
    }
};

// The columns of one row that are still to be placed, as bits, and how many of the row's groups lie before each word.
struct Remaining {
    std::vector<uint64_t> left, all;
    std::vector<int32_t> before;
    size_t first = 0;  // word that holds the lowest column left

    void read(const Source& source, int64_t row) {
        const size_t words = (source.columns + 63) / 64;
        all.assign(words, 0);
        before.assign(words, 0);
        for (int32_t c = 0; c < source.columns; ++c) all[c / 64] |= uint64_t{source.kept(row, c)} << (c % 64);
        for (size_t w = 1; w < words; ++w) before[w] = before[w - 1] + __builtin_popcountll(all[w - 1]);
        left = all;
        first = 0;
        advance();
    }
    void advance() {
        while (first < left.size() && left[first] == 0) ++first;
    }
    // Lowest column left; INT32_MAX if there is none.
    int32_t lowest() const {
        return first < left.size() ? static_cast<int32_t>(first * 64) + __builtin_ctzll(left[first]) : INT32_MAX;
    }
    // Lowest column left below `end` whose number modulo 8 is in the 8-bit set `banks`; -1 if there is none.
    int32_t find(uint32_t banks, int32_t end) const {
        const uint64_t pattern = banks * 0x0101010101010101u;
        for (size_t w = first; w < left.size() && static_cast<int32_t>(w * 64) < end; ++w) {
            if (const uint64_t found = left[w] & pattern) {
                const int32_t column = static_cast<int32_t>(w * 64) + __builtin_ctzll(found);
                return column < end ? column : -1;
            }
        }
        return -1;
    }
    void take(int32_t column) {
        left[column / 64] &= ~(uint64_t{1} << (column % 64));
        advance();
    }
    // Which of the row's groups, in the checkpoint's order, stands in `column`.
    int32_t rank(int32_t column) const {
        const uint64_t below = all[column / 64] & ((uint64_t{1} << (column % 64)) - 1);
        return before[column / 64] + __builtin_popcountll(below);
    }
};

// What the lanes of one panel take, step after step: a column or -1.
struct Schedule {
    std::vector<int64_t> rows;     // up to kPanelRows
    std::vector<int32_t> bases;    // [steps]
    std::vector<int32_t> columns;  // [steps][groups a record][kPanelRows]
    std::vector<Remaining> lanes;  // for ranks
};

// How far beyond the lowest column left a lane may reach for a free bank. Reaching far would spread the columns of a
// record over more of the row than the kernel for many tokens can hold.
int32_t reach(int32_t group_size) { return std::max(48, 768 / group_size); }

// One group for every lane of a panel. Lanes that read together choose in turn, those furthest behind first, the lowest
// column whose bank is free; where there is none, the lowest column.
void place(Schedule& schedule, int32_t limit, int32_t far, int32_t* out) {
    for (int first = 0; first < kPanelRows; first += kBanks) {
        int order[kBanks], count = 0;
        int32_t lowest[kBanks];
        for (int i = 0; i < kBanks; ++i) {
            out[first + i] = -1;
            if (first + i >= static_cast<int>(schedule.lanes.size())) continue;
            lowest[i] = schedule.lanes[first + i].lowest();
            if (lowest[i] < limit) order[count++] = i;
        }
        std::sort(order, order + count, [&](int a, int b) { return lowest[a] < lowest[b]; });
        uint32_t free = (1 << kBanks) - 1;
        for (int k = 0; k < count; ++k) {
            const int i = order[k];
            Remaining& lane = schedule.lanes[first + i];
            int32_t column = lane.find(free, std::min(limit, lowest[i] + far));
            if (column < 0) column = lowest[i];
            free &= ~(1u << (column % kBanks));
            lane.take(column);
            out[first + i] = column;
        }
    }
}

Schedule schedule_panel(const Source& source, const int64_t* rows, int64_t count) {
    Schedule schedule;
    schedule.rows.assign(rows, rows + count);
    schedule.lanes.resize(count);
    int32_t left = 0;
    for (int64_t i = 0; i < count; ++i) {
        schedule.lanes[i].read(source, rows[i]);
        left += source.length(rows[i]);
    }
    const int groups = kRecordWeights / source.group_size;
    // Every slab has a record, so that every row gets its sum, which is zero without any group.
    do {
        int32_t base = INT32_MAX;
        for (const Remaining& lane : schedule.lanes) base = std::min(base, lane.lowest());
        if (base == INT32_MAX) base = 0;
        schedule.bases.push_back(base);
        const size_t at = schedule.columns.size();
        schedule.columns.resize(at + static_cast<size_t>(groups) * kPanelRows);
        for (int j = 0; j < groups; ++j) {
            int32_t* out = schedule.columns.data() + at + static_cast<size_t>(j) * kPanelRows;
            place(schedule, base + kColumnWindow, reach(source.group_size), out);
            left -= static_cast<int32_t>(std::count_if(out, out + kPanelRows, [](int32_t c) { return c >= 0; }));
        }
    } while (left > 0);
    return schedule;
}

// Rows in the order of the lanes.
std::vector<int64_t> sort_rows(const Source& source) {
    std::vector<int64_t> order(source.rows);
    std::iota(order.begin(), order.end(), int64_t{0});
    for (int64_t begin = 0; begin < source.rows; begin += kSortRows) {
        const int64_t end = std::min<int64_t>(source.rows, begin + kSortRows);
        std::stable_sort(order.begin() + begin, order.begin() + end,
                         [&](int64_t a, int64_t b) { return source.length(a) > source.length(b); });
    }
    return order;
}

}  // namespace

// Everything that is known before there is memory to write to.
struct SlabPlan {
    Source source;
    std::vector<Schedule> panels;
    std::vector<int32_t> slab_ptr{0};
};

// Where a packed matrix lies; all pointers may be written to.
struct SlabTensors {
    uint32_t* codes;
    uint16_t* scale_zero;
    uint8_t* columns;
    uint32_t* heads;
    int32_t* slab_ptr;
    int32_t* rows;
};

namespace {

// Eight codes from four bytes of the checkpoint.
uint32_t pack_word(const uint8_t* bytes) {
    uint32_t word = 0;
    for (int i = 0; i < 8; ++i) word |= uint32_t(bytes[i / 2] >> (i % 2 * 4) & 15) << kCodeBit[i];
    return word;
}

void unpack_word(uint32_t word, uint8_t* bytes) {
    for (int i = 0; i < 8; i += 2) {
        bytes[i / 2] = static_cast<uint8_t>((word >> kCodeBit[i] & 15) | (word >> kCodeBit[i + 1] & 15) << 4);
    }
}

// Word `word` of a lane's record, in the codes.
size_t word_at(int64_t record, int lane, int word) {
    return static_cast<size_t>(((record * 2 + word / 4) * kLanes + lane) * 4 + word % 4);
}

void fill_panel(const SlabPlan& plan, size_t panel, const SlabTensors& to) {
    const Source& source = plan.source;
    const Schedule& schedule = plan.panels[panel];
    const int groups = kRecordWeights / source.group_size, words = source.group_size / 8;
    const int64_t slabs = static_cast<int64_t>(plan.slab_ptr.size()) - 1, steps = static_cast<int64_t>(schedule.bases.size());
    for (int half = 0; half < 2; ++half) {
        const int64_t slab = static_cast<int64_t>(panel) * 2 + half;
        if (slab >= slabs) break;
        for (int64_t step = 0; step < steps; ++step) {
            const int64_t record = plan.slab_ptr[slab] + step;
            const int32_t base = schedule.bases[step];
            to.heads[record] = make_head(static_cast<uint32_t>(slab), base, step == 0, step + 1 == steps);
            for (int j = 0; j < groups; ++j) {
                for (int lane = 0; lane < kLanes; ++lane) {
                    const int row = half * kLanes + lane;
                    const int32_t column = schedule.columns[(step * groups + j) * kPanelRows + row];
                    const size_t at = static_cast<size_t>((record * kLanes + lane) * groups + j);
                    to.columns[at] = static_cast<uint8_t>(column < 0 ? 0 : column - base);
                    to.scale_zero[at] = 0;
                    for (int w = 0; w < words; ++w) to.codes[word_at(record, lane, j * words + w)] = 0;
                    if (column < 0) continue;
                    const int64_t first = int64_t{source.crow_indices[schedule.rows[row]]} * source.split;
                    const int64_t group = first + schedule.lanes[row].rank(column);
                    to.scale_zero[at] = source.scale_zero[group / source.split];
                    const uint8_t* bytes = source.qweight + group * source.group_size / 2;
                    for (int w = 0; w < words; ++w) {
                        to.codes[word_at(record, lane, j * words + w)] = pack_word(bytes + w * 4);
                    }
                }
            }
        }
        for (int lane = 0; lane < kLanes; ++lane) {
            const size_t row = half * kLanes + lane;
            to.rows[slab * kLanes + lane] = row < schedule.rows.size() ? static_cast<int32_t>(schedule.rows[row]) : -1;
        }
    }
}

// Calls f(index) for all of 0..count on `threads` threads.
template <class F>
void for_each(ParallelFor parallel_for, int64_t threads, int64_t count, F f) {
    const int64_t shares = std::clamp<int64_t>(threads, 1, std::max<int64_t>(count, 1));
    in_parallel(parallel_for, shares, [&](int64_t share) {
        const int64_t end = share_begin(count, shares, share + 1);
        for (int64_t i = share_begin(count, shares, share); i < end; ++i) f(i);
    });
}

}  // namespace
}  // namespace gqsa

using namespace gqsa;

#pragma GCC visibility push(default)
extern "C" {

// Lays out a valid matrix of [rows, columns * group_size] weights; the tensors must live until the plan is freed.
SlabPlan* gqsa_slab_plan(const int32_t* crow_indices, const uint8_t* group_mask, const uint8_t* qweight,
                         const uint16_t* scale_zero, int64_t rows, int64_t mask_stride, int32_t columns,
                         int32_t group_size, int64_t threads, ParallelFor parallel_for) {
    const int32_t stored = stored_group_size(group_size), split = group_size / stored;
    auto* plan = new SlabPlan{
        {crow_indices, group_mask, qweight, scale_zero, rows, mask_stride, columns * split, stored, split}, {}, {0}};
    const std::vector<int64_t> order = sort_rows(plan->source);
    plan->panels.resize((rows + kPanelRows - 1) / kPanelRows);
    for_each(parallel_for, threads, static_cast<int64_t>(plan->panels.size()), [&](int64_t panel) {
        const int64_t begin = panel * kPanelRows, count = std::min<int64_t>(kPanelRows, rows - begin);
        plan->panels[panel] = schedule_panel(plan->source, order.data() + begin, count);
    });
    for (const Schedule& panel : plan->panels) {
        const int slabs = panel.rows.size() > kLanes ? 2 : 1;
        for (int i = 0; i < slabs; ++i) {
            plan->slab_ptr.push_back(plan->slab_ptr.back() + static_cast<int32_t>(panel.bases.size()));
        }
    }
    return plan;
}

int64_t gqsa_slab_records(const SlabPlan* plan) { return plan->slab_ptr.back(); }

// Writes what was planned; the tensors have the shapes of slab.h.
void gqsa_slab_fill(const SlabPlan* plan, const SlabTensors* to, int64_t threads, ParallelFor parallel_for) {
    std::copy(plan->slab_ptr.begin(), plan->slab_ptr.end(), to->slab_ptr);
    for_each(parallel_for, threads, static_cast<int64_t>(plan->panels.size()),
             [&](int64_t panel) { fill_panel(*plan, panel, *to); });
}

void gqsa_slab_free(SlabPlan* plan) { delete plan; }

// The inverse, crow_indices being known: fills qweight, scale_zero and group_mask, which is all zero before.
void gqsa_slab_unpack(const SlabTensors* from, int64_t slabs, const int32_t* crow_indices, int64_t mask_stride,
                      int32_t columns, int32_t group_size, uint8_t* group_mask, uint8_t* qweight, uint16_t* scale_zero) {
    const int32_t stored = stored_group_size(group_size), split = group_size / stored;
    const int groups = kRecordWeights / stored, words = stored / 8;
    const Source source{crow_indices, group_mask, nullptr, nullptr, 0, mask_stride, columns * split, stored, split};
    Remaining order;
    // Calls f(record, j, entry, column) for every group of a lane.
    const auto visit = [&](int64_t slab, int lane, auto f) {
        for (int64_t record = from->slab_ptr[slab]; record < from->slab_ptr[slab + 1]; ++record) {
            for (int j = 0; j < groups; ++j) {
                const size_t entry = static_cast<size_t>((record * kLanes + lane) * groups + j);
                if (from->scale_zero[entry] == 0) continue;
                f(record, j, entry, head_base(from->heads[record]) + from->columns[entry]);
            }
        }
    };
    for (int64_t at = 0; at < slabs * kLanes; ++at) {
        const int64_t row = from->rows[at], slab = at / kLanes;
        const int lane = static_cast<int>(at % kLanes);
        if (row < 0) continue;
        visit(slab, lane, [&](int64_t, int, size_t, int32_t column) {
            group_mask[row * mask_stride + column / split / 8] |= static_cast<uint8_t>(1 << (column / split % 8));
        });
        order.read(source, row);
        visit(slab, lane, [&](int64_t record, int j, size_t entry, int32_t column) {
            const int64_t group = int64_t{crow_indices[row]} * split + order.rank(column);
            scale_zero[group / split] = from->scale_zero[entry];
            uint8_t* bytes = qweight + group * stored / 2;
            for (int w = 0; w < words; ++w) unpack_word(from->codes[word_at(record, lane, j * words + w)], bytes + w * 4);
        });
    }
}

}  // extern "C"
#pragma GCC visibility pop
