// Attention over the paged cache in portable vectors, flash style: one page of keys at a time, a running maximum and
// sum for each row (Milakov and Gimelshein 2018; Dao et al. 2022, FlashAttention, algorithm 1), scores in base 2.
//
// Pages of bf16 and int8 are widened to fp32 first, once for all rows and heads that read them, if those are many.
#pragma once

#include <algorithm>
#include <limits>

#include "kernels.h"
#include "open_page.h"
#include "scratch.h"
#include "vec.h"

namespace dseek {
namespace DSEEK_VARIANT {

inline void store_token(const CacheLayout& layout, uint8_t* page, int slot, const float* key, const float* value) {
    const int d = layout.head_dim;
    switch (layout.type) {
        case CacheType::fp32: {
            auto* keys = reinterpret_cast<float*>(page);
            auto* values = reinterpret_cast<float*>(page + layout.value_offset);
            for (int i = 0; i < d; ++i) keys[static_cast<size_t>(i) * kPageTokens + slot] = key[i];
            std::memcpy(values + static_cast<size_t>(slot) * d, value, static_cast<size_t>(d) * 4);
            return;
        }
        case CacheType::bf16: {
            auto* keys = reinterpret_cast<uint16_t*>(page);
            auto* values = reinterpret_cast<uint16_t*>(page + layout.value_offset);
            for (int i = 0; i < d; ++i) {
                keys[(static_cast<size_t>(i / 2) * kPageTokens + slot) * 2 + i % 2] = float_to_bf16(key[i]);
                values[(static_cast<size_t>(slot / 2) * d + i) * 2 + slot % 2] = float_to_bf16(value[i]);
            }
            return;
        }
        case CacheType::int8: {
            auto* keys = reinterpret_cast<int8_t*>(page);
            auto* values = reinterpret_cast<int8_t*>(page + layout.value_offset);
            auto* scales = reinterpret_cast<float*>(page + layout.scale_offset);
            float key_largest = 0.f, value_largest = 0.f;
            for (int i = 0; i < d; ++i) {
                key_largest = std::max(key_largest, std::fabs(key[i]));
                value_largest = std::max(value_largest, std::fabs(value[i]));
            }
            scales[slot] = key_largest / 127.f;
            scales[kPageTokens + slot] = value_largest / 127.f;
            const float key_inverse = key_largest > 0.f ? 127.f / key_largest : 0.f;
            const float value_inverse = value_largest > 0.f ? 127.f / value_largest : 0.f;
            for (int i = 0; i < d; ++i) {
                keys[(static_cast<size_t>(i / 2) * kPageTokens + slot) * 2 + i % 2] =
                    static_cast<int8_t>(std::lrintf(key[i] * key_inverse));
                values[(static_cast<size_t>(slot / 2) * d + i) * 2 + slot % 2] =
                    static_cast<int8_t>(std::lrintf(value[i] * value_inverse));
            }
            return;
        }
    }
}

inline void store_tokens(const CacheLayout& layout, uint8_t* page, int slot, int count, const float* key,
                         const float* value, size_t stride) {
    for (int token = 0; token < count; ++token) {
        store_token(layout, page, slot + token, key + token * stride, value + token * stride);
    }
}

// The blocks that a call attends to, in turn.
class VisibleBlocks {
public:
    explicit VisibleBlocks(const AttentionCall& call) : call_(call) {
        const int last = call.first_position + call.num_rows - 1;
        const int oldest = call.window > 0 ? std::max(0, call.first_position - call.window + 1) : 0;
        first_ = std::max(call.blocks != nullptr ? 0 : oldest / kPageTokens, call.page_begin);
        end_ = call.blocks != nullptr ? call.num_blocks : last / kPageTokens + 1;
        if (call.page_end >= 0) end_ = std::min(end_, call.page_end);
    }
    int first() const { return first_; }
    int end() const { return end_; }
    // Index of an entry's block in the sequence.
    int block(int entry) const { return call_.blocks != nullptr ? call_.blocks[entry] : entry; }
    // The first row of the call that attends to an entry's block.
    int from_row(int entry) const { return call_.from_rows != nullptr ? call_.from_rows[entry] : 0; }
    const uint8_t* page(int entry) const {
        return call_.cache + static_cast<size_t>(call_.pages[block(entry)]) * call_.layout->page_bytes();
    }

private:
    const AttentionCall& call_;
    int first_, end_;
};

// Rows, of all heads, that widen a page in registers rather than in memory.
constexpr int kMostNarrowRows = 2 * kRowsAtOnce;
// Rows whose heads are attended to together.
constexpr int kMostRowsTogether = kStripRows;

constexpr float kNegativeInfinity = -std::numeric_limits<float>::infinity();

// Minus infinity for positions that a query may not see; `scores` are those of a page that begins at `first`.
inline void hide_positions(float* scores, int oldest, int newest, int first) {
    alignas(64) static constexpr int32_t kLaneNumbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (int part = 0; part < kPageTokens; part += 16) {
        const i32x16 position = load(kLaneNumbers) + (first + part);
        const f32x16 seen = select(position > newest, splat(kNegativeInfinity), load(scores + part));
        store(scores + part, select(position < oldest, splat(kNegativeInfinity), seen));
    }
}

// What one row and head has seen so far: a running maximum and a sum; its output is not normalised.
struct RowState {
    float largest = kNegativeInfinity;
    float total = 0.f;

