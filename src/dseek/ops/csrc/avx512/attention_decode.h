// Attention of one new token: scores with a lane a key, outputs with a lane a channel, the heads of a group together.
//
// Pages of bf16 are multiplied as they are. Pages of int8 are multiplied as 16-bit integers: queries and weights have
// fifteen bits of their own scale, more than bf16 would keep, and a product of pairs is one instruction.
#pragma once

#include <immintrin.h>

#include <algorithm>

#include "attention_page.h"

namespace dseek {
namespace DSEEK_VARIANT {

constexpr float kInt16Range = 32767.f;

// Up to four heads that share their pages: what they have seen so far.
template <int kHeads>
struct DecodeState {
    using Scores = __m512[kHeads][4];

    int d;
    float factor;  // log2(e) / sqrt(d)
    float* out;    // [kHeads][d], not normalised
    float largest[kHeads];
    __m512 sums[kHeads];

    DecodeState(int head_dim, float scale, float* out_room) : d(head_dim), factor(scale * kLog2E), out(out_room) {
        std::memset(out, 0, static_cast<size_t>(kHeads) * d * sizeof(float));
        for (int h = 0; h < kHeads; ++h) {
            largest[h] = kNegativeInfinity;
            sums[h] = _mm512_setzero_ps();
        }
    }

    // Turns the scores of a page into weights; what was summed before shrinks where the maximum grew.
    void weigh(Scores& scores) {
        for (int h = 0; h < kHeads; ++h) {
            const float peak = factor * _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(scores[h][0], scores[h][1]),
                                                                           _mm512_max_ps(scores[h][2], scores[h][3])));
            if (peak > largest[h]) {
                const __m512 shrink = _mm512_set1_ps(std::exp2(largest[h] - peak));
                largest[h] = peak;
                sums[h] = _mm512_mul_ps(sums[h], shrink);
                for (int i = 0; i < d; i += 16) {
                    float* part = out + h * d + i;
                    _mm512_storeu_ps(part, _mm512_mul_ps(_mm512_loadu_ps(part), shrink));
                }
            }
            const __m512 base = _mm512_set1_ps(largest[h]);
            for (int v = 0; v < 4; ++v) {
                scores[h][v] = exp2_for_bf16(_mm512_fmsub_ps(scores[h][v], _mm512_set1_ps(factor), base));
                sums[h] = _mm512_add_ps(sums[h], scores[h][v]);
            }
        }
    }
};

// Queries as integers, with the scale of each head.
template <int kHeads>
struct IntegerQuery {
    const int16_t* values;  // [kHeads][d]
    float scale[kHeads];

    IntegerQuery(const float* query, int d, int16_t* room) : values(room) {
        for (int h = 0; h < kHeads; ++h) {
            __m512 top = _mm512_setzero_ps();
            for (int i = 0; i < d; i += 16) {
                top = _mm512_max_ps(top, _mm512_abs_ps(_mm512_loadu_ps(query + static_cast<size_t>(h) * d + i)));
            }
            const float largest = _mm512_reduce_max_ps(top);
            scale[h] = largest / kInt16Range;
            const __m512 inverse = _mm512_set1_ps(largest > 0.f ? kInt16Range / largest : 0.f);
            for (int i = 0; i < d; i += 16) {
                const __m512 part = _mm512_loadu_ps(query + static_cast<size_t>(h) * d + i);
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(room + h * d + i),
                                    _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(part, inverse))));
            }
        }
    }
};

// A part of `following`, which is read next: that page lies elsewhere in memory, where the hardware's prefetch does not
// look.
inline void ask_for_part(const uint8_t* following, size_t num_bytes, int part, int parts) {
    const size_t share = num_bytes / static_cast<size_t>(parts);
    for (size_t byte = part * share / 64 * 64; byte < (part + 1) * share; byte += 64) ask_for(following + byte);
}

inline __m512i widen_pairs(const int8_t* source) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
}

