// Attention over the paged bf16 or int8 cache with AVX-512: a strip of sixteen queries against a page of 64 keys.
//
// The page layouts are those of a packed weight, so scores (queries x keys) and outputs (weights x values) are both
// small matrix products; who computes them (`Multiply`) is the variant's choice. The rest is here: masks, the running
// maximum with a rescale only where it grew, base-2 exponentials, bf16 weights.
#pragma once

#include <immintrin.h>

#include <algorithm>

#include "attention_decode.h"

namespace dseek {
namespace DSEEK_VARIANT {

constexpr int kStrip = 16;  // queries

// Lane i becomes the maximum of the lanes of rows[i]: a transpose that keeps only maxima.
inline __m512 row_maxima(__m512* rows) {
    const auto merge = [](__m512 a, __m512 b, auto pick_low, auto pick_high) {
        return _mm512_max_ps(pick_low(a, b), pick_high(a, b));
    };
    __m512 pairs[8], fours[4], eights[2];
    for (int i = 0; i < 8; ++i) {  // rows i and i + 8: halves of 256 bits
        pairs[i] = merge(
            rows[i], rows[i + 8], [](__m512 a, __m512 b) { return _mm512_shuffle_f32x4(a, b, 0x44); },
            [](__m512 a, __m512 b) { return _mm512_shuffle_f32x4(a, b, 0xee); });
    }
    for (int i = 0; i < 4; ++i) {  // rows i and i + 4: quarters of 128 bits
        fours[i] = merge(
            pairs[i], pairs[i + 4], [](__m512 a, __m512 b) { return _mm512_shuffle_f32x4(a, b, 0x88); },
            [](__m512 a, __m512 b) { return _mm512_shuffle_f32x4(a, b, 0xdd); });
    }
    for (int i = 0; i < 2; ++i) {
        eights[i] = merge(
            fours[i], fours[i + 2], [](__m512 a, __m512 b) { return _mm512_shuffle_ps(a, b, 0x44); },
            [](__m512 a, __m512 b) { return _mm512_shuffle_ps(a, b, 0xee); });
    }
    const __m512 all = merge(
        eights[0], eights[1], [](__m512 a, __m512 b) { return _mm512_shuffle_ps(a, b, 0x88); },
        [](__m512 a, __m512 b) { return _mm512_shuffle_ps(a, b, 0xdd); });
    // Quarter q of `all` holds rows (0 or 8) + (0 or 4) by q, and inside it rows + 0, 2, 1, 3.
    const __m512i order = _mm512_setr_epi32(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15);
    return _mm512_permutexvar_ps(order, all);
}

// Queries of one head against one page, for a strip of sixteen rows.
struct Strip {
    uint16_t* query;   // [16][d]
    float* out;        // [16][d], not normalised
    float* largest;    // [16], of the scores times log2(e) / sqrt(d)
    float* lane_sums;  // [16][16], sums kept lane by lane until the end
};

// Turns scores [16][64] into bf16 weights [16][64] and updates the strip's maximum, sums and output scale. The scores
// are plain products; `factor`, log2(e) / sqrt(d), is applied where the exponent is formed, so that it costs nothing
// and the queries are rounded only once.
inline void soften(const Strip& strip, const WidePage& page, float* scores, uint16_t* weights, int d, float factor,
                   bool masked, int first_key, int first_position, int window) {
    const __m512 hidden = _mm512_set1_ps(kMasked);
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512 peaks[kStrip];
    for (int r = 0; r < kStrip; ++r) {
        float* row = scores + r * kPageTokens;
        __m512 part[4];
        for (int v = 0; v < 4; ++v) part[v] = _mm512_loadu_ps(row + v * 16);
        if (page.key_scales != nullptr) {
            for (int v = 0; v < 4; ++v) part[v] = _mm512_mul_ps(part[v], _mm512_loadu_ps(page.key_scales + v * 16));
        }
        if (masked) {
            const int newest = first_position + r - first_key;  // in slots of this page
            const int oldest = window > 0 ? newest - window + 1 : -1;
            for (int v = 0; v < 4; ++v) {
                const __m512i slot = _mm512_add_epi32(lane, _mm512_set1_epi32(v * 16));
                const __mmask16 visible = _mm512_cmple_epi32_mask(slot, _mm512_set1_epi32(newest)) &
                                          _mm512_cmpge_epi32_mask(slot, _mm512_set1_epi32(oldest));
                part[v] = _mm512_mask_blend_ps(visible, hidden, part[v]);
            }
        }
        if (masked || page.key_scales != nullptr) {
            for (int v = 0; v < 4; ++v) _mm512_storeu_ps(row + v * 16, part[v]);
        }
        peaks[r] = _mm512_max_ps(_mm512_max_ps(part[0], part[1]), _mm512_max_ps(part[2], part[3]));
    }
    const __m512 before = _mm512_loadu_ps(strip.largest);
    const __m512 scale = _mm512_set1_ps(factor);
    const __m512 largest = _mm512_max_ps(before, _mm512_mul_ps(row_maxima(peaks), scale));
    const __mmask16 grown = _mm512_cmp_ps_mask(largest, before, _CMP_GT_OQ);
    alignas(64) float bases[kStrip];
    _mm512_store_ps(bases, largest);
    if (grown != 0) {
        _mm512_storeu_ps(strip.largest, largest);
        alignas(64) float factors[kStrip];
        _mm512_store_ps(factors, exp2_for_bf16(_mm512_max_ps(_mm512_sub_ps(before, largest), _mm512_set1_ps(-200.f))));
        for (unsigned left = grown; left != 0; left &= left - 1) {
            const int r = __builtin_ctz(left);
            const __m512 shrink = _mm512_set1_ps(factors[r]);
            float* sums = strip.lane_sums + r * 16;
            _mm512_storeu_ps(sums, _mm512_mul_ps(_mm512_loadu_ps(sums), shrink));
            float* out = strip.out + static_cast<size_t>(r) * d;
            for (int i = 0; i < d; i += 16) _mm512_storeu_ps(out + i, _mm512_mul_ps(_mm512_loadu_ps(out + i), shrink));
        }
    }
    for (int r = 0; r < kStrip; ++r) {
        const float* row = scores + r * kPageTokens;
        const __m512 base_row = _mm512_set1_ps(bases[r]);
        __m512 part[4];
        for (int v = 0; v < 4; ++v)
            part[v] = exp2_for_bf16(_mm512_fmsub_ps(_mm512_loadu_ps(row + v * 16), scale, base_row));
        float* sums = strip.lane_sums + r * 16;
        const __m512 total = _mm512_add_ps(_mm512_add_ps(part[0], part[1]), _mm512_add_ps(part[2], part[3]));
        _mm512_storeu_ps(sums, _mm512_add_ps(_mm512_loadu_ps(sums), total));
        if (page.value_scales != nullptr) {
            for (int v = 0; v < 4; ++v) part[v] = _mm512_mul_ps(part[v], _mm512_loadu_ps(page.value_scales + v * 16));
        }
        uint16_t* target = weights + r * kPageTokens;
        _mm512_storeu_si512(target, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(part[1], part[0])));
        _mm512_storeu_si512(target + 32, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(part[3], part[2])));
    }
}

