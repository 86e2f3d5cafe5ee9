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
        for (int row = 0; row < kStripRows; ++row) {
            f32x16 part[4];
            page_scores(query + row * dim, keys + static_cast<size_t>(page) * dim * kPageTokens, dim, 1.f, part);
            for (int v = 0; v < 4; ++v) {
                store(scores + (page * kStripRows + row) * static_cast<size_t>(kPageTokens) + v * 16, part[v]);
            }
        }
    }
}

inline i32x16 load_bytes(const uint8_t* source) {
    i32x16 value;
    for (int lane = 0; lane < 16; ++lane) value[lane] = source[lane];
    return value;
}

// Base-2 logarithm of the sum of 2^score over the cells that `counts(cells)` picks, 16 at a time, and of `rest`.
template <class Counts>
float log_mass(const float* scores, size_t page_stride, const OpenCall& call, float rest, const Counts& counts) {
    f32x16 largest = splat(rest);
    const auto masked = [&](int v) {
        const f32x16 score = load(scores + v / 4 * page_stride + v % 4 * 16) + load(call.bias + v * 16);
        return counts(v) ? score : splat(kNoMass);
    };
    const int vectors = call.num_pages * (kPageTokens / 16);
    for (int v = 0; v < vectors; ++v) largest = max(largest, masked(v));
    float peak = largest[0];
    for (int lane = 1; lane < 16; ++lane) peak = largest[lane] > peak ? largest[lane] : peak;
    if (!(peak > kNoMass)) return kNoMass;
    f32x16 total{};
    for (int v = 0; v < vectors; ++v) total += exp2(masked(v) - peak);
    return peak + std::log2(sum(total) + std::exp2(rest - peak));
}

inline void open_cells(const OpenCall& call) {
    const size_t row_floats = kPageTokens, page_floats = kStripRows * row_floats;
    const size_t head_floats = page_floats * call.num_pages;
    const int vectors = call.num_pages * (kPageTokens / 16);
    struct Found {
        float over;
        int place;
    };
    thread_local std::vector<Found> found;
    int opened = 0;
    for (int i = 0; i < vectors * 16; ++i) opened += call.opened_from[i] < kStripRows;
    for (int row = call.row_begin; row < call.row_end; ++row) {
        const auto seen = [&](int v) { return load_bytes(call.seen_from + v * 16) <= row; };
        float floor[kMostHeadsOfGroup];
        for (int head = 0; head < call.num_heads; ++head) {
            const float* scores = call.scores + head * head_floats + row * row_floats;
            floor[head] =
                call.log_share + log_mass(scores, page_floats, call, call.rest[head * kStripRows + row], seen);
        }
        found.clear();
        for (int v = 0; v < vectors && opened < call.most; ++v) {
            f32x16 over = splat(kNoMass);
            for (int head = 0; head < call.num_heads; ++head) {
                const float* scores = call.scores + head * head_floats + row * row_floats + v / 4 * page_floats;
                over = max(over, load(scores + v % 4 * 16) + load(call.bias + v * 16) - floor[head]);
            }
            const i32x16 from = load_bytes(call.opened_from + v * 16);
            const i32x16 opens = (over >= 0.f) & seen(v) & (from == static_cast<int32_t>(kNeverOpened));
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
        for (const Found& cell : found) call.opened_from[cell.place] = static_cast<uint8_t>(row);
        opened += static_cast<int>(found.size());
        if (!call.pass_on) continue;
        const auto closed = [&](int v) { return seen(v) & (load_bytes(call.opened_from + v * 16) > row); };
        for (int head = 0; head < call.num_heads; ++head) {
            const float* scores = call.scores + head * head_floats + row * row_floats;
            float& rest = call.rest[head * kStripRows + row];
            rest = log_mass(scores, page_floats, call, rest, closed);
        }
    }
}

}  // namespace DSEEK_VARIANT
}  // namespace dseek
