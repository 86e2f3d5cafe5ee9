// What the pyramid of cells needs from vectors: means of pages, and scores of means.
#pragma once

#include "attention_portable.h"
#include "kernels.h"
#include "vec.h"

namespace dseek {
namespace DSEEK_VARIANT {

inline void page_means(const CacheLayout& layout, const uint8_t* page, float* key, float* value) {
    constexpr float kShare = 1.f / kPageTokens;
    const int d = layout.head_dim;
    const uint8_t* values = page + layout.value_offset;
    if (layout.type == CacheType::fp32) {
        const auto* keys32 = reinterpret_cast<const float*>(page);
        const auto* values32 = reinterpret_cast<const float*>(values);
        for (int i = 0; i < d; ++i) {
            f32x16 total{};
            for (int slot = 0; slot < kPageTokens; slot += 16) total += load(keys32 + i * kPageTokens + slot);
            key[i] = sum(total) * kShare;
        }
        for (int i = 0; i < d; i += 16) {
            f32x16 total{};
            for (int slot = 0; slot < kPageTokens; ++slot) total += load(values32 + slot * d + i);
            store(value + i, total * kShare);
        }
        return;
    }
    const auto* scales = reinterpret_cast<const float*>(page + layout.scale_offset);
    const bool scaled = layout.type == CacheType::int8;
    f32x16 even, odd;
    for (int i = 0; i < d; i += 2) {
        f32x16 first{}, second{};
        for (int slot = 0; slot < kPageTokens; slot += 16) {
            load_pairs(layout, page, static_cast<size_t>(i / 2) * kPageTokens + slot, even, odd);
            const f32x16 scale = scaled ? load(scales + slot) : splat(1.f);
            first += even * scale;
            second += odd * scale;
        }
        key[i] = sum(first) * kShare;
        key[i + 1] = sum(second) * kShare;
    }
    for (int i = 0; i < d; i += 16) {
        f32x16 total{};
        for (int pair = 0; pair < kPageTokens / 2; ++pair) {
            load_pairs(layout, values, static_cast<size_t>(pair) * d + i, even, odd);
            if (scaled) {
                even *= scales[kPageTokens + 2 * pair];
                odd *= scales[kPageTokens + 2 * pair + 1];
            }
            total += even + odd;
        }
        store(value + i, total * kShare);
    }
}

// Largest, least and mean [3][d] of a page's keys after turning them back: cos and sin are [d / 2][64], one for each
// slot.
inline void page_statistics(const CacheLayout& layout, const uint8_t* page, const float* cos, const float* sin,
                            float scale, float* statistics) {
    const int d = layout.head_dim, half = d / 2;
    const size_t page_floats = static_cast<size_t>(d) * kPageTokens;
    thread_local Scratch room;
    const auto* keys = reinterpret_cast<const float*>(page);
    if (layout.type != CacheType::fp32) {
        auto* wide = reinterpret_cast<float*>(room.get(2 * page_floats * sizeof(float)));
        widen_page(layout, page, wide, wide + page_floats);
        keys = wide;
    }
    const auto keep = [&](int i, const f32x16* values) {
        f32x16 largest = values[0], least = values[0], total = values[0];
        for (int part = 1; part < 4; ++part) {
            largest = max(largest, values[part]);
            least = min(least, values[part]);
            total += values[part];
        }
        statistics[i] = largest_lane(largest) * scale;
        statistics[d + i] = -largest_lane(-least) * scale;
        statistics[2 * d + i] = sum(total) * (scale / kPageTokens);
    };
    for (int i = 0; i < half; ++i) {
        f32x16 first[4], second[4];
        for (int part = 0; part < 4; ++part) {
            const f32x16 a = load(keys + i * kPageTokens + part * 16),
                         b = load(keys + (i + half) * kPageTokens + part * 16);
            const f32x16 c = load(cos + i * kPageTokens + part * 16), s = load(sin + i * kPageTokens + part * 16);
            first[part] = a * c + b * s;
            second[part] = b * c - a * s;
        }
        keep(i, first);
        keep(i + half, second);
    }
}

inline void score_cells(const float* query, int heads, int head_dim, const float* const* means, int count,
                        float* scores) {
    for (int i = 0; i < count; ++i) {
        float best = 0.f;
        for (int head = 0; head < heads; ++head) {
            f32x16 total{};
            for (int j = 0; j < head_dim; j += 16) total += load(query + head * head_dim + j) * load(means[i] + j);
            const float score = sum(total);
            best = head == 0 || score > best ? score : best;
        }
        scores[i] = best;
    }
}

}  // namespace DSEEK_VARIANT
}  // namespace dseek
