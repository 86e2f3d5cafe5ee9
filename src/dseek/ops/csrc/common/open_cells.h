// Which cells the rows of a strip open: those whose share of some head's attention mass reaches a bound.
//
// A row opens what it finds worth it, and later rows of the strip keep it: a block that is in the cache already costs
// them little, and no row depends on a later one.
#pragma once

#include <algorithm>
#include <vector>

#include "attention_portable.h"
#include "kernels.h"
#include "vec.h"

namespace dseek {
namespace DSEEK_VARIANT {

constexpr float kNoMass = -1e30f;  // base-2 logarithm of no mass at all

inline void pack_cells(const float* const* cells, int count, int dim, bool, void* page) {
    auto* keys = static_cast<float*>(page);
    for (int i = 0; i < dim; ++i) {
        for (int slot = 0; slot < kPageTokens; ++slot)
            keys[i * kPageTokens + slot] = slot < count ? cells[slot][i] : 0.f;
    }
}

inline void score_strip(const float* query, int dim, bool, const void* pages, int num_pages, float* scores) {
    const auto* keys = static_cast<const float*>(pages);
    for (int page = 0; page < num_pages; ++page) {
        const float* cells = keys + static_cast<size_t>(page) * dim * kPageTokens;
        float* target = scores + static_cast<size_t>(page) * kStripRows * kPageTokens;
        for (int part = 0; part < kPageTokens; part += 16) {
            static_assert(kStripRows % 4 == 0);
            for (int row = 0; row < kStripRows; row += 4) {
                multiply_rows<4>(query + row * dim, dim, cells + part, kPageTokens, dim,
                                 target + row * kPageTokens + part, kPageTokens, false);
            }
        }
    }
}

inline float sum_of_lanes(f32x16 value) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps(reinterpret_cast<__m512>(value));
#else
    return sum(value);
#endif
}

inline void score_row(const RowScoreCall& call) {
    for (int i = 0; i < call.count; ++i) {
        for (int head = 0; head < call.num_heads; ++head) {
            const float* query = call.query + head * call.query_stride;
            f32x16 total{};
            for (int at = 0; at < call.dim; at += 16) total += load(query + at) * load(call.cells[i] + at);
            *call.place(head, i) = sum_of_lanes(total);
        }
    }
}

// Base-2 logarithm of the sum of 2^score over the cells that `counts(v)` picks, 16 at a time, and of `rest`. `scores`
// are a row's, already with their bias.
template <class Counts>
float log_mass(const float* scores, int vectors, float rest, const Counts& counts) {
    f32x16 largest = splat(rest);
    for (int v = 0; v < vectors; ++v) {
        const f32x16 score = load(scores + v * 16);
        largest = max(largest, select(counts(v), score, splat(kNoMass)));
    }
    const float peak = largest_lane(largest);
    if (!(peak > kNoMass)) return kNoMass;
    f32x16 total{};
    for (int v = 0; v < vectors; ++v) {
        const f32x16 mass = exp2(load(scores + v * 16) - peak);
        total += select(counts(v), mass, f32x16{});
    }
    return peak + std::log2(sum_of_lanes(total) + std::exp2(rest - peak));
}

inline void open_cells(const OpenCall& call) {
    struct Found {
        float over;
        int place;
    };
    thread_local std::vector<Found> found;
    thread_local std::vector<int32_t> seen_from, opened_from;
    thread_local std::vector<float> row_scores;  // [heads][cells]
    const int cells = call.num_pages * kPageTokens, vectors = cells / 16;
    const size_t page_floats = static_cast<size_t>(kStripRows) * kPageTokens,
                 head_floats = page_floats * call.num_pages;
    seen_from.assign(call.seen_from, call.seen_from + cells);
    opened_from.assign(call.opened_from, call.opened_from + cells);
    row_scores.resize(static_cast<size_t>(call.num_heads) * cells);
    int opened = 0;
    for (int i = 0; i < cells; ++i) opened += opened_from[i] < kStripRows;
    for (int row = call.row_begin; row < call.row_end; ++row) {
        const auto seen = [&](int v) { return load(seen_from.data() + v * 16) <= row; };
        float floor[kMostHeadsOfGroup];
        for (int head = 0; head < call.num_heads; ++head) {
            float* scores = row_scores.data() + static_cast<size_t>(head) * cells;
            const float* source = call.scores + head * head_floats + row * kPageTokens;
            for (int v = 0; v < vectors; ++v) {
                store(scores + v * 16, load(source + v / 4 * page_floats + v % 4 * 16) + load(call.bias + v * 16));
            }
            floor[head] = call.log_share + log_mass(scores, vectors, call.rest[head * kStripRows + row], seen);
        }
        found.clear();
        for (int v = 0; v < vectors && opened < call.most; ++v) {
            f32x16 over = splat(kNoMass);
            for (int head = 0; head < call.num_heads; ++head) {
                over = max(over, load(row_scores.data() + static_cast<size_t>(head) * cells + v * 16) - floor[head]);
            }
            const i32x16 is_closed = load(opened_from.data() + v * 16) == static_cast<int32_t>(kNeverOpened);
            const i32x16 opens = (over >= 0.f) & seen(v) & is_closed;
            if (!any_lane(opens)) continue;
            for (int lane = 0; lane < 16; ++lane) {
                if (opens[lane] != 0) found.push_back({over[lane], v * 16 + lane});
            }
        }
        const auto room = static_cast<size_t>(std::max(0, call.most - opened));
        if (found.size() > room) {
            // The largest shares win, among equal ones the earlier cell.
            std::sort(found.begin(), found.end(), [](const Found& a, const Found& b) {
                return a.over > b.over || (a.over == b.over && a.place < b.place);
            });
            found.resize(room);
        }
        for (const Found& cell : found) opened_from[cell.place] = row;
        opened += static_cast<int>(found.size());
        if (!call.pass_on) continue;
        const auto closed = [&](int v) { return seen(v) & (load(opened_from.data() + v * 16) > row); };
        for (int head = 0; head < call.num_heads; ++head) {
            float& rest = call.rest[head * kStripRows + row];
            rest = log_mass(row_scores.data() + static_cast<size_t>(head) * cells, vectors, rest, closed);
        }
    }
    for (int i = 0; i < cells; ++i) call.opened_from[i] = static_cast<uint8_t>(opened_from[i]);
}

}  // namespace DSEEK_VARIANT
}  // namespace dseek
