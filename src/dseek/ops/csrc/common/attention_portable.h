// Attention over the paged cache in portable vectors, flash style: one page of keys at a time, a running maximum and
// sum for each row (Milakov and Gimelshein 2018; Dao et al. 2022, FlashAttention, algorithm 1), scores in base 2.
//
// Pages of bf16 and int8 are widened to fp32 first, once for all rows and heads that read them.
#pragma once

#include <algorithm>
#include <limits>

#include "kernels.h"
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

// Keys as [d][64], values as [64][d], both fp32.
inline void widen_page(const CacheLayout& layout, const uint8_t* page, float* keys, float* values) {
    const int d = layout.head_dim;
    const bool is_int8 = layout.type == CacheType::int8;
    const auto* scales = reinterpret_cast<const float*>(page + layout.scale_offset);
    const auto* keys16 = reinterpret_cast<const uint16_t*>(page);
    const auto* values16 = reinterpret_cast<const uint16_t*>(page + layout.value_offset);
    const auto* keys8 = reinterpret_cast<const int8_t*>(page);
    const auto* values8 = reinterpret_cast<const int8_t*>(page + layout.value_offset);
    for (int i = 0; i < d; ++i) {
        for (int slot = 0; slot < kPageTokens; ++slot) {
            const size_t at = (static_cast<size_t>(i / 2) * kPageTokens + slot) * 2 + i % 2;
            keys[static_cast<size_t>(i) * kPageTokens + slot] =
                is_int8 ? static_cast<float>(keys8[at]) * scales[slot] : bf16_to_float(keys16[at]);
        }
    }
    for (int slot = 0; slot < kPageTokens; ++slot) {
        for (int i = 0; i < d; ++i) {
            const size_t at = (static_cast<size_t>(slot / 2) * d + i) * 2 + slot % 2;
            values[static_cast<size_t>(slot) * d + i] =
                is_int8 ? static_cast<float>(values8[at]) * scales[kPageTokens + slot] : bf16_to_float(values16[at]);
        }
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

constexpr float kNegativeInfinity = -std::numeric_limits<float>::infinity();

// Scores of one query against the 64 keys of a page, times `factor`.
inline void page_scores(const float* query, const float* keys, int d, float factor, f32x16* scores) {
    for (int part = 0; part < 4; ++part) scores[part] = f32x16{};
    for (int i = 0; i < d; ++i) {
        for (int part = 0; part < 4; ++part) scores[part] += load(keys + i * kPageTokens + part * 16) * query[i];
    }
    for (int part = 0; part < 4; ++part) scores[part] *= factor;
}

// Minus infinity for positions that a query may not see.
inline void hide_positions(f32x16* scores, int oldest, int newest, int first) {
    const i32x16 lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (int part = 0; part < 4; ++part) {
        const i32x16 position = lanes + (first + part * 16);
        scores[part] = position > newest ? splat(kNegativeInfinity) : scores[part];
        scores[part] = position < oldest ? splat(kNegativeInfinity) : scores[part];
    }
}

// What one row and head has seen so far: a running maximum, a sum and an output that is not normalised.
struct RowState {
    float* largest;
    float* total;
    float* out;  // [d]

    // Takes in the scores of a page; only the first `num_keys` may count.
    void add(const f32x16* scores, const float* values, int num_keys, int d) const {
        const f32x16 peak = max(max(scores[0], scores[1]), max(scores[2], scores[3]));
        float new_largest = *largest;
        for (int lane = 0; lane < 16; ++lane) new_largest = std::max(new_largest, peak[lane]);
        const float correction = *largest == kNegativeInfinity ? 0.f : std::exp2(*largest - new_largest);
        *largest = new_largest;
        float weights[kPageTokens];
        f32x16 page_sum{};
        for (int part = 0; part < 4; ++part) {
            const f32x16 weight = exp2(scores[part] - new_largest);
            store(weights + part * 16, weight);
            page_sum += weight;
        }
        *total = *total * correction + sum(page_sum);
        for (int i = 0; i < d; i += 16) {
            f32x16 acc = load(out + i) * correction;
            for (int key = 0; key < num_keys; ++key) {
                acc += load(values + static_cast<size_t>(key) * d + i) * weights[key];
            }
            store(out + i, acc);
        }
    }
};

inline void attention_portable(const AttentionCall& call) {
    const CacheLayout& layout = *call.layout;
    const int d = layout.head_dim;
    const int states = call.num_rows * call.num_heads;
    const size_t page_floats = static_cast<size_t>(d) * kPageTokens;
    const float factor = call.scale * kLog2E;
    thread_local Scratch room;
    auto* wide_keys = reinterpret_cast<float*>(room.get((2 * page_floats + static_cast<size_t>(states) * 2) * 4));
    float* wide_values = wide_keys + page_floats;
    float* largest = wide_values + page_floats;
    float* total = largest + states;
    std::fill(largest, largest + states, kNegativeInfinity);
    std::fill(total, total + states, 0.f);
    for (int row = 0; row < call.num_rows; ++row) {
        std::memset(call.out + row * call.out_stride, 0, static_cast<size_t>(call.num_heads) * d * 4);
    }
    const float *keys = nullptr, *values = nullptr;
    const auto open_page = [&](const CacheLayout& its_layout, const uint8_t* page) {
        keys = reinterpret_cast<const float*>(page);
        values = reinterpret_cast<const float*>(page + its_layout.value_offset);
        if (its_layout.type == CacheType::fp32) return;
        widen_page(its_layout, page, wide_keys, wide_values);
        keys = wide_keys;
        values = wide_values;
    };
    // `take(row, head, scores, state)` gets the scores of every row and head with the open page.
    const auto for_each_row = [&](int first_row, const auto& take) {
        for (int row = first_row; row < call.num_rows; ++row) {
            for (int head = 0; head < call.num_heads; ++head) {
                const size_t at = static_cast<size_t>(head) * d;
                const int index = row * call.num_heads + head;
                f32x16 scores[4];
                page_scores(call.query + row * call.query_stride + at, keys, d, factor, scores);
                take(row, head, scores,
                     RowState{largest + index, total + index, call.out + row * call.out_stride + at});
            }
        }
    };
    const VisibleBlocks visible(call);
    for (int entry = visible.first(); entry < visible.end(); ++entry) {
        open_page(layout, visible.page(entry));
        const int first = visible.block(entry) * kPageTokens;
        for_each_row(std::max(visible.from_row(entry), first - call.first_position),
                     [&](int row, int, f32x16* scores, const RowState& state) {
                         const int newest = call.first_position + row;
                         const int oldest = call.window > 0 ? newest - call.window + 1 : 0;
                         if (oldest >= first + kPageTokens) return;
                         hide_positions(scores, oldest, newest, first);
                         state.add(scores, values, std::min(kPageTokens, newest - first + 1), d);
                     });
    }
    for (int far_page = 0; far_page < call.far.num_pages(); ++far_page) {
        open_page(*call.far.layout, call.far.pages + far_page * call.far.layout->head_bytes);
        const int begin = far_page * kPageTokens;
        for_each_row(0, [&](int, int head, f32x16* scores, const RowState& state) {
            const float* bias = call.far.bias + head * call.far.num_pages() * kPageTokens + begin;
            for (int part = 0; part < 4; ++part) scores[part] += load(bias + part * 16) * factor;
            state.add(scores, values, std::min(kPageTokens, call.far.count - begin), d);
        });
    }
    if (call.partial_max != nullptr) {
        std::copy(largest, largest + states, call.partial_max);
        std::copy(total, total + states, call.partial_sum);
        return;
    }
    for (int row = 0; row < call.num_rows; ++row) {
        for (int head = 0; head < call.num_heads; ++head) {
            float* out = call.out + row * call.out_stride + static_cast<size_t>(head) * d;
            const float inverse = 1.f / total[row * call.num_heads + head];
            for (int i = 0; i < d; i += 16) store(out + i, load(out + i) * inverse);
        }
    }
}

}  // namespace DSEEK_VARIANT
}  // namespace dseek
