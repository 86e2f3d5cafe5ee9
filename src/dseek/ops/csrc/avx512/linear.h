// Linear kernels for AVX-512 with VNNI and BF16: register tiles of 6 rows x 64 channels (24 of the 32 registers).
#pragma once

#include <immintrin.h>

#include "../common/linear_portable.h"

namespace dseek {
namespace DSEEK_VARIANT {

inline __m512i broadcast4(const void* source) {
    int32_t value;
    std::memcpy(&value, source, 4);
    return _mm512_set1_epi32(value);
}

inline f32x16 lanes(__m512 value) { return reinterpret_cast<f32x16>(value); }

// How far ahead of its use a weight is asked for when few rows leave the kernel waiting for memory: far enough for the
// latency, near enough for a private cache. The hardware's own prefetch stops at the end of every panel.
constexpr size_t kAheadBytes = 32 << 10;

// Whole panels that make up at least kAheadBytes, in bytes.
inline size_t ahead_bytes(size_t panel_stride, int panels_at_once) {
    const size_t step = panel_stride * static_cast<size_t>(panels_at_once);
    return (kAheadBytes + step - 1) / step * step;
}

inline void ask_for(const void* address) { _mm_prefetch(static_cast<const char*>(address), _MM_HINT_T1); }

// sums[i] += the products of four unsigned bytes with four signed ones. In a large tile GCC 12 copies the intrinsic's
// sums from register to register and spills some, which halves its speed; in a small one it does better than this.
[[gnu::always_inline]] inline __m512i dot_bytes(__m512i sums, __m512i unsigned_bytes, __m512i signed_bytes) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(unsigned_bytes), "v"(signed_bytes));
    return sums;
}

// y = 2^x for x <= 126, relative error 8e-5: a fiftieth of a bf16 step. Least-maximum fit of degree 3 on [0, 1). One
// step for all vectors, then the next.
template <int kVectors>
[[gnu::always_inline]] inline void exp2_for_bf16(const __m512* x, __m512* fraction, __m512* y) {
    for (int i = 0; i < kVectors; ++i) fraction[i] = _mm512_reduce_ps(x[i], 0x09);  // x - floor(x)
    for (int i = 0; i < kVectors; ++i) {
        y[i] = _mm512_fmadd_ps(_mm512_set1_ps(0.0780245195f), fraction[i], _mm512_set1_ps(0.226067155f));
    }
    for (int i = 0; i < kVectors; ++i) y[i] = _mm512_fmadd_ps(y[i], fraction[i], _mm512_set1_ps(0.69583354f));
    for (int i = 0; i < kVectors; ++i) y[i] = _mm512_fmadd_ps(y[i], fraction[i], _mm512_set1_ps(0.99992522f));
    for (int i = 0; i < kVectors; ++i) y[i] = _mm512_scalef_ps(y[i], x[i]);  // takes the floor itself
}

inline __m512 exp2_for_bf16(__m512 x) {
    __m512 fraction, y;
    exp2_for_bf16<1>(&x, &fraction, &y);
    return y;
}

// silu(x) = x / (1 + 2^(-x log2 e)) with a 14-bit reciprocal: what follows is rounded to bf16 or int8 anyway.
inline __m512 silu_512(__m512 x) {
    const __m512 exponent = _mm512_min_ps(_mm512_mul_ps(x, _mm512_set1_ps(-kLog2E)), _mm512_set1_ps(126.f));
    return _mm512_mul_ps(x, _mm512_rcp14_ps(_mm512_add_ps(exp2_for_bf16(exponent), _mm512_set1_ps(1.f))));
}

// bf16 weights with bf16 rows; two inputs an instruction.
struct Bf16Tile512 {
    const LinearCall& call;
    const uint16_t* panels;  // of panel_begin