    // Turns the scores of a page into weights, in place, and scales `out` [d] for a larger maximum.
    void soften(float* scores, float* out, int d) {
        f32x16 part[4];
        for (int v = 0; v < 4; ++v) part[v] = load(scores + v * 16);
        const float peak = largest_lane(max(max(part[0], part[1]), max(part[2], part[3])));
        if (peak > largest) {
            const float correction = largest == kNegativeInfinity ? 0.f : std::exp2(largest - peak);
            for (int i = 0; i < d; i += 16) store(out + i, load(out + i) * correction);
            total *= correction;
            largest = peak;
        }
        // Before anything was seen every weight is nothing, not the exponential of a difference of infinities.
        const float base = largest == kNegativeInfinity ? 0.f : largest;
        f32x16 sums{};
        for (int v = 0; v < 4; ++v) {
            const f32x16 weight = exp2(part[v] - base);
            store(scores + v * 16, weight);
            sums += weight;
        }
        total += sum(sums);
    }
};

// Rows that share their keys and values: those of a head, or the heads of a single row.
struct RowGroup {
    const AttentionCall& call;
    const float* query;
    size_t query_stride;
    float* out;
    size_t out_stride;
    RowState* states;
    const OpenPage* page;
    float factor;
    int num_keys;  // the first that may count
    int first_key;  // position of the page's first key; negative: every row sees the whole page
    int first_position;  // of row 0
    int position_step;   // 1, or 0 where all rows are of one position
    const float* bias;  // [64] of each row, added to its scores, or null
    size_t bias_stride;

    // Attends to the open page with rows [begin, end).
    void attend(int begin, int end) const {
        for (int row = begin; row < end; row += kRowsInTurn) take(row, std::min(kRowsInTurn, end - row));
    }

private:
    // Rows that take turns at sixteen columns of the keys or values, which stay in the first cache meanwhile; the whole
    // page, widened, would not.
    static constexpr int kRowsInTurn = 4 * kRowsAtOnce;

    void take(int first, int count) const {
        const int d = call.layout->head_dim;
        alignas(64) float scores[kRowsInTurn * kPageTokens];
        const float* asking = query + first * query_stride;
        for (int part = 0; part < kPageTokens; part += 16) {
            for_row_groups(count, [&]<int kRows>(int row) {
                page->score<kRows>(asking + row * query_stride, query_stride, part, scores + row * kPageTokens + part);
            });
        }
        float* target = out + first * out_stride;
        for (int row = 0; row < count; ++row) weigh(first + row, scores + row * kPageTokens, target + row * out_stride);
        for (int i = 0; i < d; i += 16) {
            for_row_groups(count, [&]<int kRows>(int row) {
                page->gather<kRows>(scores + row * kPageTokens, num_keys, i, target + row * out_stride + i, out_stride);
            });
        }
    }

    // Turns a row's scores into weights.
    void weigh(int row, float* scores, float* target) const {
        const float* scales = page->open_scales();
        for (int part = 0; part < kPageTokens; part += 16) {
            f32x16 score = load(scores + part);
            if (scales != nullptr) score *= load(scales + part);
            if (bias != nullptr) score += load(bias + row * bias_stride + part);
            store(scores + part, score * factor);
        }
        if (first_key >= 0) {
            const int newest = first_position + row * position_step;
            const int oldest = call.window > 0 ? newest - call.window + 1 : 0;
            if (newest < first_key + kPageTokens - 1 || oldest > first_key) {
                hide_positions(scores, oldest, newest, first_key);
            }
        }
        states[row].soften(scores, target, call.layout->head_dim);
        if (scales == nullptr) return;
        for (int part = 0; part < kPageTokens; part += 16) {
            store(scores + part, load(scores + part) * load(scales + kPageTokens + part));
        }
    }
};

// Where heads and rows lie: row r of head h at data + h * head + r * row.
template <class T>
struct RowsOfHeads {
    T* data;
    size_t head, row;

