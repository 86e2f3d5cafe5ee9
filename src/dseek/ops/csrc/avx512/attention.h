// Attention over the paged bf16 or int8 cache with AVX-512: a strip of sixteen queries against a page of 64 keys.
//
// The page layouts are those of a packed weight, so scores (queries x keys) and outputs (weights x values) are both
// small matrix products. Between the two, `soften.h` makes weights of scores.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <vector>

#include "attention_decode.h"
#include "soften.h"

namespace dseek {
namespace DSEEK_VARIANT {

// Overwrites the scores [16][64] of keys that a row may not see.
inline void hide_keys(float* scores, int first_key, int first_position, int window) {
    const __m512 hidden = _mm512_set1_ps(kMasked);
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int r = 0; r < kStrip; ++r) {
        float* row = scores + r * kPageTokens;
        const int newest = first_position + r - first_key;  // in slots of this page
        const int oldest = window > 0 ? newest - window + 1 : -1;
        for (int v = 0; v < 4; ++v) {
            const __m512i slot = _mm512_add_epi32(lane, _mm512_set1_epi32(v * 16));
            const __mmask16 visible = _mm512_cmple_epi32_mask(slot, _mm512_set1_epi32(newest)) &
                                      _mm512_cmpge_epi32_mask(slot, _mm512_set1_epi32(oldest));
            _mm512_storeu_ps(row + v * 16, _mm512_mask_blend_ps(visible, hidden, _mm512_loadu_ps(row + v * 16)));
        }
    }
}

// Overwrites the scores [16][64] of the first rows.
inline void hide_rows(float* scores, int num_rows) {
    const __m512 hidden = _mm512_set1_ps(kMasked);
    for (int i = 0; i < num_rows * kPageTokens; i += 16) _mm512_storeu_ps(scores + i, hidden);
}

// Adds to each key's scores what its cell brings along.
inline void add_bias(float* scores, const float* bias) {
    for (int v = 0; v < 4; ++v) {
        const __m512 added = _mm512_loadu_ps(bias + v * 16);
        for (int r = 0; r < kStrip; ++r) {
            float* part = scores + r * kPageTokens + v * 16;
            _mm512_storeu_ps(part, _mm512_add_ps(_mm512_loadu_ps(part), added));
        }
    }
}

// What a call keeps for all its strips: queries, sums and bases of every head and strip, in the thread's scratch.
class StripStates {
public:
    StripStates(const AttentionCall& call, size_t extra_bytes)
        : call_(call), d_(call.layout->head_dim), strips_((call.num_rows + kStrip - 1) / kStrip) {
        const size_t rows = static_cast<size_t>(strips_) * call.num_heads * kStrip;
        thread_local Scratch scratch;
        uint8_t* room = scratch.get(rows * (d_ * 6 + 17 * 4) + extra_bytes);
        out_ = reinterpret_cast<float*>(room);
        sums_ = out_ + rows * d_;
        bases_ = sums_ + rows * 16;
        query_ = reinterpret_cast<uint16_t*>(bases_ + rows);
        extra_ = reinterpret_cast<uint8_t*>(query_ + rows * d_);
        std::memset(out_, 0, rows * (d_ + 16) * 4);
        std::fill(bases_, bases_ + rows, kLeastMaximum);
        for (int head = 0; head < call.num_heads; ++head) {
            uint16_t* target = query_ + static_cast<size_t>(head) * strips_ * kStrip * d_;
            for (int row = 0; row < call.num_rows; ++row) {
                round_to_bf16(call.query + row * call.query_stride + head * d_, d_, target + row * d_);
            }
            std::memset(target + call.num_rows * d_, 0, (strips_ * kStrip - call.num_rows) * d_ * 2);
        }
    }
    int strips() const { return strips_; }
    uint8_t* extra() const { return extra_; }  // on a cache line
    Strip strip(int head, int index) const {
        const size_t row = (static_cast<size_t>(head) * strips_ + index) * kStrip;
        return {query_ + row * d_, out_ + row * d_, bases_ + row, sums_ + row * 16};
    }
    // Divides by the sums and writes the call's rows.
    void finish() const {
        for (int head = 0; head < call_.num_heads; ++head) {
            for (int row = 0; row < call_.num_rows; ++row) {
                const size_t state = static_cast<size_t>(head) * strips_ * kStrip + row;
                const float total = _mm512_reduce_add_ps(_mm512_loadu_ps(sums_ + state * 16));
                const __m512 inverse = _mm512_set1_ps(1.f / total);
                float* target = call_.out + row * call_.out_stride + head * d_;
                for (size_t i = 0; i < d_; i += 16) {
                    _mm512_storeu_ps(target + i, _mm512_mul_ps(_mm512_loadu_ps(out_ + state * d_ + i), inverse));
                }
            }
        }
    }

private:
    const AttentionCall& call_;
    size_t d_;
    int strips_;
    float *out_, *sums_, *bases_;
    uint16_t* query_;
    uint8_t* extra_;
};

// What a strip may see of a page.
struct StripView {
    bool visible;  // anything at all
    bool masked;   // not everything

    StripView(const AttentionCall& call, int strip_idx, int first_key) {
        const int first = call.first_position + strip_idx * kStrip;
        const int last = std::min(first + kStrip, call.first_position + call.num_rows) - 1;
        const bool windowed = call.window > 0;
        visible = last >= first_key && !(windowed && first - call.window + 1 >= first_key + kPageTokens);
        masked = first < first_key + kPageTokens - 1 || (windowed && last - call.window + 1 > first_key);
    }
};

// The two products of a strip, with vectors.
struct StripVectors {
    struct Session {};  // nothing to set up

