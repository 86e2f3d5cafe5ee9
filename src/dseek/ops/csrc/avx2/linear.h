// Linear kernels for AVX2 with FMA: register tiles of a few rows x one or two panels that fill the sixteen registers.
//
// There is no bf16 and no four-way byte product here. With many rows, bf16 and groups become floats and int8 becomes
// int16 before they are multiplied, rows and panels once for all their products; bytes themselves are multiplied
// pairwise, with the sign of the weight moved to the input (see `add_products`).
#pragma once

#include <immintrin.h>

#include <algorithm>

#include "../common/linear_portable.h"

namespace dseek {
namespace DSEEK_VARIANT {

inline __m256 load8(const float* source) { return _mm256_loadu_ps(source); }
inline __m256i load32(const void* source) { return _mm256_loadu_si256(static_cast<const __m256i*>(source)); }
inline f32x16 lanes(__m256 low, __m256 high) {
    return {reinterpret_cast<f32x16::Part>(low), reinterpret_cast<f32x16::Part>(high)};
}
inline f32x16 lanes(__m256i low, __m256i high) { return lanes(_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(high)); }
inline __m256i broadcast4(const void* source) {
    int32_t value;
    std::memcpy(&value, source, 4);
    return _mm256_set1_epi32(value);
}

// Hands tiles to tile.run<rows, panels>(row, panel): `kRows` x one panel, or two panels where they are a gate and an up
// panel that the epilogue joins.
template <int kRows, class Tile>
void for_each_tile_256(const LinearCall& call, const Tile& tile) {
    constexpr int kGatedRows = kRows / 2;  // as many registers
    const bool gated = call.epilogue == Epilogue::gated;
    for (int panel = call.panel_begin; panel < call.panel_end; panel += gated ? 2 : 1) {
        int row = call.row_begin;
        if (gated) {
            for (; row + kGatedRows <= call.row_end; row += kGatedRows) tile.template run<kGatedRows, 2>(row, panel);
            for (; row < call.row_end; ++row) tile.template run<1, 2>(row, panel);
        } else {
            for (; row + kRows <= call.row_end; row += kRows) tile.template run<kRows, 1>(row, panel);
            for (; row + 2 <= call.row_end; row += 2) tile.template run<2, 1>(row, panel);
            for (; row < call.row_end; ++row) tile.template run<1, 1>(row, panel);
        }
    }
}

// The sums as values: sums that are read in a loop that is not unrolled stay in memory all the time.
template <class Register, int kRows, int kPanels>
[[gnu::always_inline]] inline TileSums<kRows, kPanels> copied(const Register (&sums)[kRows][kPanels][2]) {
    TileSums<kRows, kPanels> values;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
        for (int p = 0; p < kPanels; ++p) values.of[r][p] = lanes(sums[r][p][0], sums[r][p][1]);
    }
    return values;
}

// Panels [k][16] of floats or halves and rows of floats, wherever they lie.
struct FloatOperands {
    const float* rows;  // of row_begin
    size_t row_stride;
    const uint8_t* panels;  // of panel_begin
    size_t panel_stride;    // bytes
    int k;
};

template <bool kHalf>
struct FloatTile256 {
    const LinearCall& call;
    FloatOperands operands;

    template <int kRows, int kPanels>
    void run(int row, int panel) const {
        const float* x[kRows];
        for (int r = 0; r < kRows; ++r) {
            x[r] = operands.rows + static_cast<size_t>(row + r - call.row_begin) * operands.row_stride;
        }
        const size_t panel_stride = operands.panel_stride;
        const uint8_t* w = operands.panels + static_cast<size_t>(panel - call.panel_begin) * panel_stride;
        __m256 sums[kRows][kPanels][2] = {};
        for (int i = 0; i < operands.k; ++i, w += kPanel * (kHalf ? 2 : 4)) {
#pragma GCC unroll 2
            for (int p = 0; p < kPanels; ++p) {
                const uint8_t* source = w + p * panel_stride;
                __m256 low, high;
                if constexpr (kHalf) {
                    low = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
                    high = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source + 16)));
                } else {
                    low = load8(reinterpret_cast<const float*>(source));
                    high = load8(reinterpret_cast<const float*>(source) + 8);
                }
#pragma GCC unroll 8
                for (int r = 0; r < kRows; ++r) {
                    const __m256 value = _mm256_broadcast_ss(x[r] + i);
                    sums[r][p][0] = _mm256_fmadd_ps(low, value, sums[r][p][0]);
                    sums[r][p][1] = _mm256_fmadd_ps(high, value, sums[r][p][1]);
                }
            }
        }
        finish_rows(call, row, panel, copied(sums));
    }
};

