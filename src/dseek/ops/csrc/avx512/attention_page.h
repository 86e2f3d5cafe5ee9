// What prefill and decode attention share: a page in bf16, small matrix products over it, exponentials.
#pragma once

#include <immintrin.h>

#include <algorithm>

#include "../common/attention_portable.h"
#include "linear.h"
#include "rows.h"

namespace dseek {
namespace DSEEK_VARIANT {

// Score of a key that a query may not see, and the least value that a running maximum takes. Both are finite, so that
// differences are never NaN, and they lie so far apart that a hidden key's weight is exactly 0 even in a row that has
// met no other, and even where a key's scale is multiplied in afterwards, which is never below kLeastScale.
constexpr float kMasked = -1e37f;
constexpr float kLeastMaximum = -1e20f;

// An int8 key with a smaller scale adds nothing to a score that fp32 could hold beside others, and one of zeros, or a
// slot that no token was written to, has the scale 0, which would make a hidden key's score 0.
constexpr float kLeastScale = 1e-14f;

// 32 int8 values, in order, as 32 bf16 values (exact).
inline __m512i widen_int8(const int8_t* source) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
    const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(bytes)));
    const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(bytes, 1)));
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
}

inline void widen_int8_page(const int8_t* source, size_t count, uint16_t* out) {
    for (size_t i = 0; i < count; i += 32) _mm512_storeu_si512(out + i, widen_int8(source + i));
}

// One page in bf16, with the factors that int8 leaves to be applied.
struct WidePage {
    static size_t room_bytes(int head_dim) { return static_cast<size_t>(head_dim) * kPageTokens * 4 + kPageTokens * 4; }

    const uint16_t* keys;
    const uint16_t* values;
    const float* key_scales;    // null for bf16
    const float* value_scales;  // null for bf16

    WidePage() = default;
    // `room` holds what is widened, of the size `room_bytes` says.
    WidePage(const CacheLayout& layout, const uint8_t* page, uint16_t* room) {
        keys = reinterpret_cast<const uint16_t*>(page);
        values = reinterpret_cast<const uint16_t*>(page + layout.value_offset);
        key_scales = value_scales = nullptr;
        if (layout.type != CacheType::int8) return;
        const size_t count = static_cast<size_t>(layout.head_dim) * kPageTokens;
        widen_int8_page(reinterpret_cast<const int8_t*>(page), 2 * count, room);
        keys = room;
        values = room + count;
        const auto* scales = reinterpret_cast<const float*>(page + layout.scale_offset);
        auto* not_zero = reinterpret_cast<float*>(room + 2 * count);
        for (int slot = 0; slot < kPageTokens; slot += 16) {
            const __m512 least = _mm512_set1_ps(kLeastScale);
            _mm512_storeu_ps(not_zero + slot, _mm512_max_ps(_mm512_loadu_ps(scales + slot), least));
        }
        key_scales = not_zero;
        value_scales = scales + kPageTokens;
    }
};

// Products of a strip with AVX-512: c[rows][16 * vectors] (+)= a[rows][2 * steps] x b[steps][16 * vectors][2].
struct Multiply512 {
    template <int kRows, int kVectors>
    static void tile(const uint16_t* a, size_t a_stride, const uint16_t* b, size_t b_stride, int steps, float* c,
                     size_t c_stride, bool accumulate) {
        __m512 acc[kRows][kVectors];
        for (int r = 0; r < kRows; ++r) {
            for (int v = 0; v < kVectors; ++v) {
                acc[r][v] = accumulate ? _mm512_loadu_ps(c + r * c_stride + v * 16) : _mm512_setzero_ps();
            }
        }
        for (int i = 0; i < steps; ++i) {
            __m512bh value[kVectors];
            for (int v = 0; v < kVectors; ++v) {
                value[v] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b + i * b_stride + v * 32));
            }
            for (int r = 0; r < kRows; ++r) {
                const auto inputs = reinterpret_cast<__m512bh>(broadcast4(a + r * a_stride + i * 2));
                for (int v = 0; v < kVectors; ++v) acc[r][v] = _mm512_dpbf16_ps(acc[r][v], inputs, value[v]);
            }
        }
        for (int r = 0; r < kRows; ++r) {
            for (int v = 0; v < kVectors; ++v) _mm512_storeu_ps(c + r * c_stride + v * 16, acc[r][v]);
        }
    }

    template <int kVectors>
    static void rows(const uint16_t* a, size_t a_stride, const uint16_t* b, size_t b_stride, int steps, float* c,
                     size_t c_stride, bool accumulate) {
        tile<6, kVectors>(a, a_stride, b, b_stride, steps, c, c_stride, accumulate);
        tile<6, kVectors>(a + 6 * a_stride, a_stride, b, b_stride, steps, c + 6 * c_stride, c_stride, accumulate);
        tile<4, kVectors>(a + 12 * a_stride, a_stride, b, b_stride, steps, c + 12 * c_stride, c_stride, accumulate);
    }
};

// c[16][columns] (+)= a[16][2 * steps] x b[steps][columns][2]; `columns` is a multiple of 16, strides count elements.
inline void multiply_strip(const uint16_t* a, size_t a_stride, const uint16_t* b, size_t b_stride, int steps, float* c,
                           size_t c_stride, int columns, bool accumulate) {
    int column = 0;
    for (; column + 64 <= columns; column += 64) {
        Multiply512::rows<4>(a, a_stride, b + column * 2, b_stride, steps, c + column, c_stride, accumulate);
    }
    for (; column < columns; column += 16) {
        Multiply512::rows<1>(a, a_stride, b + column * 2, b_stride, steps, c + column, c_stride, accumulate);
    }
}

}  // namespace DSEEK_VARIANT
}  // namespace dseek