template <int kHeads>
void score_bf16(const uint16_t* query, const uint16_t* keys, int d, const uint8_t* following, size_t following_bytes,
                typename DecodeState<kHeads>::Scores& scores) {
    for (int h = 0; h < kHeads; ++h) {
        for (int v = 0; v < 4; ++v) scores[h][v] = _mm512_setzero_ps();
    }
    for (int i = 0; i < d / 2; ++i) {
        ask_for_part(following, following_bytes, i, d / 2);
        __m512bh part[4];
        for (int v = 0; v < 4; ++v) {
            part[v] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(keys + (i * kPageTokens + v * 16) * 2));
        }
        for (int h = 0; h < kHeads; ++h) {
            const auto inputs = reinterpret_cast<__m512bh>(broadcast4(query + h * d + i * 2));
            for (int v = 0; v < 4; ++v) scores[h][v] = _mm512_dpbf16_ps(scores[h][v], inputs, part[v]);
        }
    }
}

template <int kHeads>
void score_int8(const IntegerQuery<kHeads>& query, const int8_t* keys, const float* key_scales, int d,
                const uint8_t* following, size_t following_bytes, typename DecodeState<kHeads>::Scores& scores) {
    __m512i sums[kHeads][4];
    for (int h = 0; h < kHeads; ++h) {
        for (int v = 0; v < 4; ++v) sums[h][v] = _mm512_setzero_si512();
    }
    for (int i = 0; i < d / 2; ++i) {
        ask_for_part(following, following_bytes, i, d / 2);
        __m512i part[4];
        for (int v = 0; v < 4; ++v) part[v] = widen_pairs(keys + (i * kPageTokens + v * 16) * 2);
        for (int h = 0; h < kHeads; ++h) {
            const __m512i inputs = broadcast4(query.values + h * d + i * 2);
            for (int v = 0; v < 4; ++v) sums[h][v] = _mm512_dpwssd_epi32(sums[h][v], inputs, part[v]);
        }
    }
    for (int v = 0; v < 4; ++v) {
        const __m512 key_scale = _mm512_loadu_ps(key_scales + v * 16);
        for (int h = 0; h < kHeads; ++h) {
            const __m512 scale = _mm512_mul_ps(key_scale, _mm512_set1_ps(query.scale[h]));
            scores[h][v] = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[h][v]), scale);
        }
    }
}

template <int kHeads>
void add_bf16(const typename DecodeState<kHeads>::Scores& weights, const uint16_t* values, int num_keys, int d,
              float* out) {
    alignas(64) uint16_t rounded[kHeads][kPageTokens];
    for (int h = 0; h < kHeads; ++h) {
        for (int v = 0; v < 4; v += 2) {
            const __m512bh both = _mm512_cvtne2ps_pbh(weights[h][v + 1], weights[h][v]);
            _mm512_store_si512(rounded[h] + v * 16, reinterpret_cast<__m512i>(both));
        }
    }
    const int pairs = (num_keys + 1) / 2;  // later slots have weight 0
    const auto stride = static_cast<size_t>(d) * 2;
    int channel = 0;
    for (; channel + 64 <= d; channel += 64) {
        Multiply512::tile<kHeads, 4>(rounded[0], kPageTokens, values + channel * 2, stride, pairs, out + channel, d,
                                     true);
    }
    for (; channel < d; channel += 16) {
        Multiply512::tile<kHeads, 1>(rounded[0], kPageTokens, values + channel * 2, stride, pairs, out + channel, d,
                                     true);
    }
}