constexpr int kWideRows = 6;  // of a tile: twelve registers of sums

// f32 and f16 weights with f32 rows.
template <bool kHalf>
void linear_floats(const LinearCall& call) {
    const Linear& weight = *call.weight;
    for_each_tile_256<kWideRows>(call, FloatTile256<kHalf>{call,
                                                           {call.rows->row<float>(call.row_begin), call.rows->stride,
                                                            weight.panel(call.panel_begin),
                                                            panel_bytes(weight.format, weight.k_padded), weight.k}});
}

// bf16 weights with a few bf16 rows, widened as they are used.
struct Bf16Tile256 {
    const LinearCall& call;

    template <int kRows, int kPanels>
    void run(int row, int panel) const {
        const Linear& weight = *call.weight;
        const uint16_t* x[kRows];
        for (int r = 0; r < kRows; ++r) x[r] = call.rows->template row<uint16_t>(row + r);
        __m256 sums[kRows][kPanels][2] = {};
        const uint16_t* w[kPanels];
        for (int p = 0; p < kPanels; ++p) w[p] = reinterpret_cast<const uint16_t*>(weight.panel(panel + p));
        const __m256i upper = _mm256_set1_epi32(static_cast<int32_t>(0xffff0000u));
        const auto add = [&](int i, int p, const auto& widen) __attribute__((always_inline)) {
            const uint16_t* source = w[p] + static_cast<size_t>(i) * kPanel;
            const __m256 low = widen(load32(source)), high = widen(load32(source + 16));
#pragma GCC unroll 8
            for (int r = 0; r < kRows; ++r) {
                const __m256 value = widen(broadcast4(x[r] + i));
                sums[r][p][0] = _mm256_fmadd_ps(low, value, sums[r][p][0]);
                sums[r][p][1] = _mm256_fmadd_ps(high, value, sums[r][p][1]);
            }
        };
        for (int i = 0; i < weight.k_padded; i += 2) {
#pragma GCC unroll 2
            for (int p = 0; p < kPanels; ++p) {
                add(i, p, [](__m256i pair) { return _mm256_castsi256_ps(_mm256_slli_epi32(pair, 16)); });
                add(i, p, [upper](__m256i pair) { return _mm256_castsi256_ps(_mm256_and_si256(pair, upper)); });
            }
        }
        finish_rows(call, row, panel, copied(sums));
    }
};

// Widens one panel of bf16, i8g or i4g to floats [k_padded][16], each of them a bf16 number.
inline void widen_to_floats(const Linear& weight, int panel, uint16_t* room, float* out) {
    const uint16_t* pairs = room;
    if (weight.format == Format::bf16) pairs = reinterpret_cast<const uint16_t*>(weight.panel(panel));
    else widen_panel(weight, panel, room);
    for (int i = 0; i < weight.k_padded; i += 2) {
        f32x16 first, second;
        load_bf16_pairs(pairs + static_cast<size_t>(i) * kPanel, first, second);
        store(out + static_cast<size_t>(i) * kPanel, first);
        store(out + static_cast<size_t>(i + 1) * kPanel, second);
    }
}

