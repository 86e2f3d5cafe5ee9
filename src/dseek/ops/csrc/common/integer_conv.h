// What convolution over integers needs of an instruction set besides the linear kernel: rounding to a given step, and
// depthwise products. In portable vectors; every variant compiles its own.
#pragma once

#include <algorithm>

#include "kernels.h"
#include "vec.h"

namespace dseek {
namespace DSEEK_VARIANT {

typedef uint8_t u8x16 __attribute__((vector_size(16)));
typedef int8_t i8x16 __attribute__((vector_size(16)));

inline float largest_of_run(const float* x, size_t count) {
    f32x16 largest{};
    size_t i = 0;
    for (; i + 16 <= count; i += 16) {
        const f32x16 value = load(x + i);
        largest = max(largest, max(value, -value));
    }
    float result = 0.f;
    for (int lane = 0; lane < 16; ++lane) result = std::max(result, largest[lane]);
    for (; i < count; ++i) result = std::max(result, std::fabs(x[i]));
    return result;
}

// Divides, as PyTorch does: a product with the inverse lands on the other side of a half now and then.
inline void round_run(const float* x, size_t count, const RoundingRange& range, uint8_t* out) {
    const f32x16 step = splat(range.step), low = splat(static_cast<float>(range.low));
    const f32x16 high = splat(static_cast<float>(range.high));
    const f32x16 magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an even integer in the low mantissa bits
    const int32_t offset = 128 - range.zero;
    const auto rounded = [&](f32x16 value) {
        f32x16 scaled = max(value / step, low);
        scaled = scaled < high ? scaled : high;
        return __builtin_convertvector((scaled + magic) - magic, i32x16) + offset;
    };
    size_t i = 0;
    for (; i + 16 <= count; i += 16) {
        const u8x16 bytes = __builtin_convertvector(rounded(load(x + i)), u8x16);
        std::memcpy(out + i, &bytes, sizeof bytes);
    }
    if (i < count) {
        float rest[16] = {};
        std::copy(x + i, x + count, rest);
        const u8x16 bytes = __builtin_convertvector(rounded(load(rest)), u8x16);
        std::memcpy(out + i, &bytes, count - i);
    }
}

// Sixteen channels of kPixels neighbouring outputs.
template <int kPixels>
inline void depthwise_block(const DepthwiseCall& call, int pixel, int channel) {
    i32x16 acc[kPixels];
    i32x16 start;
    std::memcpy(&start, call.start + channel, sizeof start);
    for (int p = 0; p < kPixels; ++p) acc[p] = start;
    const uint8_t* image = call.image + static_cast<size_t>(pixel) * call.pixel_stride + channel;
    for (int tap = 0; tap < call.taps; ++tap) {
        i8x16 packed;
        std::memcpy(&packed, call.weight + static_cast<size_t>(tap) * call.channels_padded + channel, sizeof packed);
        const i32x16 weight = __builtin_convertvector(packed, i32x16);
        for (int p = 0; p < kPixels; ++p) {
            u8x16 inputs;
            std::memcpy(&inputs, image + p * call.pixel_stride + call.offsets[tap], sizeof inputs);
            acc[p] += __builtin_convertvector(inputs, i32x16) * weight;
        }
    }
    const f32x16 scale = load(call.scale + channel) * call.step, bias = load(call.bias + channel);
    const int count = std::min(16, call.channels - channel);
    for (int p = 0; p < kPixels; ++p) {
        const f32x16 value = __builtin_convertvector(acc[p], f32x16) * scale + bias;
        float* out = call.out + static_cast<size_t>(pixel + p) * call.channels + channel;
        if (count == 16) store(out, value);
        else std::memcpy(out, &value, static_cast<size_t>(count) * sizeof(float));
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
