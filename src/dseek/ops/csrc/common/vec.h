// Sixteen lanes as one value, in the compiler's portable vector extension.
//
// The variant that includes this decides by its compile flags how many machine registers a value takes, so one source
// serves every instruction set. Kernels whose speed depends on special instructions do not use it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "numbers.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace dseek {
namespace DSEEK_VARIANT {

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));

inline f32x16 load(const float* source) {
    f32x16 value;
    std::memcpy(&value, source, sizeof value);
    return value;
}

inline void store(float* target, f32x16 value) { std::memcpy(target, &value, sizeof value); }

inline f32x16 splat(float value) { return f32x16{} + value; }

inline f32x16 load_half(const uint16_t* source) {
#if defined(__AVX512F__)
    return reinterpret_cast<f32x16>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source))));
#elif defined(__F16C__)
    float lanes[16];
    _mm256_storeu_ps(lanes, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source))));
    _mm256_storeu_ps(lanes + 8, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source + 8))));
    return load(lanes);
#else
    f32x16 value;
    for (int lane = 0; lane < 16; ++lane) value[lane] = half_to_float(source[lane]);
    return value;
#endif
}

// Two neighbouring inputs of sixteen channels, as bf16 pairs: `low` the first input, `high` the second.
inline void load_bf16_pairs(const uint16_t* source, f32x16& low, f32x16& high) {
    u32x16 pairs;
    std::memcpy(&pairs, source, sizeof pairs);
    low = reinterpret_cast<f32x16>(pairs << 16);
    high = reinterpret_cast<f32x16>(pairs & 0xffff0000u);
}

inline float sum(f32x16 value) {
    float total = 0.f;
    for (int lane = 0; lane < 16; ++lane) total += value[lane];
    return total;
}

inline f32x16 max(f32x16 a, f32x16 b) { return a > b ? a : b; }

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
    const u32x16 exponent = (reinterpret_cast<u32x16>(shifted) - 0x4b400000u) << 23;
    const f32x16 scaled = reinterpret_cast<f32x16>(reinterpret_cast<u32x16>(result) + exponent);
    return x < -126.f ? f32x16{} : scaled;
}

inline f32x16 silu(f32x16 x) {
    const f32x16 exponent = x * -kLog2E;
    const f32x16 bounded = exponent > 126.f ? splat(126.f) : exponent;
    return x / (exp2(bounded) + 1.f);
}

}  // namespace DSEEK_VARIANT
}  // namespace dseek