    explicit StripVectors(int head_dim) : d(head_dim) {}
    void score(const Strip& strip, const uint16_t* keys, float* scores) const {
        multiply_strip(strip.query, d, keys, kPageTokens * 2, d / 2, scores, kPageTokens, kPageTokens, false);
    }
    void add_output(const Strip& strip, const uint16_t* weights, const uint16_t* values) const {
        multiply_strip(weights, kPageTokens, values, static_cast<size_t>(d) * 2, kPageTokens / 2, strip.out, d, d,
                       true);
    }
    int d;
};

// Asks for a page that comes next: pages lie apart, where the processor does not look ahead by itself.
inline void prefetch_page(const uint8_t* page, size_t bytes) {
    for (size_t at = 0; at < bytes; at += 64) { _mm_prefetch(reinterpret_cast<const char*>(page + at), _MM_HINT_T1); }
}

// Many rows at once. Keys and values of a page are used by all strips of all heads while they are in the cache. One
// strip at a time: with more, their scores push the page out of the first-level cache.
template <class Products>
void attention_strips(const AttentionCall& call) {
    const CacheLayout& layout = *call.layout;
    const int d = layout.head_dim;
    constexpr size_t kScoreBytes = kStrip * kPageTokens * 4, kWeightBytes = kStrip * kPageTokens * 2;
    const StripStates states(call, kScoreBytes + kWeightBytes + WidePage::room_bytes(d));
    auto* scores = reinterpret_cast<float*>(states.extra());
    auto* weights = reinterpret_cast<uint16_t*>(states.extra() + kScoreBytes);
    auto* wide = reinterpret_cast<uint16_t*>(states.extra() + kScoreBytes + kWeightBytes);
    const float factor = call.scale * kLog2E;
    const Products products(d);
    [[maybe_unused]] const typename Products::Session session{};
    const auto attend = [&](const Strip& strip, const WidePage& page, const auto& adjust) {
        products.score(strip, page.keys, scores);
        adjust();
        soften(strip, page, scores, weights, d, factor);
        products.add_output(strip, weights, page.values);
    };
    const VisibleBlocks visible(call);
    for (int entry = visible.first(); entry < visible.end(); ++entry) {
        const WidePage page(layout, visible.page(entry), wide);
        const int first_key = visible.block(entry) * kPageTokens, from_row = visible.from_row(entry);
        if (entry + 1 < visible.end()) prefetch_page(visible.page(entry + 1), layout.head_bytes);
        for (int head = 0; head < call.num_heads; ++head) {
            for (int s = from_row / kStrip; s < states.strips(); ++s) {
                const StripView view(call, s, first_key);
                if (!view.visible) continue;
                attend(states.strip(head, s), page, [&] {
                    if (view.masked) hide_keys(scores, first_key, call.first_position + s * kStrip, call.window);
                    if (from_row > s * kStrip) hide_rows(scores, from_row - s * kStrip);
                });
            }
        }
    }
    const int far_pages = call.far.num_pages();
    for (int far_page = 0; far_page < far_pages; ++far_page) {
        const WidePage page(*call.far.layout, call.far.pages + far_page * call.far.layout->head_bytes, wide);
        for (int head = 0; head < call.num_heads; ++head) {
            const float* bias = call.far.bias + (static_cast<size_t>(head) * far_pages + far_page) * kPageTokens;
            for (int s = 0; s < states.strips(); ++s) {
                attend(states.strip(head, s), page, [&] { add_bias(scores, bias); });
            }
        }
    }
    states.finish();
}

// A row of a call, with the blocks that it attends to; `blocks` holds them where rows have different ones.
inline AttentionCall row_of(const AttentionCall& call, int row, std::vector<int32_t>& blocks) {
    AttentionCall one = call;
    one.num_rows = 1;
    one.first_position = call.first_position + row;
    one.query = call.query + row * call.query_stride;
    one.out = call.out + row * call.out_stride;
    if (call.from_rows != nullptr) {
        blocks.clear();
        for (int i = 0; i < call.num_blocks; ++i) {
            if (call.from_rows[i] <= row) blocks.push_back(call.blocks[i]);
        }
        one.blocks = blocks.data();
        one.num_blocks = static_cast<int>(blocks.size());
        one.from_rows = nullptr;
    }
    return one;
}

// `strips` attends for more rows than `few`, up to which strips of sixteen, mostly empty, take longer than row by row.
template <class Strips>
void attention_512(const AttentionCall& call, int few, const Strips& strips) {
    if (call.layout->type == CacheType::fp32) {
        attention_portable(call);
    } else if (call.num_rows == 1 || std::max(call.num_rows, call.step_rows) <= few) {
        thread_local std::vector<int32_t> blocks;
        for (int row = 0; row < call.num_rows; ++row) attention_decode_512(row_of(call, row, blocks));
    } else {
        strips(call);
    }
}

inline void attention_avx512(const AttentionCall& call) {
    attention_512(call, call.layout->type == CacheType::int8 ? 14 : 8, attention_strips<StripVectors>);
}

}  // namespace DSEEK_VARIANT
}  // namespace dseek
