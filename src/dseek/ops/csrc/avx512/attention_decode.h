// Attention of one new token: scores with a lane a key, outputs with a lane a channel, the heads of a group together.
#pragma once

#include <immintrin.h>

#include <algorithm>

#include "attention_page.h"

namespace dseek {
namespace DSEEK_VARIANT {

// One row, up to four heads that share the page: scores with a lane a key, outputs with a lane a channel.
template <int kHeads>
void decode_heads(const AttentionCall& call, int head_begin) {
    const CacheLayout& layout = *call.layout;
    const int d = layout.head_dim;
    thread_local Scratch scratch;
    const size_t query_bytes = round_up_size(static_cast<size_t>(kHeads) * d * 2, 64);
    const size_t out_bytes = static_cast<size_t>(kHeads) * d * 4;
    uint8_t* room = scratch.get(query_bytes + out_bytes + static_cast<size_t>(d) * kPageTokens * 4);
    auto* query = reinterpret_cast<uint16_t*>(room);
    auto* out = reinterpret_cast<float*>(room + query_bytes);
    auto* wide = reinterpret_cast<uint16_t*>(room + query_bytes + out_bytes);
    std::memset(out, 0, out_bytes);
    const __m512 factor = _mm512_set1_ps(call.scale * kLog2E);
    for (int h = 0; h < kHeads; ++h) {
        round_to_bf16(call.query + static_cast<size_t>(head_begin + h) * d, d, query + h * d);
    }
    float largest[kHeads];
    __m512 sums[kHeads];
    for (int h = 0; h < kHeads; ++h) {
        largest[h] = kNegativeInfinity;
        sums[h] = _mm512_setzero_ps();
    }
    // Takes in a page: `adjust` changes its scores [kHeads][4] before they count, the first `num_keys` slots may count,
    // and `following` is what will be read next. That page lies elsewhere in memory, where the hardware's prefetch does
    // not look, so it is asked for meanwhile.
    const auto take = [&](const WidePage& page, const uint8_t* following, size_t following_bytes, int num_keys,
                          const auto& adjust) {
        __m512 scores[kHeads][4];
        for (int h = 0; h < kHeads; ++h) {
            for (int v = 0; v < 4; ++v) scores[h][v] = _mm512_setzero_ps();
        }
        const size_t share = following_bytes / static_cast<size_t>(d / 2);
        for (int i = 0; i < d / 2; ++i) {
            for (size_t byte = i * share / 64 * 64; byte < (i + 1) * share; byte += 64) ask_for(following + byte);
            __m512bh keys[4];
            for (int v = 0; v < 4; ++v) {
                keys[v] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(page.keys + (i * kPageTokens + v * 16) * 2));
            }
            for (int h = 0; h < kHeads; ++h) {
                const auto inputs = reinterpret_cast<__m512bh>(broadcast4(query + h * d + i * 2));
                for (int v = 0; v < 4; ++v) scores[h][v] = _mm512_dpbf16_ps(scores[h][v], inputs, keys[v]);
            }
        }
        if (page.key_scales != nullptr) {
            for (int v = 0; v < 4; ++v) {
                const __m512 scale = _mm512_loadu_ps(page.key_scales + v * 16);
                for (int h = 0; h < kHeads; ++h) scores[h][v] = _mm512_mul_ps(scores[h][v], scale);
            }
        }
        adjust(scores);
        alignas(64) uint16_t weights[kHeads][kPageTokens];
        for (int h = 0; h < kHeads; ++h) {
            const float peak = call.scale * kLog2E *
                               _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(scores[h][0], scores[h][1]),
                                                                  _mm512_max_ps(scores[h][2], scores[h][3])));
            if (peak > largest[h]) {
                const __m512 correction = _mm512_set1_ps(std::exp2(largest[h] - peak));
                largest[h] = peak;
                sums[h] = _mm512_mul_ps(sums[h], correction);
                for (int i = 0; i < d; i += 16) {
                    _mm512_storeu_ps(out + h * d + i, _mm512_mul_ps(_mm512_loadu_ps(out + h * d + i), correction));
                }
            }
            const __m512 base = _mm512_set1_ps(largest[h]);
            for (int v = 0; v < 4; ++v) {
                scores[h][v] = exp2_for_bf16(_mm512_fmsub_ps(scores[h][v], factor, base));
                sums[h] = _mm512_add_ps(sums[h], scores[h][v]);
                if (page.value_scales != nullptr) {
                    scores[h][v] = _mm512_mul_ps(scores[h][v], _mm512_loadu_ps(page.value_scales + v * 16));
                }
            }
            _mm512_store_si512(weights[h], reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(scores[h][1], scores[h][0])));
            _mm512_store_si512(weights[h] + 32,
                               reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(scores[h][3], scores[h][2])));
        }
        const int pairs = (num_keys + 1) / 2;  // later slots have weight 0
        int channel = 0;
        for (; channel + 64 <= d; channel += 64) {
            Multiply512::tile<kHeads, 4>(weights[0], kPageTokens, page.values + channel * 2, static_cast<size_t>(d) * 2,
                                         pairs, out + channel, d, true);
        }
        for (; channel < d; channel += 16) {
            Multiply512::tile<kHeads, 1>(weights[0], kPageTokens, page.values + channel * 2, static_cast<size_t>(d) * 2,
                                         pairs, out + channel, d, true);
        }
    };
    const VisibleBlocks visible(call);
    const int newest = call.first_position;
    const int oldest = call.window > 0 ? newest - call.window + 1 : 0;
    for (int entry = visible.first(); entry < visible.end(); ++entry) {
        const WidePage page(layout, visible.page(entry), wide);
        const int first_key = visible.block(entry) * kPageTokens;
        take(page, visible.page(std::min(entry + 1, visible.end() - 1)), layout.head_bytes,
             std::min(kPageTokens, newest - first_key + 1), [&](__m512(&scores)[kHeads][4]) {
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
             });
    }
    const int far_pages = call.far.num_pages();
    for (int far_page = 0; far_page < far_pages; ++far_page) {
        const uint8_t* data = call.far.pages + far_page * call.far.layout->head_bytes;
        const int begin = far_page * kPageTokens;
        take(WidePage(*call.far.layout, data, wide), data, 0, std::min(kPageTokens, call.far.count - begin),
             [&](__m512(&scores)[kHeads][4]) {
                 for (int h = 0; h < kHeads; ++h) {
                     const float* bias = call.far.bias + (head_begin + h) * far_pages * kPageTokens + begin;
                     for (int v = 0; v < 4; ++v) {
                         scores[h][v] = _mm512_add_ps(scores[h][v], _mm512_loadu_ps(bias + v * 16));
                     }
                 }
             });
    }
    for (int h = 0; h < kHeads; ++h) {
        const float total = _mm512_reduce_add_ps(sums[h]);
        const bool partial = call.partial_max != nullptr;
        if (partial) {
            call.partial_max[head_begin + h] = largest[h];
            call.partial_sum[head_begin + h] = total;
        }
        const __m512 inverse = _mm512_set1_ps(partial ? 1.f : 1.f / total);
        float* target = call.out + static_cast<size_t>(head_begin + h) * d;
        for (int i = 0; i < d; i += 16) {
            _mm512_storeu_ps(target + i, _mm512_mul_ps(_mm512_loadu_ps(out + h * d + i), inverse));
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
