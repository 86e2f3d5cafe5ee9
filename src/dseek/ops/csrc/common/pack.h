// Packing of one panel (sixteen output channels) into a blob, and the way back for one channel.
#pragma once

#include <algorithm>

#include "rotation.h"
#include "rows.h"

namespace dseek {
namespace DSEEK_VARIANT {

struct BlobPanel {
    uint8_t* data;
    uint8_t* scale;
    uint8_t* extra;

    BlobPanel(uint8_t* blob, int panel) {
        BlobHeader header;
        std::memcpy(&header, blob, sizeof header);
        const auto format = static_cast<Format>(header.format);
        const int k_padded = static_cast<int>(header.k_padded);
        data = blob + sizeof(BlobHeader) + static_cast<size_t>(panel) * panel_bytes(format, k_padded);
        const size_t step = per_channel(format) ? kPanel * 4 : static_cast<size_t>(k_padded / kGroup) * kPanel * 2;
        scale = blob + header.scale_offset + panel * step;
        extra = blob + header.extra_offset + panel * step;
    }
};

// int8 with one scale a channel; `rows` is [16][k_padded] and for i8c is rotated in place.
inline void pack_channels(Format format, float* rows, int k, int k_padded, const BlobPanel& out) {
    auto* scales = reinterpret_cast<float*>(out.scale);
    auto* sums = reinterpret_cast<int32_t*>(out.extra);
    const int size = round_up(k, 16);
    for (int lane = 0; lane < kPanel; ++lane) {
        float* row = rows + static_cast<size_t>(lane) * k_padded;
        if (format == Format::i8c) rotate(row, size);
        const float largest = largest_magnitude(row, size);
        const float inverse = largest > 0.f ? 127.f / largest : 0.f;
        scales[lane] = largest / 127.f;
        int32_t total = 0;
        auto* target = reinterpret_cast<int8_t*>(out.data) + lane * 4;
        for (int i = 0; i < k_padded; i += 16) {
            const f32x16 scaled = load(row + i) * inverse;
            int32_t value[16];
            store(value, to_int(scaled + select(scaled < 0.f, splat(-0.5f), splat(0.5f))));
            for (int j = 0; j < 16; ++j) {
                const auto quantised = static_cast<int8_t>(value[j]);  // of a weight that is infinite, any value
                target[(i + j) / 4 * 64 + (i + j) % 4] = quantised;
                total += quantised;
            }
        }
        sums[lane] = total * 128;
    }
}

// 4 or 8 bits in groups of 32, round to nearest: 8 bits symmetric, 4 bits between the group's least and largest value.
inline void pack_groups(Format format, const float* rows, int k_padded, const BlobPanel& out) {
    auto* scales = reinterpret_cast<uint16_t*>(out.scale);
    auto* minima = reinterpret_cast<uint16_t*>(out.extra);
    for (int group = 0; group < k_padded / kGroup; ++group) {
        uint8_t values[kPanel][kGroup];
        for (int lane = 0; lane < kPanel; ++lane) {
            const float* w = rows + static_cast<size_t>(lane) * k_padded + group * kGroup;
            const auto [least, largest] = std::minmax_element(w, w + kGroup);
            if (format == Format::i8g) {
                const float magnitude = std::max(std::fabs(*least), std::fabs(*largest));
                const uint16_t half = float_to_half(magnitude / 127.f);
                const float scale = half_to_float(half), inverse = scale > 0.f ? 1.f / scale : 0.f;
                scales[group * kPanel + lane] = half;
                for (int i = 0; i < kGroup; ++i) {
                    const float bounded = std::clamp(w[i] * inverse, -127.f, 127.f);
                    values[lane][i] = static_cast<uint8_t>(std::lrintf(bounded) + 128);
                }
            } else {
                const uint16_t scale_half = float_to_half((*largest - *least) / 15.f), min_half = float_to_half(*least);
                const float scale = half_to_float(scale_half), minimum = half_to_float(min_half);
                const float inverse = scale > 0.f ? 1.f / scale : 0.f;
                scales[group * kPanel + lane] = scale_half;
                minima[group * kPanel + lane] = min_half;
                for (int i = 0; i < kGroup; ++i) {
                    values[lane][i] =
                        static_cast<uint8_t>(std::lrintf(std::clamp((w[i] - minimum) * inverse, 0.f, 15.f)));
                }
            }
        }
        if (format == Format::i8g) {
            uint8_t* target = out.data + static_cast<size_t>(group) * 512;
            for (int i = 0; i < kGroup; ++i) {
                for (int lane = 0; lane < kPanel; ++lane) target[i / 4 * 64 + lane * 4 + i % 4] = values[lane][i];
            }
        } else {
            uint8_t* target = out.data + static_cast<size_t>(group) * 256;
            for (int z = 0; z < 4; ++z) {
                for (int lane = 0; lane < kPanel; ++lane) {
                    for (int i = 0; i < 4; ++i) {
                        target[z * 64 + lane * 4 + i] =
                            static_cast<uint8_t>(values[lane][z * 8 + i] | values[lane][z * 8 + 4 + i] << 4);
                    }
                }
            }
        }
    }
}

// `rows` is [16][k_padded], zero past k and for channels past n.
inline void pack_panel(uint8_t* blob, int panel, float* rows) {
    BlobHeader header;
    std::memcpy(&header, blob, sizeof header);
    const auto format = static_cast<Format>(header.format);
    const int k = static_cast<int>(header.k), k_padded = static_cast<int>(header.k_padded);
    const BlobPanel out(blob, panel);
    switch (format) {
        case Format::f32:
        case Format::f16:
            for (int lane = 0; lane < kPanel; ++lane) {
                const float* row = rows + static_cast<size_t>(lane) * k_padded;
                for (int i = 0; i < k_padded; ++i) {
                    if (format == Format::f32) reinterpret_cast<float*>(out.data)[i * kPanel + lane] = row[i];
                    else reinterpret_cast<uint16_t*>(out.data)[i * kPanel + lane] = float_to_half(row[i]);
                }
            }
            return;
        case Format::bf16:
            for (int lane = 0; lane < kPanel; ++lane) {
                const float* row = rows + static_cast<size_t>(lane) * k_padded;
                auto* target = reinterpret_cast<uint16_t*>(out.data) + lane * 2;
                for (int i = 0; i < k_padded; ++i) target[i / 2 * 32 + i % 2] = float_to_bf16(row[i]);
            }
            return;
        case Format::i8c:
        case Format::i8p: pack_channels(format, rows, k, k_padded, out); return;
        case Format::i8g:
        case Format::i4g: pack_groups(format, rows, k_padded, out); return;
    }
}

// Channel `channel` (in packed order) as floats; for embedding look-ups.
inline void unpack_channel(const Linear& weight, int channel, float* out) {
    const int panel = channel / kPanel, lane = channel % kPanel;
    const uint8_t* data = weight.panel(panel);
    switch (weight.format) {
        case Format::f32:
            for (int i = 0; i < weight.k; ++i) out[i] = reinterpret_cast<const float*>(data)[i * kPanel + lane];
            return;
        case Format::f16:
            for (int i = 0; i < weight.k; ++i) {
                out[i] = half_to_float(reinterpret_cast<const uint16_t*>(data)[i * kPanel + lane]);
            }
            return;
        case Format::bf16:
            for (int i = 0; i < weight.k; ++i) {
                out[i] = bf16_to_float(reinterpret_cast<const uint16_t*>(data)[(i / 2 * kPanel + lane) * 2 + i % 2]);
            }
            return;
        case Format::i8c:
        case Format::i8p: {
            const int size = round_up(weight.k, 16);
            float* row = row_scratch(size);
            const float scale = weight.channel_scale()[channel];
            for (int i = 0; i < size; ++i) {
                row[i] = scale * static_cast<float>(static_cast<int8_t>(data[(i / 4 * kPanel + lane) * 4 + i % 4]));
            }
            if (weight.format == Format::i8c) rotate(row, size);  // the rotation is its own inverse
            std::memcpy(out, row, static_cast<size_t>(weight.k) * 4);
            return;
        }
        case Format::i8g:
        case Format::i4g:
            for (int i = 0; i < weight.k; ++i) {
                const int group = i / kGroup, step = i % kGroup / 4, byte = lane * 4 + i % 4;
                const float scale = half_to_float(weight.group_scale(panel)[group * kPanel + lane]);
                if (weight.format == Format::i8g) {
                    out[i] = scale * static_cast<float>(data[group * 512 + step * 64 + byte] - 128);
                } else {
                    const uint8_t pair = data[group * 256 + step / 2 * 64 + byte];
                    const float minimum = half_to_float(weight.group_min(panel)[group * kPanel + lane]);
                    out[i] = scale * static_cast<float>(step % 2 == 0 ? pair & 15 : pair >> 4) + minimum;
                }
            }
            return;
    }
}

}  // namespace DSEEK_VARIANT
}  // namespace dseek