template <int kHeads, int kVectors>
void add_int8_channels(const int16_t (*weights)[kPageTokens], const float* scales, const int8_t* values, int pairs,
                       int d, float* out) {
    __m512i sums[kHeads][kVectors];
    for (int h = 0; h < kHeads; ++h) {
        for (int v = 0; v < kVectors; ++v) sums[h][v] = _mm512_setzero_si512();
    }
    for (int pair = 0; pair < pairs; ++pair) {
        __m512i part[kVectors];
        for (int v = 0; v < kVectors; ++v) part[v] = widen_pairs(values + (static_cast<size_t>(pair) * d + v * 16) * 2);
        for (int h = 0; h < kHeads; ++h) {
            const __m512i inputs = broadcast4(weights[h] + pair * 2);
            for (int v = 0; v < kVectors; ++v) sums[h][v] = _mm512_dpwssd_epi32(sums[h][v], inputs, part[v]);
        }
    }
    for (int h = 0; h < kHeads; ++h) {
        for (int v = 0; v < kVectors; ++v) {
            float* target = out + h * d + v * 16;
            const __m512 scale = _mm512_set1_ps(scales[h]);
            _mm512_storeu_ps(target, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[h][v]), scale, _mm512_loadu_ps(target)));
        }
    }
}

template <int kHeads>
void add_int8(const typename DecodeState<kHeads>::Scores& weights, const int8_t* values, const float* value_scales,
              int num_keys, int d, float* out) {
    // The values' scales go into the weights, which then have a scale of the page.
    alignas(64) int16_t integers[kHeads][kPageTokens];
    float scales[kHeads];
    for (int h = 0; h < kHeads; ++h) {
        __m512 scaled[4];
        for (int v = 0; v < 4; ++v) scaled[v] = _mm512_mul_ps(weights[h][v], _mm512_loadu_ps(value_scales + v * 16));
        const float largest = _mm512_reduce_max_ps(
            _mm512_max_ps(_mm512_max_ps(scaled[0], scaled[1]), _mm512_max_ps(scaled[2], scaled[3])));
        scales[h] = largest / kInt16Range;
        const __m512 inverse = _mm512_set1_ps(largest > 0.f ? kInt16Range / largest : 0.f);
        for (int v = 0; v < 4; ++v) {
            _mm256_store_si256(reinterpret_cast<__m256i*>(integers[h] + v * 16),
                               _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(scaled[v], inverse))));
        }
    }
    const int pairs = (num_keys + 1) / 2;
    int channel = 0;
    for (; channel + 64 <= d; channel += 64) {
        add_int8_channels<kHeads, 4>(integers, scales, values + channel * 2, pairs, d, out + channel);
    }
    for (; channel < d; channel += 16) {
        add_int8_channels<kHeads, 1>(integers, scales, values + channel * 2, pairs, d, out + channel);
    }
}

// Hides the keys of a page that the newest position does not see.
template <int kHeads>
void hide_keys_of_one(typename DecodeState<kHeads>::Scores& scores, int first_key, int newest, int oldest) {
    if (newest >= first_key + kPageTokens - 1 && oldest <= first_key) return;
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int v = 0; v < 4; ++v) {
        const __m512i position = _mm512_add_epi32(lane, _mm512_set1_epi32(first_key + v * 16));
        const __mmask16 shown = _mm512_cmple_epi32_mask(position, _mm512_set1_epi32(newest)) &
                                _mm512_cmpge_epi32_mask(position, _mm512_set1_epi32(oldest));
        for (int h = 0; h < kHeads; ++h) {
            scores[h][v] = _mm512_mask_blend_ps(shown, _mm512_set1_ps(kMasked), scores[h][v]);
        }
    }
}

