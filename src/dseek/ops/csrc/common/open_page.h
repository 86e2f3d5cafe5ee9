// A page of the paged cache under the portable attention kernel: its elements widened, and products with few rows.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace dseek {
namespace DSEEK_VARIANT {

// The two bf16 or int8 elements of sixteen neighbouring pairs, as floats.
template <CacheType kType>
inline void load_pairs(const uint8_t* data, size_t pair, f32x16& even, f32x16& odd) {
    if constexpr (kType == CacheType::bf16) {
        load_bf16_pairs(reinterpret_cast<const uint16_t*>(data) + 2 * pair, even, odd);
    } else {
        const i32x16 both = load_int16(data + 2 * pair);
        even = to_float((both << 24) >> 24);
        odd = to_float(both >> 8);
    }
}

inline void load_pairs(const CacheLayout& layout, const uint8_t* data, size_t pair, f32x16& even, f32x16& odd) {
    if (layout.type == CacheType::bf16) load_pairs<CacheType::bf16>(data, pair, even, odd);
    else load_pairs<CacheType::int8>(data, pair, even, odd);
}

// Keys as [d][64], values as [64][d], both fp32.
inline void widen_page(const CacheLayout& layout, const uint8_t* page, float* keys, float* values) {
    const int d = layout.head_dim;
    const bool scaled = layout.type == CacheType::int8;
    const auto* scales = reinterpret_cast<const float*>(page + layout.scale_offset);
    f32x16 even, odd;
    for (int i = 0; i < d; i += 2) {
        for (int slot = 0; slot < kPageTokens; slot += 16) {
            load_pairs(layout, page, static_cast<size_t>(i / 2) * kPageTokens + slot, even, odd);
            const f32x16 scale = scaled ? load(scales + slot) : splat(1.f);
            store(keys + static_cast<size_t>(i) * kPageTokens + slot, even * scale);
            store(keys + static_cast<size_t>(i + 1) * kPageTokens + slot, odd * scale);
        }
    }
    for (int slot = 0; slot < kPageTokens; slot += 2) {
        const float first = scaled ? scales[kPageTokens + slot] : 1.f;
        const float second = scaled ? scales[kPageTokens + slot + 1] : 1.f;
        for (int i = 0; i < d; i += 16) {
            load_pairs(layout, page + layout.value_offset, static_cast<size_t>(slot / 2) * d + i, even, odd);
            store(values + static_cast<size_t>(slot) * d + i, even * first);
            store(values + static_cast<size_t>(slot + 1) * d + i, odd * second);
        }
    }
}

// c[r][0..16) = or += sum over i of a[r][i] * b[i][0..16), for a few rows that fit the registers.
template <int kRows>
inline void multiply_rows(const float* a, size_t a_stride, const float* b, size_t b_stride, int k, float* c,
                          size_t c_stride, bool add) {
    f32x16 sums[kRows] = {};
    if (add) {
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) sums[r] = load(c + r * c_stride);
    }
    for (int i = 0; i < k; ++i) {
        const f32x16 value = load(b + static_cast<size_t>(i) * b_stride);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) sums[r] += value * a[r * a_stride + i];
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) store(c + r * c_stride, sums[r]);
}

// The same where b comes two at a time: `load_both(i / 2, even, odd)` gives b[i] and b[i + 1] for an even i.
template <int kRows, class LoadBoth>
inline void multiply_pairs(const float* a, size_t a_stride, const LoadBoth& load_both, int k, float* c, size_t c_stride,
                           bool add) {
    f32x16 sums[kRows] = {};
    if (add) {
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) sums[r] = load(c + r * c_stride);
    }
    f32x16 even, odd;
    for (int i = 0; i + 1 < k; i += 2) {
        load_both(i / 2, even, odd);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) sums[r] += even * a[r * a_stride + i];
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) sums[r] += odd * a[r * a_stride + i + 1];
    }
    if (k % 2 != 0) {
        load_both(k / 2, even, odd);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) sums[r] += even * a[r * a_stride + k - 1];
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) store(c + r * c_stride, sums[r]);
}

