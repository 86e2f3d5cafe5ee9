// What convolution over integers needs of an instruction set besides the linear kernel: rounding to a given step, and
// depthwise products. In portable vectors; every variant compiles its own.
#pragma once

#include <algorithm>

#include "kernels.h"
#include "vec.h"

namespace dseek {
namespace DSEEK_VARIANT {

// Sixteen bytes, widened.
template <class T>
inline i32x16 load_bytes(const T* source) {
    int32_t values[16];
    for (int lane = 0; lane < 16; ++lane) values[lane] = source[lane];
    return load(values);
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
    const auto rounded = [&](f32x16 value, uint8_t* bytes) {
        const f32x16 scaled = min(max(value / step, low), high);
        int32_t values[16];
        store(values, to_int((scaled + magic) - magic) + offset);
        for (int lane = 0; lane < 16; ++lane) bytes[lane] = static_cast<uint8_t>(values[lane]);
    };
    size_t i = 0;
    for (; i + 16 <= count; i += 16) { rounded(load(x + i), out + i); }
    if (i < count) {
        float rest[16] = {};
        uint8_t bytes[16];
        std::copy(x + i, x + count, rest);
        rounded(load(rest), bytes);
        std::memcpy(out + i, bytes, count - i);
    }
}

// Sixteen channels of kPixels neighbouring outputs.
template <int kPixels>
inline void depthwise_block(const DepthwiseCall& call, int pixel, int channel) {
    i32x16 acc[kPixels];
    const i32x16 start = load(call.start + channel);
    for (int p = 0; p < kPixels; ++p) acc[p] = start;
    const uint8_t* image = call.image + static_cast<size_t>(pixel) * call.pixel_stride + channel;
    for (int tap = 0; tap < call.taps; ++tap) {
        const i32x16 weight = load_bytes(call.weight + static_cast<size_t>(tap) * call.channels_padded + channel);
        for (int p = 0; p < kPixels; ++p) {
            acc[p] += load_bytes(image + p * call.pixel_stride + call.offsets[tap]) * weight;
        }
    }
    const f32x16 scale = load(call.scale + channel) * call.step, bias = load(call.bias + channel);
    const int count = std::min(16, call.channels - channel);
    for (int p = 0; p < kPixels; ++p) {
        const f32x16 value = to_float(acc[p]) * scale + bias;
        float* out = call.out + static_cast<size_t>(pixel + p) * call.channels + channel;
        if (count == 16) store(out, value);
        else {
            float rest[16];
            store(rest, value);
            std::copy(rest, rest + count, out);
        }
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
