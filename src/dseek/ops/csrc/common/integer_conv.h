// What convolution over integers needs of an instruction set besides the linear kernel: rounding to a given step, and
// depthwise products. In portable vectors; every variant compiles its own.
#pragma once

#include <algorithm>
#include <type_traits>

#include "kernels.h"
#include "vec.h"

namespace dseek {
namespace DSEEK_VARIANT {

// Sixteen bytes at any address, as 32-bit integers.
template <class Byte>
inline i32x16 load_bytes(const Byte* source) {
    [[maybe_unused]] constexpr bool kSigned = std::is_signed_v<Byte>;
#if defined(__AVX512F__)
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
    return reinterpret_cast<i32x16>(kSigned ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes));
#elif defined(__AVX2__)
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
    const __m128i upper = _mm_srli_si128(bytes, 8);
    return {reinterpret_cast<i32x16::Part>(kSigned ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes)),
            reinterpret_cast<i32x16::Part>(kSigned ? _mm256_cvtepi8_epi32(upper) : _mm256_cvtepu8_epi32(upper))};
#else
    int32_t wide[16];
    for (int lane = 0; lane < 16; ++lane) wide[lane] = source[lane];
    return load(wide);
#endif
}

inline float largest_of_run(const float* x, size_t count) {
    f32x16 largest{};
    size_t i = 0;
    for (; i + 16 <= count; i += 16) {
        const f32x16 value = load(x + i);
        largest = max(largest, max(value, -value));
    }
    float result = largest_lane(largest);
    for (; i < count; ++i) result = std::max(result, std::fabs(x[i]));
    return result;
}

// Divides, as PyTorch does: a product with the inverse lands on the other side of a half now and then.
inline void round_run(const float* x, size_t count, const RoundingRange& range, uint8_t* out) {
    const f32x16 step = splat(range.step), low = splat(static_cast<float>(range.low));
    const f32x16 high = splat(static_cast<float>(range.high));
    const f32x16 magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an even integer in the low mantissa bits
    const int32_t offset = 128 - range.zero;
    int32_t rounded[16];
    const auto round_sixteen = [&](const float* source) {
        const f32x16 scaled = min(max(load(source) / step, low), high);
        store(rounded, to_int((scaled + magic) - magic) + offset);
    };
    size_t i = 0;
    for (; i + 16 <= count; i += 16) {
        round_sixteen(x + i);
        for (int lane = 0; lane < 16; ++lane) out[i + lane] = static_cast<uint8_t>(rounded[lane]);
    }
    if (i < count) {
        float rest[16] = {};
        std::copy(x + i, x + count, rest);
        round_sixteen(rest);
        for (size_t lane = 0; lane < count - i; ++lane) out[i + lane] = static_cast<uint8_t>(rounded[lane]);
    }
}

// Sixteen channels of kPixels neighbouring outputs.
template <int kPixels>
inline void depthwise_block(const DepthwiseCall& call, int pixel, int channel) {
    i32x16 acc[kPixels];
    for (int p = 0; p < kPixels; ++p) acc[p] = load(call.start + channel);
    const uint8_t* image = call.image + static_cast<size_t>(pixel) * call.pixel_stride + channel;
    for (int tap = 0; tap < call.taps; ++tap) {
        const i32x16 weight = load_bytes(call.weight + static_cast<size_t>(tap) * call.channels_padded + channel);
        for (int p = 0; p < kPixels; ++p) {
            acc[p] += load_bytes(image + static_cast<size_t>(p) * call.pixel_stride + call.offsets[tap]) * weight;
        }
    }
    const f32x16 scale = load(call.scale + channel) * call.step, bias = load(call.bias + channel);
    const int count = std::min(16, call.channels - channel);
    for (int p = 0; p < kPixels; ++p) {
        const f32x16 value = to_float(acc[p]) * scale + bias;
        float* out = call.out + static_cast<size_t>(pixel + p) * call.channels + channel;
        if (count == 16) {
            store(out, value);
            continue;
        }
        float lanes[16];
        store(lanes, value);
        std::copy(lanes, lanes + count, out);
    }
}

inline void depthwise(const DepthwiseCall& call) {
    constexpr int kPixels = 4;
    for (int channel = 0; channel < call.channels; channel += 16) {
        int pixel = 0;
        for (; pixel + kPixels <= call.pixels; pixel += kPixels) depthwise_block<kPixels>(call, pixel, channel);
        for (; pixel < call.pixels; ++pixel) depthwise_block<1>(call, pixel, channel);
    }
}

}  // namespace DSEEK_VARIANT
}  // namespace dseek
