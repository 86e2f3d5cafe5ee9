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

// Positions a query may see, and the pages that hold them.
struct VisibleRange {
    int first_page, end_page;

    explicit VisibleRange(const AttentionCall& call) {
        const int last = call.first_position + call.num_rows - 1;
        const int oldest = call.window > 0 ? std::max(0, call.first_position - call.window + 1) : 0;
        first_page = std::max(oldest / kPageTokens, call.page_begin);
        end_page = last / kPageTokens + 1;
        if (call.page_end >= 0) end_page = std::min(end_page, call.page_end);
    }
};

constexpr float kNegativeInfinity = -std::numeric_limits<float>::infinity();

// Scores of one query against the 64 keys of a page; positions it may not see become minus infinity.
inline void page_scores(const float* query, const float* keys, int d, float factor, int oldest, int newest, int first,
                        f32x16* scores) {
    for (int part = 0; part < 4; ++part) scores[part] = f32x16{};
    for (int i = 0; i < d; ++i) {
        for (int part = 0; part < 4; ++part) scores[part] += load(keys + i * kPageTokens + part * 16) * query[i];
    }
    const i32x16 lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (int part = 0; part < 4; ++part) {
        scores[part] *= factor;
        const i32x16 position = lanes + (first + part * 16);
        scores[part] = position > newest ? splat(kNegativeInfinity) : scores[part];
        scores[part] = position < oldest ? splat(kNegativeInfinity) : scores[part];
    }
}

inline void attention_portable(const AttentionCall& call) {
    const CacheLayout& layout = *call.layout;
    const int d = layout.head_dim;
    const VisibleRange range(call);
    const int states = call.num_rows * call.num_heads;
    const size_t page_floats = static_cast<size_t>(d) * kPageTokens;
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
    for (int page_idx = range.first_page; page_idx < range.end_page; ++page_idx) {
        const uint8_t* page = call.cache + static_cast<size_t>(call.pages[page_idx]) * layout.page_bytes();
        const float* keys = reinterpret_cast<const float*>(page);
        const float* values = reinterpret_cast<const float*>(page + layout.value_offset);
        if (layout.type != CacheType::fp32) {
            widen_page(layout, page, wide_keys, wide_values);
            keys = wide_keys;
            values = wide_values;
        }
        const int first = page_idx * kPageTokens;
        for (int row = 0; row < call.num_rows; ++row) {
            const int newest = call.first_position + row;
            const int oldest = call.window > 0 ? newest - call.window + 1 : 0;
            if (newest < first || oldest >= first + kPageTokens) continue;
            const int num_keys = std::min(kPageTokens, newest - first + 1);
            for (int head = 0; head < call.num_heads; ++head) {
                const float* query = call.query + row * call.query_stride + static_cast<size_t>(head) * d;
                float* out = call.out + row * call.out_stride + static_cast<size_t>(head) * d;
                const int state = row * call.num_heads + head;
                f32x16 scores[4];
                page_scores(query, keys, d, call.scale * kLog2E, oldest, newest, first, scores);
                const f32x16 peak = max(max(scores[0], scores[1]), max(scores[2], scores[3]));
                float new_largest = largest[state];
                for (int lane = 0; lane < 16; ++lane) new_largest = std::max(new_largest, peak[lane]);
                const float correction =
                    largest[state] == kNegativeInfinity ? 0.f : std::exp2(largest[state] - new_largest);
                largest[state] = new_largest;
                float weights[kPageTokens];
                f32x16 page_sum{};
                for (int part = 0; part < 4; ++part) {
                    const f32x16 weight = exp2(scores[part] - new_largest);
                    store(weights + part * 16, weight);
                    page_sum += weight;
                }
                total[state] = total[state] * correction + sum(page_sum);
                for (int i = 0; i < d; i += 16) {
                    f32x16 acc = load(out + i) * correction;
                    for (int key = 0; key < num_keys; ++key) {
                        acc += load(values + static_cast<size_t>(key) * d + i) * weights[key];
                    }
                    store(out + i, acc);
                }
            }
        }
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
