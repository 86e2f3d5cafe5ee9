// From scores to weights: a strip of sixteen queries against a page of 64 keys, flash style, with a running base that
// is raised only where scores outgrow it by far (Dao et al. 2022, FlashAttention, algorithm 1, with the rescale put
// off).
#pragma once

#include <immintrin.h>

#include <algorithm>

#include "attention_page.h"

namespace dseek {
namespace DSEEK_VARIANT {

constexpr int kStrip = 16;  // queries

// By how much, in base-2 exponents, scores may exceed a row's base before it is raised. Weights then reach 2^24, which
// bf16 and fp32 hold as exactly as weights up to 1; in return a base is raised once or twice a row, not at every new
// maximum.
constexpr float kSlack = 24.f;

// Queries of one head against one page, for a strip of sixteen rows.
struct Strip {
    uint16_t* query;   // [16][d]
    float* out;        // [16][d], not normalised
    float* bases;      // [16], what is subtracted from the scores times log2(e) / sqrt(d)
    float* lane_sums;  // [16][16], sums kept lane by lane until the end
};

// One vector of a row's scores.
template <bool kScaled>
[[gnu::always_inline]] inline __m512 load_scores(const WidePage& page, const float* row, int vector) {
    const __m512 scores = _mm512_loadu_ps(row + vector * 16);
    if constexpr (kScaled) return _mm512_mul_ps(scores, _mm512_loadu_ps(page.key_scales + vector * 16));
    else return scores;
}

// Largest of each lane of a row.
[[gnu::always_inline]] inline __m512 lane_maxima(const __m512* row) {
    return _mm512_max_ps(_mm512_max_ps(row[0], row[1]), _mm512_max_ps(row[2], row[3]));
}

// Raises the bases of two rows where scores exceed them by more than the slack, and scales what was summed so far.
// `factor` turns scores into exponents, counted in units of `unit`. Kept out of line, so that the common case holds all
// its values in registers.
template <bool kScaled>
[[gnu::noinline]] void raise_bases(const Strip& strip, const WidePage& page, int r, const float* scores, int d,
                                   float factor, float unit) {
    for (int row = r; row < r + 2; ++row) {
        __m512 part[4];
        for (int v = 0; v < 4; ++v) part[v] = load_scores<kScaled>(page, scores + row * kPageTokens, v);
        const float largest = _mm512_reduce_max_ps(lane_maxima(part)) * factor, before = strip.bases[row];
        if ((largest - before) * unit <= kSlack) continue;
        strip.bases[row] = largest;
        if (before <= kLeastMaximum) continue;  // nothing was summed yet
        const __m512 shrink = exp2_for_bf16(_mm512_set1_ps((before - largest) * unit));
        float* sums = strip.lane_sums + row * 16;
        _mm512_storeu_ps(sums, _mm512_mul_ps(_mm512_loadu_ps(sums), shrink));
        float* out = strip.out + static_cast<size_t>(row) * d;
        for (int i = 0; i < d; i += 16) _mm512_storeu_ps(out + i, _mm512_mul_ps(_mm512_loadu_ps(out + i), shrink));
    }
}

// Exponents of two rows, four vectors each: scores times `factor` minus the row's base, which is raised where needed.
template <bool kScaled>
[[gnu::always_inline]] inline void load_exponents(const Strip& strip, const WidePage& page, int r, const float* scores,
                                                  int d, float factor, float unit, __m512* x) {
    const __m512 scale = _mm512_set1_ps(factor), slack = _mm512_set1_ps(kSlack / unit);
    // Twice at most: scores that are no numbers can exceed every base.
    for (bool raised = false;; raised = true) {
        for (int i = 0; i < 8; ++i) x[i] = load_scores<kScaled>(page, scores + (r + i / 4) * kPageTokens, i % 4);
        for (int i = 0; i < 8; ++i) x[i] = _mm512_fmsub_ps(x[i], scale, _mm512_set1_ps(strip.bases[r + i / 4]));
        const __m512 peaks = _mm512_max_ps(lane_maxima(x), lane_maxima(x + 4));
        if (raised || _mm512_cmp_ps_mask(peaks, slack, _CMP_GT_OQ) == 0) [[likely]]
            return;
        raise_bases<kScaled>(strip, page, r, scores, d, factor, unit);
    }
}

// Adds the weights of two rows, four vectors each, to the rows' sums.
[[gnu::always_inline]] inline void add_to_sums(const Strip& strip, int r, const __m512* weights) {
    for (int row = 0; row < 2; ++row) {
        const __m512* part = weights + row * 4;
        float* sums = strip.lane_sums + (r + row) * 16;
        const __m512 total = _mm512_add_ps(_mm512_add_ps(part[0], part[1]), _mm512_add_ps(part[2], part[3]));
        _mm512_storeu_ps(sums, _mm512_add_ps(_mm512_loadu_ps(sums), total));
    }
}

// Rounds two rows of weights, four vectors each, to bf16; the scales of int8 values go into the weights.
template <bool kScaled>
[[gnu::always_inline]] inline void store_weights(const WidePage& page, uint16_t* target, __m512* weights) {
    if constexpr (kScaled) {
        for (int i = 0; i < 8; ++i) {
            weights[i] = _mm512_mul_ps(weights[i], _mm512_loadu_ps(page.value_scales + i % 4 * 16));
        }
    }
    for (int i = 0; i < 8; i += 2) {
        const __m512bh both = _mm512_cvtne2ps_pbh(weights[i + 1], weights[i]);
        _mm512_storeu_si512(target + i * 16, reinterpret_cast<__m512i>(both));
    }
}

// Turns two rows of scores [64] into bf16 weights [64] and adds them to the rows' sums. The scores are plain products;
// `factor`, log2(e) / sqrt(d), is applied where the exponent is formed, so that it costs nothing and the queries are
// rounded only once. Each step is taken for all eight vectors before the next step: the processor's window is too small
// to find that order itself when other work is mixed in.
template <bool kScaled>
[[gnu::always_inline]] inline void soften_rows(const Strip& strip, const WidePage& page, int r, const float* scores,
                                               uint16_t* weights, int d, float factor) {
    __m512 x[8], fraction[8], y[8];
    load_exponents<kScaled>(strip, page, r, scores, d, factor, 1.f, x);
    exp2_for_bf16<8>(x, fraction, y);
    add_to_sums(strip, r, y);
    store_weights<kScaled>(page, weights + r * kPageTokens, y);
}

inline void soften(const Strip& strip, const WidePage& page, const float* scores, uint16_t* weights, int d,
                   float factor) {
    for (int r = 0; r < kStrip; r += 2) {
        if (page.key_scales != nullptr) soften_rows<true>(strip, page, r, scores, weights, d, factor);
        else soften_rows<false>(strip, page, r, scores, weights, d, factor);
    }
}

}  // namespace DSEEK_VARIANT
}  // namespace dseek