// Many rows at once. Keys and values of a page are used by all strips of all heads while they are in the cache.
template <class Multiply>
void attention_strips(const AttentionCall& call) {
    const CacheLayout& layout = *call.layout;
    const int d = layout.head_dim;
    const int strips = (call.num_rows + kStrip - 1) / kStrip;
    const int states = strips * call.num_heads;
    const size_t query_bytes = static_cast<size_t>(states) * kStrip * d * 2;
    const size_t out_bytes = static_cast<size_t>(states) * kStrip * d * 4;
    const size_t sum_bytes = static_cast<size_t>(states) * kStrip * 16 * 4;
    const size_t largest_bytes = static_cast<size_t>(states) * kStrip * 4;
    const size_t score_bytes = kStrip * kPageTokens * 4, weight_bytes = kStrip * kPageTokens * 2;
    const size_t page_bytes = static_cast<size_t>(d) * kPageTokens * 4;
    thread_local Scratch scratch;
    uint8_t* room =
        scratch.get(query_bytes + out_bytes + sum_bytes + largest_bytes + score_bytes + weight_bytes + page_bytes);
    auto* query = reinterpret_cast<uint16_t*>(room);
    auto* out = reinterpret_cast<float*>(room += query_bytes);
    auto* sums = reinterpret_cast<float*>(room += out_bytes);
    auto* largest = reinterpret_cast<float*>(room += sum_bytes);
    auto* scores = reinterpret_cast<float*>(room += largest_bytes);
    auto* weights = reinterpret_cast<uint16_t*>(room += score_bytes);
    auto* wide = reinterpret_cast<uint16_t*>(room += weight_bytes);

    std::memset(out, 0, out_bytes + sum_bytes);
    std::fill(largest, largest + states * kStrip, kLeastMaximum);
    const float factor = call.scale * kLog2E;
    for (int head = 0; head < call.num_heads; ++head) {
        for (int row = 0; row < strips * kStrip; ++row) {
            uint16_t* target = query + (static_cast<size_t>(head) * strips * kStrip + row) * d;
            if (row >= call.num_rows) {
                std::memset(target, 0, static_cast<size_t>(d) * 2);
                continue;
            }
            const float* source = call.query + row * call.query_stride + static_cast<size_t>(head) * d;
            round_to_bf16(source, d, target);
        }
    }

    [[maybe_unused]] const typename Multiply::Session session{};
    const VisibleRange range(call);
    for (int page_idx = range.first_page; page_idx < range.end_page; ++page_idx) {
        const WidePage page(layout, call.cache + static_cast<size_t>(call.pages[page_idx]) * layout.page_bytes(), wide);
        const int first_key = page_idx * kPageTokens;
        for (int head = 0; head < call.num_heads; ++head) {
            for (int s = 0; s < strips; ++s) {
                const int first_position = call.first_position + s * kStrip;
                const int last_position = std::min(first_position + kStrip, call.first_position + call.num_rows) - 1;
                if (last_position < first_key) continue;
                if (call.window > 0 && first_position - call.window + 1 >= first_key + kPageTokens) continue;
                const bool masked = first_position < first_key + kPageTokens - 1 ||
                                    (call.window > 0 && last_position - call.window + 1 > first_key);
                const size_t state = (static_cast<size_t>(head) * strips + s) * kStrip;
                const Strip strip{query + state * d, out + state * d, largest + state, sums + state * 16};
                Multiply::strip(strip.query, d, page.keys, kPageTokens * 2, d / 2, scores, kPageTokens, kPageTokens,
                                false);
                soften(strip, page, scores, weights, d, factor, masked, first_key, first_position, call.window);
                Multiply::strip(weights, kPageTokens, page.values, static_cast<size_t>(d) * 2, kPageTokens / 2,
                                strip.out, d, d, true);
            }
        }
    }
    for (int head = 0; head < call.num_heads; ++head) {
        for (int row = 0; row < call.num_rows; ++row) {
            const size_t state = static_cast<size_t>(head) * strips * kStrip + row;
            const float total = _mm512_reduce_add_ps(_mm512_loadu_ps(sums + state * 16));
            const __m512 inverse = _mm512_set1_ps(1.f / total);
            float* target = call.out + row * call.out_stride + static_cast<size_t>(head) * d;
            for (int i = 0; i < d; i += 16) {
                _mm512_storeu_ps(target + i, _mm512_mul_ps(_mm512_loadu_ps(out + state * d + i), inverse));
            }
        }
    }
}

template <class Multiply>
void attention_512(const AttentionCall& call) {
    constexpr int kFewRows = 3;  // below this a strip of sixteen would be mostly empty
    if (call.layout->type == CacheType::fp32) {
        attention_portable(call);
    } else if (call.num_rows <= kFewRows) {
        AttentionCall one = call;
        one.num_rows = 1;
        for (int row = 0; row < call.num_rows; ++row) {
            one.first_position = call.first_position + row;
            one.query = call.query + row * call.query_stride;
            one.out = call.out + row * call.out_stride;
            attention_decode_512(one);
        }
    } else {
        attention_strips<Multiply>(call);
    }
}

}  // namespace DSEEK_VARIANT
}  // namespace dseek