    template <int kRows, int kPanels>
    void run(int row, int panel) const {
        const int k_padded = call.weight->k_padded;
        const uint16_t* x[kRows];
        for (int r = 0; r < kRows; ++r) x[r] = call.rows->template row<uint16_t>(row + r);
        const uint16_t* w = panels + static_cast<size_t>(panel - call.panel_begin) * k_padded * kPanel;
        __m512 acc[kRows][kPanels];
        for (int r = 0; r < kRows; ++r) {
            for (int p = 0; p < kPanels; ++p) acc[r][p] = _mm512_setzero_ps();
        }
        const size_t ahead = ahead_bytes(static_cast<size_t>(k_padded) * kPanel * 2, kPanels) / 2;
        for (int i = 0; i < k_padded; i += 2) {
            __m512bh value[kPanels];
            for (int p = 0; p < kPanels; ++p) {
                if constexpr (kRows < 6) ask_for(w + (static_cast<size_t>(p) * k_padded + i) * kPanel + ahead);
                value[p] = reinterpret_cast<__m512bh>(
                    _mm512_loadu_si512(w + (static_cast<size_t>(p) * k_padded + i) * kPanel));
            }
            for (int r = 0; r < kRows; ++r) {
                const auto inputs = reinterpret_cast<__m512bh>(broadcast4(x[r] + i));
                for (int p = 0; p < kPanels; ++p) acc[r][p] = _mm512_dpbf16_ps(acc[r][p], inputs, value[p]);
            }
        }
        for (int r = 0; r < kRows; ++r) {
            f32x16 product[kPanels];
            for (int p = 0; p < kPanels; ++p) product[p] = lanes(acc[r][p]);
            finish_row(call, row + r, panel, kPanels, product);
        }
    }
};

// int32 sums of one panel, minus what the offset of 128 in the activations added, times both scales.
inline __m512 scale_channels(const Linear& weight, int panel, __m512i sums, float row_scale) {
    const __m512i offset = _mm512_loadu_si512(weight.channel_sum() + panel * kPanel);
    const __m512 scale =
        _mm512_mul_ps(_mm512_loadu_ps(weight.channel_scale() + panel * kPanel), _mm512_set1_ps(row_scale));
    return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(sums, offset)), scale);
}

// i8c weights with token_u8 rows, i8p weights with plain_u8 rows; four inputs an instruction.
struct ChannelTile512 {
    const LinearCall& call;

    template <int kRows, int kPanels>
    void run(int row, int panel) const {
        const Linear& weight = *call.weight;
        const uint8_t* x[kRows];
        for (int r = 0; r < kRows; ++r) x[r] = call.rows->template row<uint8_t>(row + r);
        const uint8_t* w = weight.panel(panel);
        const size_t panel_stride = static_cast<size_t>(weight.k_padded) * kPanel;
        __m512i acc[kRows][kPanels];
        for (int r = 0; r < kRows; ++r) {
            for (int p = 0; p < kPanels; ++p) acc[r][p] = _mm512_setzero_si512();
        }
        const size_t ahead = ahead_bytes(panel_stride, kPanels);
        for (int i = 0; i < weight.k_padded; i += 4) {
            __m512i value[kPanels];
            for (int p = 0; p < kPanels; ++p) {
                if constexpr (kRows < 6) ask_for(w + p * panel_stride + i * kPanel + ahead);
                value[p] = _mm512_loadu_si512(w + p * panel_stride + i * kPanel);
            }
            for (int r = 0; r < kRows; ++r) {
                const __m512i inputs = broadcast4(x[r] + i);
                for (int p = 0; p < kPanels; ++p) acc[r][p] = dot_bytes(acc[r][p], inputs, value[p]);
            }
        }
        for (int r = 0; r < kRows; ++r) {
            f32x16 product[kPanels];
            for (int p = 0; p < kPanels; ++p) {
                product[p] = lanes(scale_channels(weight, panel + p, acc[r][p], call.rows->scale[row + r]));
            }
            finish_row(call, row + r, panel, kPanels, product);
        }
    }
};

inline __m512 half_lanes(const uint16_t* source) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
}

// The unsigned bytes of step `step` of one group: sixteen channels x four inputs.
template <bool kNibbles>
__m512i group_step(const uint8_t* group, int step) {
    if constexpr (!kNibbles) return _mm512_loadu_si512(group + step * 64);
    const __m512i packed = _mm512_loadu_si512(group + step / 2 * 64);
    const __m512i shifted = step % 2 == 0 ? packed : _mm512_srli_epi16(packed, 4);
    return _mm512_and_si512(shifted, _mm512_set1_epi8(15));
}