// bf16, i8g and i4g weights with many bf16 rows: rows and panels become floats first, each once for all its products.
inline void linear_widened_floats(const LinearCall& call) {
    const Linear& weight = *call.weight;
    const size_t k = weight.k_padded, panel_floats = k * kPanel, rows = call.row_end - call.row_begin;
    thread_local Scratch room;
    auto* wide_rows = reinterpret_cast<float*>(room.get((rows * k + 2 * panel_floats) * 4 + panel_floats * 2));
    float* wide_panels = wide_rows + rows * k;
    auto* pairs = reinterpret_cast<uint16_t*>(wide_panels + 2 * panel_floats);
    for (size_t row = 0; row < rows; ++row) {
        const uint16_t* source = call.rows->row<uint16_t>(call.row_begin + static_cast<int>(row));
        for (size_t i = 0; i < k; ++i) wide_rows[row * k + i] = bf16_to_float(source[i]);
    }
    LinearCall part = call;
    for (int panel = call.panel_begin; panel < call.panel_end; panel += 2) {
        part.panel_begin = panel;
        part.panel_end = std::min(panel + 2, call.panel_end);
        for (int p = panel; p < part.panel_end; ++p) {
            widen_to_floats(weight, p, pairs, wide_panels + (p - panel) * panel_floats);
        }
        const FloatOperands operands{wide_rows, k, reinterpret_cast<const uint8_t*>(wide_panels), panel_floats * 4,
                                     static_cast<int>(k)};
        for_each_tile_256<kWideRows>(part, FloatTile256<false>{part, operands});
    }
}

