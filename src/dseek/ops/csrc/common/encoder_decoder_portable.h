// Row-wise kernels of the encoder-decoder in portable vectors, for every variant.
#pragma once

#include <algorithm>
#include <cmath>

#include "encoder_decoder_kernels.h"
#include "vec.h"

namespace dseek {
namespace DSEEK_VARIANT {

// Source: Ba et al. 2016, Layer Normalization, equation 3.
inline void add_norm(float* x, const float* added, const float* weight, const float* bias, float epsilon, int size) {
    f32x16 total{};
    for (int i = 0; i < size; i += 16) {
        const f32x16 value = load(x + i) + load(added + i);
        store(x + i, value);
        total += value;
    }
    const float mean = sum(total) / static_cast<float>(size);
    f32x16 squares{};
    for (int i = 0; i < size; i += 16) {
        const f32x16 distance = load(x + i) - mean;
        squares += distance * distance;
    }
    const float factor = 1.f / std::sqrt(sum(squares) / static_cast<float>(size) + epsilon);
    for (int i = 0; i < size; i += 16) {
        store(x + i, (load(x + i) - mean) * factor * load(weight + i) + load(bias + i));
    }
}

inline void activate(Activation activation, float* x, int size) {
    switch (activation) {
        case Activation::relu:
            for (int i = 0; i < size; i += 16) store(x + i, max(load(x + i), f32x16{}));
            return;
        case Activation::silu:
            for (int i = 0; i < size; i += 16) store(x + i, silu(load(x + i)));
            return;
        case Activation::gelu:
            // Source: Hendrycks and Gimpel 2016, Gaussian Error Linear Units, section 2, by the error function itself.
            for (int i = 0; i < size; ++i) x[i] = 0.5f * x[i] * (1.f + std::erf(x[i] * 0.70710678f));
            return;
    }
}

constexpr float kLaneNumbers[kKeyBlock] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// Source: Vaswani et al. 2017, Attention Is All You Need, equation 1.
inline void attend(const float* query, const float* keys, const float* values, int count, int head_dim, float scale,
                   float* scores, float* out) {
    const int num_blocks = (count + kKeyBlock - 1) / kKeyBlock;
    f32x16 largest = splat(-1e30f);
    for (int block = 0; block < num_blocks; ++block) {
        const float* key = keys + static_cast<size_t>(block) * head_dim * kKeyBlock;
        f32x16 parts[4] = {};  // several sums at once, so that none waits for itself
        for (int i = 0; i < head_dim; i += 4) {
            for (int part = 0; part < 4; ++part) parts[part] += load(key + (i + part) * kKeyBlock) * query[i + part];
        }
        f32x16 score = ((parts[0] + parts[1]) + (parts[2] + parts[3])) * (scale * kLog2E);
        if (count - block * kKeyBlock < kKeyBlock) {
            const f32x16 place = load(kLaneNumbers);
            score = select(place < static_cast<float>(count - block * kKeyBlock), score, splat(-1e30f));
        }
        largest = max(largest, score);
        store(scores + block * kKeyBlock, score);
    }
    const float most = largest_lane(largest);
    f32x16 totals{};
    for (int block = 0; block < num_blocks; ++block) {
        const f32x16 weight = exp2(load(scores + block * kKeyBlock) - most);
        totals += weight;
        store(scores + block * kKeyBlock, weight);
    }
    const float inverse = 1.f / sum(totals);
    for (int column = 0; column < head_dim; column += 16) {
        f32x16 even{}, odd{};
        int key = 0;
        for (; key + 2 <= count; key += 2) {
            even += load(values + static_cast<size_t>(key) * head_dim + column) * scores[key];
            odd += load(values + static_cast<size_t>(key + 1) * head_dim + column) * scores[key + 1];
        }
        if (key < count) even += load(values + static_cast<size_t>(key) * head_dim + column) * scores[key];
        store(out + column, (even + odd) * inverse);
    }
}

inline void store_key_value(const float* key, const float* value, int position, int head_dim, float* keys,
                            float* values) {
    float* lane = keys + static_cast<size_t>(position / kKeyBlock) * head_dim * kKeyBlock + position % kKeyBlock;
    for (int i = 0; i < head_dim; ++i) lane[i * kKeyBlock] = key[i];
    std::memcpy(values + static_cast<size_t>(position) * head_dim, value, static_cast<size_t>(head_dim) * 4);
}

inline void largest(const float* values, int count, int first, float* best, int32_t* index) {
    f32x16 most = splat(*best);
    int i = 0;
    for (; i + 16 <= count; i += 16) most = max(most, load(values + i));
    float found = largest_lane(most);
    for (; i < count; ++i) found = values[i] > found ? values[i] : found;
    if (!(found > *best)) return;
    for (i = 0; i < count; ++i) {
        if (values[i] == found) {
            *best = found;
            *index = first + i;
            return;
        }
    }
}

}  // namespace DSEEK_VARIANT
}  // namespace dseek