// i8g (kNibbles false) and i4g weights with group_s8 rows. The weights are the unsigned operand; i8g's offset of 128
// is taken off through the sum of the activations.
template <bool kNibbles, int kRows, int kPanels>
void group_tile(const LinearCall& call, int row, int panel) {
    const Linear& weight = *call.weight;
    const int groups = weight.k_padded / kGroup;
    constexpr int kGroupBytes = kNibbles ? 256 : 512;
    const size_t stride = panel_bytes(weight.format, weight.k_padded), ahead = ahead_bytes(stride, kPanels);
    const uint8_t* w = weight.panel(panel);
    const uint16_t* scales = weight.group_scale(panel);
    const uint16_t* minima = kNibbles ? weight.group_min(panel) : nullptr;
    const int8_t* x[kRows];
    const float* x_scale[kRows];
    const float* x_sum[kRows];
    for (int r = 0; r < kRows; ++r) {
        const size_t at = static_cast<size_t>(row + r) * groups;
        x[r] = call.rows->template row<int8_t>(row + r);
        x_scale[r] = call.rows->group_scale + at;
        x_sum[r] = call.rows->group_sum + at;
    }
    __m512 acc[kRows][kPanels];
    for (int r = 0; r < kRows; ++r) {
        for (int p = 0; p < kPanels; ++p) acc[r][p] = _mm512_setzero_ps();
    }
    for (int group = 0; group < groups; ++group) {
        __m512i product[kRows][kPanels];
        for (int r = 0; r < kRows; ++r) {
            for (int p = 0; p < kPanels; ++p) product[r][p] = _mm512_setzero_si512();
        }
#pragma GCC unroll 8
        for (int step = 0; step < 8; ++step) {
            __m512i value[kPanels];
            for (int p = 0; p < kPanels; ++p) {
                const uint8_t* source = w + p * stride + static_cast<size_t>(group) * kGroupBytes;
                if constexpr (!kNibbles && kRows < 4) ask_for(source + step * 64 + ahead);
                value[p] = group_step<kNibbles>(source, step);
            }
            for (int r = 0; r < kRows; ++r) {
                const __m512i inputs = broadcast4(x[r] + group * kGroup + step * 4);
                for (int p = 0; p < kPanels; ++p) product[r][p] = _mm512_dpbusd_epi32(product[r][p], value[p], inputs);
            }
        }
        for (int p = 0; p < kPanels; ++p) {
            const size_t at = (static_cast<size_t>(p) * groups + group) * kPanel;
            const __m512 scale = half_lanes(scales + at);
            const __m512 shift = kNibbles ? half_lanes(minima + at) : _mm512_mul_ps(scale, _mm512_set1_ps(-128.f));
            for (int r = 0; r < kRows; ++r) {
                const __m512 factor = _mm512_mul_ps(scale, _mm512_set1_ps(x_scale[r][group]));
                acc[r][p] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(product[r][p]), factor, acc[r][p]);
                acc[r][p] = _mm512_fmadd_ps(shift, _mm512_set1_ps(x_sum[r][group]), acc[r][p]);
            }
        }
    }
    for (int r = 0; r < kRows; ++r) {
        f32x16 sums[kPanels];
        for (int p = 0; p < kPanels; ++p) sums[p] = lanes(acc[r][p]);
        finish_row(call, row + r, panel, kPanels, sums);
    }
}

template <bool kNibbles, int kPanels>
void group_rows(const LinearCall& call, int panel) {
    int row = call.row_begin;
    for (; row + 4 <= call.row_end; row += 4) group_tile<kNibbles, 4, kPanels>(call, row, panel);
    if (row + 2 <= call.row_end) {
        group_tile<kNibbles, 2, kPanels>(call, row, panel);
        row += 2;
    }
    if (row < call.row_end) group_tile<kNibbles, 1, kPanels>(call, row, panel);
}

template <bool kNibbles>
void linear_groups_512(const LinearCall& call) {
    int panel = call.panel_begin;
    for (; panel + 2 <= call.panel_end; panel += 2) group_rows<kNibbles, 2>(call, panel);
    if (panel < call.panel_end) group_rows<kNibbles, 1>(call, panel);
}