// One row, up to four heads that share the page.
template <int kHeads>
void decode_heads(const AttentionCall& call, int head_begin) {
    const CacheLayout& layout = *call.layout;
    const int d = layout.head_dim;
    thread_local Scratch scratch;
    const size_t query_bytes = round_up_size(static_cast<size_t>(kHeads) * d * 2, 64);
    uint8_t* room = scratch.get(2 * query_bytes + static_cast<size_t>(kHeads) * d * 4);
    auto* query = reinterpret_cast<uint16_t*>(room);
    const float* source = call.query + static_cast<size_t>(head_begin) * d;
    for (int h = 0; h < kHeads; ++h) round_to_bf16(source + static_cast<size_t>(h) * d, d, query + h * d);
    const IntegerQuery<kHeads> integer_query(source, d, reinterpret_cast<int16_t*>(room + query_bytes));
    DecodeState<kHeads> state(d, call.scale, reinterpret_cast<float*>(room + 2 * query_bytes));
    typename DecodeState<kHeads>::Scores scores;

    const VisibleBlocks visible(call);
    const int newest = call.first_position;
    const int oldest = call.window > 0 ? newest - call.window + 1 : 0;
    for (int entry = visible.first(); entry < visible.end(); ++entry) {
        const uint8_t* page = visible.page(entry);
        const uint8_t* following = visible.page(std::min(entry + 1, visible.end() - 1));
        const uint8_t* values = page + layout.value_offset;
        const int first_key = visible.block(entry) * kPageTokens;
        const int num_keys = std::min(kPageTokens, newest - first_key + 1);
        if (layout.type == CacheType::int8) {
            const auto* scales = reinterpret_cast<const float*>(page + layout.scale_offset);
            score_int8<kHeads>(integer_query, reinterpret_cast<const int8_t*>(page), scales, d, following,
                               layout.head_bytes, scores);
            hide_keys_of_one<kHeads>(scores, first_key, newest, oldest);
            state.weigh(scores);
            add_int8<kHeads>(scores, reinterpret_cast<const int8_t*>(values), scales + kPageTokens, num_keys, d,
                             state.out);
        } else {
            score_bf16<kHeads>(query, reinterpret_cast<const uint16_t*>(page), d, following, layout.head_bytes, scores);
            hide_keys_of_one<kHeads>(scores, first_key, newest, oldest);
            state.weigh(scores);
            add_bf16<kHeads>(scores, reinterpret_cast<const uint16_t*>(values), num_keys, d, state.out);
        }
    }
    const int far_pages = call.far.num_pages();
    for (int far_page = 0; far_page < far_pages; ++far_page) {
        const uint8_t* page = call.far.pages + far_page * call.far.layout->head_bytes;
        const int begin = far_page * kPageTokens;
        score_bf16<kHeads>(query, reinterpret_cast<const uint16_t*>(page), d, page, 0, scores);
        for (int h = 0; h < kHeads; ++h) {
            const float* bias = call.far.bias + (head_begin + h) * far_pages * kPageTokens + begin;
            for (int v = 0; v < 4; ++v) scores[h][v] = _mm512_add_ps(scores[h][v], _mm512_loadu_ps(bias + v * 16));
        }
        state.weigh(scores);
        add_bf16<kHeads>(scores, reinterpret_cast<const uint16_t*>(page + call.far.layout->value_offset),
                         std::min(kPageTokens, call.far.count - begin), d, state.out);
    }

    for (int h = 0; h < kHeads; ++h) {
        const float total = _mm512_reduce_add_ps(state.sums[h]);
        const bool partial = call.partial_max != nullptr;
        if (partial) {
            call.partial_max[head_begin + h] = state.largest[h];
            call.partial_sum[head_begin + h] = total;
        }
        const __m512 inverse = _mm512_set1_ps(partial ? 1.f : 1.f / total);
        float* target = call.out + static_cast<size_t>(head_begin + h) * d;
        for (int i = 0; i < d; i += 16) {
            _mm512_storeu_ps(target + i, _mm512_mul_ps(_mm512_loadu_ps(state.out + h * d + i), inverse));
        }
    }
}

inline void attention_decode_512(const AttentionCall& call) {
    int head = 0;
    for (; head + 4 <= call.num_heads; head += 4) decode_heads<4>(call, head);
    switch (call.num_heads - head) {
        case 3: decode_heads<3>(call, head); return;
        case 2: decode_heads<2>(call, head); return;
        case 1: decode_heads<1>(call, head); return;
        default: return;
    }
}

}  // namespace DSEEK_VARIANT
}  // namespace dseek
