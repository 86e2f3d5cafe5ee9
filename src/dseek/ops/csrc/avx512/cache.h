// Writing keys and values into a bf16 page sixteen tokens at a time; everything else is the portable writer's.
#pragma once

#include <immintrin.h>

#include "../common/attention_portable.h"

namespace dseek {
namespace DSEEK_VARIANT {

// Transposes a 16 x 16 matrix of 32-bit values held in sixteen registers.
inline void transpose16(__m512i* rows) {
    __m512i next[16];
    for (int i = 0; i < 16; i += 2) {
        next[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        next[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        rows[i] = _mm512_unpacklo_epi64(next[i], next[i + 2]);
        rows[i + 1] = _mm512_unpackhi_epi64(next[i], next[i + 2]);
        rows[i + 2] = _mm512_unpacklo_epi64(next[i + 1], next[i + 3]);
        rows[i + 3] = _mm512_unpackhi_epi64(next[i + 1], next[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        next[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
        next[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
        next[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
        next[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
        rows[i] = _mm512_shuffle_i32x4(next[i], next[i + 8], 0x88);
        rows[i + 8] = _mm512_shuffle_i32x4(next[i], next[i + 8], 0xdd);
        rows[i + 4] = _mm512_shuffle_i32x4(next[i + 4], next[i + 12], 0x88);
        rows[i + 12] = _mm512_shuffle_i32x4(next[i + 4], next[i + 12], 0xdd);
    }
}

inline __m512i bf16_of(const float* source) {
    return _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_loadu_ps(source))));
}

// `slot` is even and all sixteen tokens lie in the page.
inline void store_sixteen(const CacheLayout& layout, uint8_t* page, int slot, const float* key, const float* value,
                          size_t stride) {
    const int d = layout.head_dim;
    auto* keys = reinterpret_cast<uint16_t*>(page);
    auto* values = reinterpret_cast<uint16_t*>(page + layout.value_offset);
    for (int i = 0; i < d; i += 32) {
        // 32 inputs are sixteen pairs; a head width that is no multiple of 32 leaves eight of them empty.
        const bool full = i + 32 <= d;
        __m512i pairs[16];
        for (int token = 0; token < 16; ++token) {
            const float* source = key + token * stride + i;
            const __m512 low = _mm512_loadu_ps(source),
                         high = full ? _mm512_loadu_ps(source + 16) : _mm512_setzero_ps();
            pairs[token] = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
        }
        transpose16(pairs);
        for (int pair = 0; pair < (full ? 16 : 8); ++pair) {
            _mm512_storeu_si512(keys + (static_cast<size_t>(i / 2 + pair) * kPageTokens + slot) * 2, pairs[pair]);
        }
    }
    for (int token = 0; token < 16; token += 2) {
        const float* first = value + token * stride;
        uint16_t* target = values + static_cast<size_t>((slot + token) / 2) * d * 2;
        for (int i = 0; i < d; i += 16) {
            const __m512i pair =
                _mm512_or_si512(bf16_of(first + i), _mm512_slli_epi32(bf16_of(first + stride + i), 16));
            _mm512_storeu_si512(target + i * 2, pair);
        }
    }
}

inline void store_tokens_512(const CacheLayout& layout, uint8_t* page, int slot, int count, const float* key,
                             const float* value, size_t stride) {
    int token = 0;
    if (layout.type == CacheType::bf16) {
        if (slot % 2 == 1 && count > 0) {
            store_token(layout, page, slot, key, value);
            token = 1;
        }
        for (; token + 16 <= count; token += 16) {
            store_sixteen(layout, page, slot + token, key + token * stride, value + token * stride, stride);
        }
    }
    for (; token < count; ++token)
        store_token(layout, page, slot + token, key + token * stride, value + token * stride);
}

inline void store_page_512(const CacheLayout& layout, uint8_t* page, const uint16_t* key, const uint16_t* value) {
    const int d = layout.head_dim;
    auto* keys = reinterpret_cast<uint16_t*>(page);
    auto* values = reinterpret_cast<uint16_t*>(page + layout.value_offset);
    for (int slot = 0; slot < kPageTokens; slot += 16) {
        for (int i = 0; i < d; i += 32) {
            const bool full = i + 32 <= d;
            const __mmask32 inside = full ? 0xffffffffu : 0xffffu;
            __m512i pairs[16];
            for (int token = 0; token < 16; ++token) {
                pairs[token] = _mm512_maskz_loadu_epi16(inside, key + (slot + token) * d + i);
            }
            transpose16(pairs);
            for (int pair = 0; pair < (full ? 16 : 8); ++pair) {
                _mm512_storeu_si512(keys + (static_cast<size_t>(i / 2 + pair) * kPageTokens + slot) * 2, pairs[pair]);
            }
        }
    }
    for (int slot = 0; slot < kPageTokens; slot += 2) {
        const auto load = [&](int token, int i) {
            return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(value + token * d + i)));
        };
        uint16_t* target = values + static_cast<size_t>(slot) * d;
        for (int i = 0; i < d; i += 16) {
            _mm512_storeu_si512(target + i * 2,
                                _mm512_or_si512(load(slot, i), _mm512_slli_epi32(load(slot + 1, i), 16)));
        }
    }
}

}  // namespace DSEEK_VARIANT
}  // namespace dseek
