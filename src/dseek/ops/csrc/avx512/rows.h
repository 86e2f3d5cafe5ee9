// Preparation of activations with AVX-512: rounding to bf16 and int8 sixteen values at a time.
#pragma once

#include <immintrin.h>

#include "../common/rows.h"

namespace dseek {
namespace DSEEK_VARIANT {

inline void round_to_bf16(const float* x, int size, uint16_t* out) {
    int i = 0;
    for (; i + 16 <= size; i += 16) {
        const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_loadu_ps(x + i));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), reinterpret_cast<__m256i>(rounded));
    }
    for (; i < size; ++i) out[i] = float_to_bf16(x[i]);
}

inline float largest_of(const float* x, int size) {
    __m512 largest = _mm512_setzero_ps();
    for (int i = 0; i < size; i += 16) largest = _mm512_max_ps(largest, _mm512_abs_ps(_mm512_loadu_ps(x + i)));
    return _mm512_reduce_max_ps(largest);
}

template <bool kRotate>
void quantize_token_avx512(const float* x, int k, int k_padded, const Rows& rows, int row_idx) {
    const int size = round_up(k, 16);
    const float* source = x;
    if (kRotate || k != size) {
        float* row = row_scratch(size);
        if (k != size) {
            std::memcpy(row, x, static_cast<size_t>(k) * 4);
            std::fill(row + k, row + size, 0.f);
        }
        if constexpr (kRotate) rotate(k == size ? x : row, row, size);
        source = row;
    }
    const float largest = largest_of(source, size);
    const __m512 inverse = _mm512_set1_ps(largest > 0.f ? 127.f / largest : 0.f);
    rows.scale[row_idx] = largest / 127.f;
    uint8_t* out = rows.row<uint8_t>(row_idx);
    const __m128i offset = _mm_set1_epi8(static_cast<char>(0x80));
    for (int i = 0; i < size; i += 16) {
        const __m512i value = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(source + i), inverse));
        const __m128i bytes = _mm_xor_si128(_mm512_cvtepi32_epi8(value), offset);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), bytes);
    }
    std::memset(out + size, 128, static_cast<size_t>(k_padded - size));
}

inline void quantize_groups_avx512(const float* x, int k, int k_padded, const Rows& rows, int row_idx) {
    const float* source = x;
    if (k != k_padded) {
        float* padded = row_scratch(k_padded);
        std::memcpy(padded, x, static_cast<size_t>(k) * 4);
        std::fill(padded + k, padded + k_padded, 0.f);
        source = padded;
    }
    int8_t* out = rows.row<int8_t>(row_idx);
    float* scale = rows.group_scale + static_cast<size_t>(row_idx) * rows.groups;
    float* total = rows.group_sum + static_cast<size_t>(row_idx) * rows.groups;
    for (int group = 0; group < rows.groups; ++group) {
        const __m512 a = _mm512_loadu_ps(source + group * kGroup), b = _mm512_loadu_ps(source + group * kGroup + 16);
        const float largest = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(a), _mm512_abs_ps(b)));
        const __m512 inverse = _mm512_set1_ps(largest > 0.f ? 127.f / largest : 0.f);
        const __m128i qa = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(a, inverse)));
        const __m128i qb = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(b, inverse)));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + group * kGroup), qa);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + group * kGroup + 16), qb);
        // The sum of the bytes as they are stored: of infinite inputs the wider numbers would overflow.
        const __m512i sums = _mm512_add_epi32(_mm512_cvtepi8_epi32(qa), _mm512_cvtepi8_epi32(qb));
        scale[group] = largest / 127.f;
        total[group] = scale[group] * static_cast<float>(_mm512_reduce_add_epi32(sums));
    }
}

inline void prepare_row_avx512(const float* x, int k, int k_padded, const Rows& rows, int row_idx) {
    switch (rows.kind) {
        case RowKind::f32: std::memcpy(rows.row<float>(row_idx), x, static_cast<size_t>(k) * 4); return;
        case RowKind::bf16: {
            uint16_t* out = rows.row<uint16_t>(row_idx);
            round_to_bf16(x, k, out);
            std::memset(out + k, 0, static_cast<size_t>(k_padded - k) * 2);
            return;
        }
        case RowKind::token_u8: quantize_token_avx512<true>(x, k, k_padded, rows, row_idx); return;
        case RowKind::plain_u8: quantize_token_avx512<false>(x, k, k_padded, rows, row_idx); return;
        case RowKind::group_s8: quantize_groups_avx512(x, k, k_padded, rows, row_idx); return;
    }
}

}  // namespace DSEEK_VARIANT
}  // namespace dseek