    T* at(int h, int r) const { return data + h * head + r * row; }
};

inline void attention_portable(const AttentionCall& call) {
    const CacheLayout& layout = *call.layout;
    const int rows = call.num_rows, heads = call.num_heads, num_states = rows * heads;
    const size_t d = static_cast<size_t>(layout.head_dim), page_floats = d * kPageTokens;
    // A few rows are copied, so that those of all heads lie one behind the other and can take turns at a page at once;
    // a lone one lies so already.
    const bool together = rows <= kMostRowsTogether, copied = together && rows > 1;
    thread_local Scratch room;
    const size_t copied_floats = copied ? num_states * d : 0;
    auto* wide = reinterpret_cast<float*>(
        room.get((2 * page_floats + 2 * copied_floats) * sizeof(float) + num_states * sizeof(RowState)));
    RowsOfHeads<const float> query{call.query, d, call.query_stride};
    RowsOfHeads<float> out{call.out, d, call.out_stride};
    if (copied) {
        float* copy = wide + 2 * page_floats;
        out = {copy + copied_floats, rows * d, d};
        for (int head = 0; head < heads; ++head) {
            for (int row = 0; row < rows; ++row) {
                std::memcpy(copy + (head * rows + row) * d, query.at(head, row), d * sizeof(float));
            }
        }
        query = {copy, rows * d, d};
    }
    auto* states = reinterpret_cast<RowState*>(wide + 2 * page_floats + 2 * copied_floats);
    std::fill(states, states + num_states, RowState{});
    for (int head = 0; head < heads; ++head) {
        for (int row = 0; row < rows; ++row) std::fill_n(out.at(head, row), d, 0.f);
    }
    if (num_states <= kMostNarrowRows) wide = nullptr;
    RowGroup group{.call = call,
                   .query = nullptr,
                   .query_stride = rows == 1 ? d : query.row,
                   .out = nullptr,
                   .out_stride = rows == 1 ? d : out.row,
                   .states = nullptr,
                   .page = nullptr,
                   .factor = call.scale * kLog2E,
                   .num_keys = 0,
                   .first_key = -1,
                   .first_position = call.first_position,
                   .position_step = rows == 1 ? 0 : 1,
                   .bias = nullptr,
                   .bias_stride = 0};
    const auto attend_all = [&](const OpenPage& page, const float* bias) {
        group.page = &page, group.query = query.data, group.out = out.data, group.states = states;
        group.bias = bias;
        group.attend(0, num_states);
    };
    const auto attend_by_head = [&](const OpenPage& page, int begin, int end, const float* bias, size_t bias_of_head) {
        group.page = &page;
        for (int head = 0; head < heads; ++head) {
            group.query = query.at(head, 0), group.out = out.at(head, 0);
            group.states = states + static_cast<size_t>(head) * rows;
            group.bias = bias == nullptr ? nullptr : bias + head * bias_of_head;
            group.attend(begin, end);
        }
    };
    const int last_position = call.first_position + rows - 1;
    const VisibleBlocks visible(call);
    for (int entry = visible.first(); entry < visible.end(); ++entry) {
        const int first = visible.block(entry) * kPageTokens;
        const int begin = std::max({0, visible.from_row(entry), first - call.first_position});
        int end = rows;  // later rows have the whole page behind their window
        if (call.window > 0) end = std::min(end, first + kPageTokens - 1 + call.window - call.first_position);
        if (begin >= end) continue;
        const OpenPage page(layout, visible.page(entry), wide);
        const bool seen_by_all = begin == 0 && end == rows && first + kPageTokens - 1 <= call.first_position &&
                                 (call.window <= 0 || first > last_position - call.window);
        group.first_key = seen_by_all ? -1 : first;
        group.num_keys = std::min(kPageTokens, call.first_position + end - first);
        if (rows == 1 || (together && seen_by_all)) attend_all(page, nullptr);
        else attend_by_head(page, begin, end, nullptr, 0);
    }
    const int far_pages = call.far.num_pages();
    const size_t far_slots = static_cast<size_t>(far_pages) * kPageTokens;
    group.first_key = -1;
    for (int far_page = 0; far_page < far_pages; ++far_page) {
        const OpenPage page(*call.far.layout, call.far.pages + far_page * call.far.layout->head_bytes, wide);
        const int first = far_page * kPageTokens;
        group.num_keys = std::min(kPageTokens, call.far.count - first);
        group.bias_stride = rows == 1 ? far_slots : 0;
        if (rows == 1) attend_all(page, call.far.bias + first);
        else attend_by_head(page, 0, rows, call.far.bias + first, far_slots);
    }
    if (call.partial_max != nullptr) {
        for (int i = 0; i < num_states; ++i) {
            call.partial_max[i] = states[i].largest;
            call.partial_sum[i] = states[i].total;
        }
    }
    for (int head = 0; head < heads; ++head) {
        for (int row = 0; row < rows; ++row) {
            const float total = states[static_cast<size_t>(head) * rows + row].total;
            const float inverse = call.partial_max != nullptr ? 1.f : 1.f / total;
            const float* source = out.at(head, row);
            float* target = call.out + row * call.out_stride + head * d;
            for (size_t i = 0; i < d; i += 16) store(target + i, load(source + i) * inverse);
        }
    }
}

}  // namespace DSEEK_VARIANT
}  // namespace dseek