// sums[lane] += four products of a signed weight and a signed input, neither of them -128 together with the other: the
// instruction multiplies |w| by sign(w) x, and 2 * 128 * 127 just fits its 16-bit sums.
inline __m256i add_products(__m256i sums, __m256i weights, __m256i magnitudes, __m256i inputs) {
    const __m256i pairs = _mm256_maddubs_epi16(magnitudes, _mm256_sign_epi8(inputs, weights));
    return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

// Integer sums, times the scale of each channel and row.
template <int kRows, int kPanels>
void finish_scaled(const LinearCall& call, int row, int panel, TileSums<kRows, kPanels> sums) {
    for (int p = 0; p < kPanels; ++p) {
        const f32x16 scale = load(call.weight->channel_scale() + (panel + p) * kPanel);
        for (int r = 0; r < kRows; ++r) sums.of[r][p] *= scale * call.rows->scale[row + r];
    }
    finish_rows(call, row, panel, sums);
}

// i8c weights with token_u8 rows, i8p weights with plain_u8 rows.
struct ChannelTile256 {
    const LinearCall& call;

    template <int kRows, int kPanels>
    void run(int row, int panel) const {
        const Linear& weight = *call.weight;
        const uint8_t* x[kRows];
        for (int r = 0; r < kRows; ++r) x[r] = call.rows->template row<uint8_t>(row + r);
        __m256i sums[kRows][kPanels][2] = {};
        const __m256i bias = _mm256_set1_epi8(-128);
        const size_t panel_stride = panel_bytes(weight.format, weight.k_padded);
        const uint8_t* w = weight.panel(panel);
        for (int i = 0; i < weight.k_padded; i += 4, w += 4 * kPanel) {
#pragma GCC unroll 2
            for (int p = 0; p < kPanels; ++p) {
#pragma GCC unroll 2
                for (int half = 0; half < 2; ++half) {
                    const __m256i values = load32(w + p * panel_stride + half * 32);
                    const __m256i magnitudes = _mm256_abs_epi8(values);
#pragma GCC unroll 8
                    for (int r = 0; r < kRows; ++r) {
                        const __m256i inputs = _mm256_xor_si256(broadcast4(x[r] + i), bias);
                        sums[r][p][half] = add_products(sums[r][p][half], values, magnitudes, inputs);
                    }
                }
            }
        }
        finish_scaled(call, row, panel, copied(sums));
    }
};

// The same with many rows: both sides as 16-bit integers, which one instruction multiplies in pairs; bytes take three,
// for the sign has to move and their sums to be widened. The sums are the same integers.
struct ShortTile256 {
    const LinearCall& call;
    const int16_t* rows;    // [rows][k_padded], of row_begin
    const int16_t* panels;  // [k_padded / 2][16][2] each, of panel_begin

    template <int kRows, int kPanels>
    void run(int row, int panel) const {
        const Linear& weight = *call.weight;
        const size_t k = weight.k_padded, panel_stride = k * kPanel;
        const int16_t* x[kRows];
        for (int r = 0; r < kRows; ++r) x[r] = rows + static_cast<size_t>(row + r - call.row_begin) * k;
        const int16_t* w = panels + static_cast<size_t>(panel - call.panel_begin) * panel_stride;
        __m256i sums[kRows][kPanels][2] = {};
        for (size_t i = 0; i < k; i += 2, w += 2 * kPanel) {
#pragma GCC unroll 2
            for (int p = 0; p < kPanels; ++p) {
                const __m256i low = load32(w + p * panel_stride), high = load32(w + p * panel_stride + kPanel);
#pragma GCC unroll 8
                for (int r = 0; r < kRows; ++r) {
                    const __m256i value = broadcast4(x[r] + i);
                    sums[r][p][0] = _mm256_add_epi32(sums[r][p][0], _mm256_madd_epi16(low, value));
                    sums[r][p][1] = _mm256_add_epi32(sums[r][p][1], _mm256_madd_epi16(high, value));
                }
            }
        }
        finish_scaled(call, row, panel, copied(sums));
    }
};

// Widens one panel of int8 [k / 4][16][4] to [k / 2][16][2] of 16 bits.
inline void widen_to_shorts(const Linear& weight, int panel, int16_t* out) {
    const uint8_t* source = weight.panel(panel);
    for (int i = 0; i < weight.k_padded; i += 4, source += 4 * kPanel, out += 4 * kPanel) {
        const auto quads = load_as<i32x16>(source);
        const auto pair = [&quads](int first, int second) {
            return (((quads << first) >> 24) & 0xffff) ^ (((quads << second) >> 24) << 16);
        };
        store_as(out, pair(24, 16));
        store_as(out + 2 * kPanel, pair(8, 0));
    }
}

inline void linear_widened_shorts(const LinearCall& call) {
    constexpr int kShortRows = 4;  // products need registers of their own before they are added
    const Linear& weight = *call.weight;
    const size_t k = weight.k_padded, panel_shorts = k * kPanel, rows = call.row_end - call.row_begin;
    thread_local Scratch room;
    auto* wide_rows = reinterpret_cast<int16_t*>(room.get((rows * k + 2 * panel_shorts) * 2 + 64));
    auto* wide_panels = wide_rows + (rows * k + 31) / 32 * 32;
    for (size_t row = 0; row < rows; ++row) {
        const uint8_t* source = call.rows->row<uint8_t>(call.row_begin + static_cast<int>(row));
        for (size_t i = 0; i < k; ++i) wide_rows[row * k + i] = static_cast<int16_t>(source[i] - 128);
    }
    LinearCall part = call;
    for (int panel = call.panel_begin; panel < call.panel_end; panel += 2) {
        part.panel_begin = panel;
        part.panel_end = std::min(panel + 2, call.panel_end);
        for (int p = panel; p < part.panel_end; ++p) {
            widen_to_shorts(weight, p, wide_panels + (p - panel) * panel_shorts);
        }
        for_each_tile_256<kShortRows>(part, ShortTile256{part, wide_rows, wide_panels});
    }
}

// The integer products of one row and one group of a panel, sixteen channels.
inline f32x16 group_products(const uint8_t* source, const int8_t* x, bool four_bits) {
    __m256i low = _mm256_setzero_si256(), high = low;
    if (four_bits) {
        // Weights are 0 to 15: 16 products of at most 15 * 127 fit 16 bits.
        const __m256i nibble = _mm256_set1_epi8(15);
#pragma GCC unroll 4
        for (int z = 0; z < 4; ++z) {
            const __m256i first = broadcast4(x + z * 8), second = broadcast4(x + z * 8 + 4);
            const __m256i a = load32(source + z * 64), b = load32(source + z * 64 + 32);
            const auto add = [&](__m256i sums, __m256i bytes) {
                const __m256i later = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble);
                sums = _mm256_add_epi16(sums, _mm256_maddubs_epi16(_mm256_and_si256(bytes, nibble), first));
                return _mm256_add_epi16(sums, _mm256_maddubs_epi16(later, second));
            };
            low = add(low, a);
            high = add(high, b);
        }
        const __m256i ones = _mm256_set1_epi16(1);
        return lanes(_mm256_madd_epi16(low, ones), _mm256_madd_epi16(high, ones));
    }
    const __m256i bias = _mm256_set1_epi8(-128);
#pragma GCC unroll 8
    for (int step = 0; step < 8; ++step) {
        const __m256i inputs = broadcast4(x + step * 4);
        const __m256i a = _mm256_xor_si256(load32(source + step * 64), bias);
        const __m256i b = _mm256_xor_si256(load32(source + step * 64 + 32), bias);
        low = add_products(low, a, _mm256_abs_epi8(a), inputs);
        high = add_products(high, b, _mm256_abs_epi8(b), inputs);
    }
    return lanes(low, high);
}

