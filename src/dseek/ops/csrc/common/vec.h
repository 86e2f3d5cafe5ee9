// What kernels do with sixteen lanes at once beyond plain arithmetic: conversions, and 2^x.
//
// The variant that includes this decides by its compile flags how many machine registers a value takes (lanes.h), so
// one source serves every instruction set. Kernels whose speed depends on special instructions do not use it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "lanes.h"
#include "numbers.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace dseek {
namespace DSEEK_VARIANT {

inline f32x16 load_half(const uint16_t* source) {
#if defined(__AVX512F__)
    return reinterpret_cast<f32x16>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source))));
#elif defined(__AVX2__) && defined(__F16C__)
    return {
        reinterpret_cast<f32x16::Part>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)))),
        reinterpret_cast<f32x16::Part>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source + 8))))};
#else
    float lanes[16];
    for (int lane = 0; lane < 16; ++lane) lanes[lane] = half_to_float(source[lane]);
    return load(lanes);
#endif
}

// Two neighbouring inputs of sixteen channels, as bf16 pairs: `low` the first input, `high` the second.
inline void load_bf16_pairs(const uint16_t* source, f32x16& low, f32x16& high) {
    const u32x16 pairs = load_as<u32x16>(source);
    low = as_float(pairs << 16);
    high = as_float(pairs & 0xffff0000u);
}

// Sixteen 16-bit integers, at any address.
inline i32x16 load_int16(const void* source) {
#if defined(__AVX512F__)
    return reinterpret_cast<i32x16>(_mm512_cvtepi16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(source))));
#elif defined(__AVX2__)
    const auto* halves = static_cast<const __m128i*>(source);
    return {reinterpret_cast<i32x16::Part>(_mm256_cvtepi16_epi32(_mm_loadu_si128(halves))),
            reinterpret_cast<i32x16::Part>(_mm256_cvtepi16_epi32(_mm_loadu_si128(halves + 1)))};
#else
    int16_t values[16];
    std::memcpy(values, source, sizeof values);
    int32_t wide[16];
    for (int lane = 0; lane < 16; ++lane) wide[lane] = values[lane];
    return load(wide);
#endif
}

// Rounds to bf16, nearest or even: the upper halves of the lanes. A NaN becomes the positive quiet one.
inline u32x16 bf16_bits(f32x16 value) {
    const u32x16 bits = as_bits(value);
    const f32x16 rounded = as_float(bits + (((bits >> 16) & 1u) + 0x7fffu));
    return as_bits(select(value == value, rounded, as_float(u32x16{} + 0x7fc00000u)));
}

// 2^x for x <= 126, by a degree-6 polynomial on [-1/2, 1/2] (relative error below 2e-7; coefficients are the Taylor
// series of 2^x, ln(2)^i / i!). Anything below -126 gives 0.
inline f32x16 exp2(f32x16 x) {
    const f32x16 magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits
    const f32x16 clamped = max(x, splat(-127.f));
    const f32x16 shifted = clamped + magic;
    const f32x16 fraction = clamped - (shifted - magic);
    f32x16 result = splat(1.540353e-4f);
    result = result * fraction + 1.333355e-3f;
    result = result * fraction + 9.618129e-3f;
    result = result * fraction + 5.550411e-2f;
    result = result * fraction + 2.402265e-1f;
    result = result * fraction + 6.931472e-1f;
    result = result * fraction + 1.f;
    // Unsigned, because with numbers that are not finite the sums wrap around.
    const u32x16 exponent = (as_bits(shifted) - 0x4b400000u) << 23;
    const f32x16 scaled = as_float(as_bits(result) + exponent);
    return select(x < -126.f, f32x16{}, scaled);
}

inline f32x16 silu(f32x16 x) {
    const f32x16 exponent = x * -kLog2E;
    const f32x16 bounded = select(exponent > 126.f, splat(126.f), exponent);
    return x / (exp2(bounded) + 1.f);
}

}  // namespace DSEEK_VARIANT
}  // namespace dseek
