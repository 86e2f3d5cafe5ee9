// What packing met that a format cannot hold: counted, and the first of each kind by its place.
//
// Rows are looked at while they lie decoded in a private cache, one pass of integer comparisons; only a row that holds
// something odd, and groups of 32 that are rounded to halves, are looked at value by value.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "formats.h"
#include "numbers.h"

namespace dseek {

enum class Finding {
    not_finite,  // NaN or infinity in the source
    overflow,    // finite, but infinite once it is rounded to the format
    clipped,     // bounded to the format's integers, which moves it by more than half a step
    vanished,    // its group's scale is too small for a half, so that the whole group becomes one value
};
constexpr int kFindings = 4;

struct FirstFound {
    int64_t count = 0;
    int row = 0;  // of the joined weight
    int column = 0;
    float value = 0.f;

    void add(int at_row, int at_column, float what) {
        if (count == 0 || at_row < row || (at_row == row && at_column < column)) {
            row = at_row;
            column = at_column;
            value = what;
        }
        ++count;
    }
    void join(const FirstFound& other) {
        if (other.count == 0) return;
        const int64_t total = count + other.count;
        add(other.row, other.column, other.value);
        count = total;
    }
};

struct Findings {
    std::array<FirstFound, kFindings> by_kind;

    void add(Finding kind, int row, int column, float value) {
        by_kind[static_cast<size_t>(kind)].add(row, column, value);
    }
    void join(const Findings& other) {
        for (size_t kind = 0; kind < by_kind.size(); ++kind) by_kind[kind].join(other.by_kind[kind]);
    }
    bool any() const {
        return std::any_of(by_kind.begin(), by_kind.end(), [](const FirstFound& found) { return found.count > 0; });
    }
};

constexpr uint32_t kInfinityBits = 0x7f800000u;

inline bool is_finite_half(uint16_t half) { return (half & 0x7c00) != 0x7c00; }

// Magnitudes from here on are infinite in a format, or may become so on the way into it.
inline float overflow_limit(Format format) {
    switch (format) {
        case Format::f16: return 65520.f;
        case Format::bf16: return std::bit_cast<float>(0x7f7f8000u);
        // A rotation adds up to 128 values of a row before it is normalised.
        case Format::i8c: return 0x1p127f / 128.f;
        case Format::i8g: return 65520.f * 127.f;
        case Format::i4g: return 65520.f;
        case Format::f32:
        case Format::i8p: break;
    }
    return std::bit_cast<float>(kInfinityBits);
}

// Least and largest value of up to 32; padding counts as zero.
inline void range_of(const float* w, int count, float& least, float& largest) {
    typedef float Lanes __attribute__((vector_size(32)));
    constexpr int kLanes = 8;
    Lanes low{}, high{};
    if (count == kGroup) {
        std::memcpy(&low, w, sizeof low);
        high = low;
        for (int i = kLanes; i < kGroup; i += kLanes) {
            Lanes value;
            std::memcpy(&value, w + i, sizeof value);
            low = value < low ? value : low;
            high = value > high ? value : high;
        }
    } else {
        for (int i = 0; i < count; ++i) {
            low[i % kLanes] = std::min(low[i % kLanes], w[i]);
            high[i % kLanes] = std::max(high[i % kLanes], w[i]);
        }
    }
    least = low[0];
    largest = high[0];
    for (int lane = 1; lane < kLanes; ++lane) {
        least = std::min(least, low[lane]);
        largest = std::max(largest, high[lane]);
    }
}

// A group of i8g or i4g whose values are finite and within the limit.
inline void inspect_group(Format format, const float* w, int count, int row, int column, Findings& findings) {
    float bottom, top;
    range_of(w, count, bottom, top);
    const float magnitude = std::max(-bottom, top);
    // A half that is not subnormal holds the scale to 2^-11 of it: 127 times that clips nothing by half a step. Nor do
    // 15 times that and 2^-11 of the minimum, where the minimum is not many steps.
    constexpr float kLeastNormalHalf = 0x1p-14f;
    if (format == Format::i8g && magnitude >= 127.f * kLeastNormalHalf) return;
    const float step = (top - bottom) / 15.f;
    if (format == Format::i4g && step >= kLeastNormalHalf && magnitude <= 512.f * step && step < 65504.f) return;
    const auto find_top = [&] { return static_cast<int>(std::max_element(w, w + count) - w); };
    float scale, minimum = 0.f, low = -127.5f, high = 127.5f;
    if (format == Format::i8g) {
        scale = half_to_float(float_to_half(magnitude / 127.f));
    } else {
        const uint16_t half = float_to_half(step);
        if (!is_finite_half(half)) {
            const int at = find_top();
            findings.add(Finding::overflow, row, column + at, w[at]);
            return;
        }
        scale = half_to_float(half);
        minimum = half_to_float(float_to_half(bottom));
        low = -0.5f;
        high = 15.5f;
    }
    if (scale == 0.f) {
        const bool is_lost = format == Format::i8g ? (top != 0.f || bottom != 0.f) : top != bottom;
        if (is_lost) {
            const int at = find_top();
            findings.add(Finding::vanished, row, column + at, w[at]);
        }
        return;
    }
    // Comparing products spares a division; the steps at the ends only.
    if ((bottom - minimum) >= low * scale && (top - minimum) <= high * scale) return;
    for (int i = 0; i < count; ++i) {
        const float steps = (w[i] - minimum) / scale;
        if (steps < low || steps > high) findings.add(Finding::clipped, row, column + i, w[i]);
    }
}

// One decoded row of k values.
inline void inspect_row(Format format, const float* w, int k, int row, Findings& findings) {
    int32_t largest = 0;  // signed, which is what plain vector instructions compare
    for (int i = 0; i < k; ++i) {
        const auto magnitude = static_cast<int32_t>(std::bit_cast<uint32_t>(w[i]) & 0x7fffffffu);
        largest = largest > magnitude ? largest : magnitude;
    }
    const float limit = overflow_limit(format);
    if (static_cast<uint32_t>(largest) >= std::bit_cast<uint32_t>(limit)) {
        for (int i = 0; i < k; ++i) {
            const uint32_t magnitude = std::bit_cast<uint32_t>(w[i]) & 0x7fffffffu;
            if (magnitude >= kInfinityBits) findings.add(Finding::not_finite, row, i, w[i]);
            else if (magnitude >= std::bit_cast<uint32_t>(limit)) findings.add(Finding::overflow, row, i, w[i]);
        }
        return;
    }
    if (format != Format::i8g && format != Format::i4g) return;
    for (int i = 0; i < k; i += kGroup) inspect_group(format, w + i, std::min(kGroup, k - i), row, i, findings);
}

}  // namespace dseek
