// Row-wise kernels in portable vectors: norm, rotary embedding and the preparation of activations.
#pragma once

#include <algorithm>

#include "kernels.h"
#include "rotation.h"
#include "scratch.h"
#include "vec.h"

namespace dseek {
namespace DSEEK_VARIANT {

// out = x / sqrt(mean(x^2) + epsilon) * weight (Zhang and Sennrich 2019, RMSNorm, equation 4). out may be x.
inline void rms_norm(const float* x, const float* weight, float epsilon, int size, float* out) {
    f32x16 squares[4] = {};
    int i = 0;
    for (; i + 64 <= size; i += 64) {
        for (int part = 0; part < 4; ++part) {
            const f32x16 value = load(x + i + part * 16);
            squares[part] += value * value;
        }
    }
    for (; i + 16 <= size; i += 16) {
        const f32x16 value = load(x + i);
        squares[0] += value * value;
    }
    float total = sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
    for (; i < size; ++i) total += x[i] * x[i];
    const float factor = 1.f / std::sqrt(total / static_cast<float>(size) + epsilon);
    for (i = 0; i + 16 <= size; i += 16) store(out + i, load(x + i) * factor * load(weight + i));
    for (; i < size; ++i) out[i] = x[i] * factor * weight[i];
}

// Rotates one head in place: pairs (i, i + d/2) turn by the position's angles (half-split order, as in Hugging Face).
inline void rotary(float* x, const float* cos, const float* sin, int head_dim) {
    const int half = head_dim / 2;
    int i = 0;
    for (; i + 16 <= half; i += 16) {
        const f32x16 first = load(x + i), second = load(x + half + i), c = load(cos + i), s = load(sin + i);
        store(x + i, first * c - second * s);
        store(x + half + i, second * c + first * s);
    }
    for (; i < half; ++i) {
        const float first = x[i], second = x[half + i];
        x[i] = first * cos[i] - second * sin[i];
        x[half + i] = second * cos[i] + first * sin[i];
    }
}

// A thread's room for one row, padded for whole registers.
inline float* row_scratch(int size) {
    thread_local Scratch room;
    return reinterpret_cast<float*>(room.get(static_cast<size_t>(round_up(size, 64)) * 4));
}

inline float largest_magnitude(const float* x, int size) {
    f32x16 largest{};
    for (int i = 0; i < size; i += 16) {
        const f32x16 value = load(x + i);
        largest = max(largest, max(value, -value));
    }
    return largest_lane(largest);
}

template <bool kRotate>
void quantize_token(const float* x, int k, int k_padded, const Rows& rows, int row_idx) {
    const int size = round_up(k, 16);
    float* row = row_scratch(size);
    std::memcpy(row, x, static_cast<size_t>(k) * 4);
    std::fill(row + k, row + size, 0.f);
    if constexpr (kRotate) rotate(row, size);
    const float largest = largest_magnitude(row, size);
    const float inverse = largest > 0.f ? 127.f / largest : 0.f;
    rows.scale[row_idx] = largest / 127.f;
    uint8_t* out = rows.row<uint8_t>(row_idx);
    for (int i = 0; i < size; i += 16) {
        int32_t value[16];
        store(value, to_int(load(row + i) * inverse + splat(128.5f)));
        for (int lane = 0; lane < 16; ++lane) out[i + lane] = static_cast<uint8_t>(value[lane]);
    }
    std::memset(out + size, 128, static_cast<size_t>(k_padded - size));
}

inline void quantize_groups(const float* x, int k, int k_padded, const Rows& rows, int row_idx) {
    float* padded = row_scratch(k_padded);
    std::memcpy(padded, x, static_cast<size_t>(k) * 4);
    std::fill(padded + k, padded + k_padded, 0.f);
    int8_t* out = rows.row<int8_t>(row_idx);
    float* scale = rows.group_scale + static_cast<size_t>(row_idx) * rows.groups;
    float* total = rows.group_sum + static_cast<size_t>(row_idx) * rows.groups;
    for (int group = 0; group < rows.groups; ++group) {
        const float* values = padded + group * kGroup;
        const float largest = largest_magnitude(values, kGroup);
        const float inverse = largest > 0.f ? 127.f / largest : 0.f;
        int quantised_sum = 0;
        for (int i = 0; i < kGroup; ++i) {
            const int quantised = static_cast<int>(std::lrintf(values[i] * inverse));
            out[group * kGroup + i] = static_cast<int8_t>(quantised);
            quantised_sum += quantised;
        }
        scale[group] = largest / 127.f;
        total[group] = scale[group] * static_cast<float>(quantised_sum);
    }
}

inline void prepare_row(const float* x, int k, int k_padded, const Rows& rows, int row_idx) {
    switch (rows.kind) {
        case RowKind::f32: std::memcpy(rows.row<float>(row_idx), x, static_cast<size_t>(k) * 4); return;
        case RowKind::bf16: {
            uint16_t* out = rows.row<uint16_t>(row_idx);
            for (int i = 0; i < k; ++i) out[i] = float_to_bf16(x[i]);
            std::memset(out + k, 0, static_cast<size_t>(k_padded - k) * 2);
            return;
        }
        case RowKind::token_u8: quantize_token<true>(x, k, k_padded, rows, row_idx); return;
        case RowKind::plain_u8: quantize_token<false>(x, k, k_padded, rows, row_idx); return;
        case RowKind::group_s8: quantize_groups(x, k, k_padded, rows, row_idx); return;
    }
}

// Keeps the compiler from dropping the loads whose speed is being measured.
inline double read_bytes(const uint8_t* data, size_t num_bytes) {
    u32x16 totals[8] = {};
    for (size_t i = 0; i + 512 <= num_bytes; i += 512) {
        for (int part = 0; part < 8; ++part) { totals[part] ^= load_as<u32x16>(data + i + part * 64); }
    }
    for (int part = 1; part < 8; ++part) totals[0] ^= totals[part];
    uint32_t total = 0;
    for (int lane = 0; lane < 16; ++lane) total ^= totals[0][lane];
    return static_cast<double>(total);
}

}  // namespace DSEEK_VARIANT
}  // namespace dseek