// i8g and i4g weights with group_s8 rows, a few rows at a time.
template <bool kFourBits>
void linear_groups_256(const LinearCall& call) {
    const Linear& weight = *call.weight;
    const int groups = weight.k_padded / kGroup;
    constexpr int kRows = 4;
    constexpr size_t kGroupBytes = kFourBits ? 256 : 512;
    for (int row = call.row_begin; row < call.row_end; row += kRows) {
        const int rows = std::min(kRows, call.row_end - row);
        for (int panel = call.panel_begin; panel < call.panel_end; panel += 2) {
            const int panels = std::min(2, call.panel_end - panel);
            f32x16 sums[kRows][2] = {};
            for (int p = 0; p < panels; ++p) {
                const uint8_t* source = weight.panel(panel + p);
                const uint16_t *scales = weight.group_scale(panel + p), *minima = weight.group_min(panel + p);
                for (int group = 0; group < groups; ++group, source += kGroupBytes) {
                    const f32x16 scale = load_half(scales + group * kPanel);
                    for (int r = 0; r < rows; ++r) {
                        const int8_t* x = call.rows->row<int8_t>(row + r) + group * kGroup;
                        const size_t at = static_cast<size_t>(row + r) * groups + group;
                        f32x16 sum = sums[r][p];
                        sum += group_products(source, x, kFourBits) * (scale * call.rows->group_scale[at]);
                        if (kFourBits) sum += load_half(minima + group * kPanel) * call.rows->group_sum[at];
                        sums[r][p] = sum;
                    }
                }
            }
            for (int r = 0; r < rows; ++r) finish_row(call, row + r, panel, panels, sums[r]);
        }
    }
}

inline void linear_avx2(const LinearCall& call) {
    constexpr int kByteRows = 3;
    switch (call.weight->format) {
        case Format::f32: linear_floats<false>(call); return;
        case Format::f16: linear_floats<true>(call); return;
        case Format::i8c:
        case Format::i8p:
            if (call.row_end - call.row_begin < kWideRows) for_each_tile_256<kByteRows>(call, ChannelTile256{call});
            else linear_widened_shorts(call);
            return;
        case Format::bf16:
            if (call.row_end - call.row_begin < kWideRows) for_each_tile_256<kWideRows>(call, Bf16Tile256{call});
            else linear_widened_floats(call);
            return;
        case Format::i8g:
        case Format::i4g:
            if (call.rows->kind == RowKind::bf16) linear_widened_floats(call);
            else if (call.weight->format == Format::i4g) linear_groups_256<true>(call);
            else linear_groups_256<false>(call);
            return;
    }
}

}  // namespace DSEEK_VARIANT
}  // namespace dseek