// Widens one panel of a grouped format to bf16 [k_padded / 2][16][2].
inline void widen_panel_512(const Linear& weight, int panel, uint16_t* out) {
    const bool nibbles = weight.format == Format::i4g;
    const uint8_t* data = weight.panel(panel);
    const uint16_t* scales = weight.group_scale(panel);
    const uint16_t* minima = nibbles ? weight.group_min(panel) : nullptr;
    for (int group = 0; group < weight.k_padded / kGroup; ++group) {
        const __m512 scale = half_lanes(scales + group * kPanel);
        const __m512 shift =
            nibbles ? half_lanes(minima + group * kPanel) : _mm512_mul_ps(scale, _mm512_set1_ps(-128.f));
        const __m512i low_byte = _mm512_set1_epi32(255);
        for (int step = 0; step < 8; ++step) {
            const __m512i bytes =
                nibbles ? group_step<true>(data + group * 256, step) : group_step<false>(data + group * 512, step);
            __m512i pairs[2];
            for (int half = 0; half < 2; ++half) {
                const __m512i moved = half == 0 ? bytes : _mm512_srli_epi32(bytes, 16);
                const __m512 first = _mm512_cvtepi32_ps(_mm512_and_si512(moved, low_byte));
                const __m512 second = _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(moved, 8), low_byte));
                const __m512 a = _mm512_fmadd_ps(first, scale, shift), b = _mm512_fmadd_ps(second, scale, shift);
                const __m512i low = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a)));
                const __m512i high = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(b)));
                pairs[half] = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
            }
            uint16_t* target = out + (group * 16 + step * 2) * 32;
            _mm512_storeu_si512(target, pairs[0]);
            _mm512_storeu_si512(target + 32, pairs[1]);
        }
    }
}

// Calls tile.run<rows, panels> for tiles of at most 6 x 4, the last rows in one tile of their own height.
template <class Tile, int kPanels>
void tile_rows_512(const LinearCall& call, const Tile& tile, int panel) {
    int row = call.row_begin;
    for (; row + 6 <= call.row_end; row += 6) tile.template run<6, kPanels>(row, panel);
    switch (call.row_end - row) {
        case 5: tile.template run<5, kPanels>(row, panel); return;
        case 4: tile.template run<4, kPanels>(row, panel); return;
        case 3: tile.template run<3, kPanels>(row, panel); return;
        case 2: tile.template run<2, kPanels>(row, panel); return;
        case 1: tile.template run<1, kPanels>(row, panel); return;
        default: return;
    }
}

template <class Tile>
void tiles_512(const LinearCall& call, const Tile& tile) {
    int panel = call.panel_begin;
    for (; panel + 4 <= call.panel_end; panel += 4) tile_rows_512<Tile, 4>(call, tile, panel);
    if (panel + 2 <= call.panel_end) {
        tile_rows_512<Tile, 2>(call, tile, panel);
        panel += 2;
    }
    if (panel < call.panel_end) tile_rows_512<Tile, 1>(call, tile, panel);
}

inline void linear_avx512(const LinearCall& call) {
    const Linear& weight = *call.weight;
    switch (weight.format) {
        case Format::f32:
        case Format::f16: linear_portable(call); return;
        case Format::bf16:
            tiles_512(call, Bf16Tile512{call, reinterpret_cast<const uint16_t*>(weight.panel(call.panel_begin))});
            return;
        case Format::i8c:
        case Format::i8p: tiles_512(call, ChannelTile512{call}); return;
        case Format::i8g:
        case Format::i4g:
            if (call.rows->kind == RowKind::group_s8) {
                if (weight.format == Format::i4g) linear_groups_512<true>(call);
                else linear_groups_512<false>(call);
                return;
            }
            linear_widened(
                call, 4,
                [](const LinearCall& part, const uint16_t* panels) { tiles_512(part, Bf16Tile512{part, panels}); },
                widen_panel_512);
            return;
    }
}

}  // namespace DSEEK_VARIANT
}  // namespace dseek