#if defined(__AVX2__)
constexpr int kRowsAtOnce = 6;
#else
constexpr int kRowsAtOnce = 2;
#endif

// `take.operator()<rows>(first)` for rows [0, count) in as few steps as may be.
template <int kMost = kRowsAtOnce, class Take>
inline void for_row_groups(int count, const Take& take, int first = 0) {
    for (; first + kMost <= count; first += kMost) take.template operator()<kMost>(first);
    if constexpr (kMost > 1) {
        if (first < count) for_row_groups<kMost - 1>(count, take, first);
    }
}

// A page of the cache that rows attend to, as floats, or as it lies there and widened in registers: for a few rows
// widening it first takes longer than their products.
struct OpenPage {
    const CacheLayout* layout = nullptr;
    const uint8_t* data = nullptr;
    const float *keys = nullptr, *values = nullptr;  // null: as it lies

    // `wide`: room for the page's keys and values, or null to leave them as they lie.
    OpenPage(const CacheLayout& its_layout, const uint8_t* page, float* wide) : layout(&its_layout), data(page) {
        if (layout->type == CacheType::fp32) {
            keys = reinterpret_cast<const float*>(page);
            values = reinterpret_cast<const float*>(page + layout->value_offset);
        } else if (wide != nullptr) {
            float* wide_values = wide + static_cast<size_t>(layout->head_dim) * kPageTokens;
            widen_page(*layout, page, wide, wide_values);
            keys = wide;
            values = wide_values;
        }
    }

    // Scores of queries against sixteen keys from `slot` on.
    template <int kRows>
    void score(const float* query, size_t stride, int slot, float* scores) const {
        const int d = layout->head_dim;
        const auto multiply = [&](const auto& load_both) {
            multiply_pairs<kRows>(query, stride, load_both, d, scores, kPageTokens, false);
        };
        const auto place = [&](int pair) { return static_cast<size_t>(pair) * kPageTokens + slot; };
        if (keys != nullptr) {
            multiply_rows<kRows>(query, stride, keys + slot, kPageTokens, d, scores, kPageTokens, false);
        } else if (layout->type == CacheType::bf16) {
            multiply([&](int pair, f32x16& even, f32x16& odd) {
                load_pairs<CacheType::bf16>(data, place(pair), even, odd);
            });
        } else {
            multiply([&](int pair, f32x16& even, f32x16& odd) {
                load_pairs<CacheType::int8>(data, place(pair), even, odd);
            });
        }
    }

    // Adds sixteen columns of the first `num_keys` values by their weights.
    template <int kRows>
    void gather(const float* weights, int num_keys, int column, float* out, size_t stride) const {
        const size_t d = static_cast<size_t>(layout->head_dim);
        const uint8_t* pairs = data + layout->value_offset;
        const auto multiply = [&](const auto& load_both) {
            multiply_pairs<kRows>(weights, kPageTokens, load_both, num_keys, out, stride, true);
        };
        if (keys != nullptr) {
            multiply_rows<kRows>(weights, kPageTokens, values + column, d, num_keys, out, stride, true);
        } else if (layout->type == CacheType::bf16) {
            multiply([&](int pair, f32x16& even, f32x16& odd) {
                load_pairs<CacheType::bf16>(pairs, pair * d + column, even, odd);
            });
        } else {
            multiply([&](int pair, f32x16& even, f32x16& odd) {
                load_pairs<CacheType::int8>(pairs, pair * d + column, even, odd);
            });
        }
    }

    // Scales of the keys and, 64 further on, of the values, where bytes are multiplied without them; else null.
    const float* open_scales() const {
        if (keys != nullptr || layout->type != CacheType::int8) return nullptr;
        return reinterpret_cast<const float*>(data + layout->scale_offset);
    }
};

}  // namespace DSEEK_VARIANT
}  // namespace dseek
