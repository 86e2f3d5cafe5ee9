// Linear kernels in portable vectors: the only ones of `generic` and `avx2`, and f32 and f16 for the others.
//
// A tile of rows x panels is held in registers while the inputs stream by. Grouped formats are widened one panel at a
// time when there are many rows, so that the cost of widening is shared by all of them.
#pragma once

#include <algorithm>

#include "kernels.h"
#include "scratch.h"
#include "vec.h"

namespace dseek {
namespace DSEEK_VARIANT {

#if defined(__AVX512F__)
constexpr int kTileRows = 6, kTilePanels = 4;
#else
constexpr int kTileRows = 3, kTilePanels = 2;
#endif

// Writes one row of a tile. `product` holds the sums of `panels` neighbouring panels.
inline void finish_row(const LinearCall& call, int row, int panel, int panels, f32x16* product) {
    if (call.bias != nullptr) {
        for (int p = 0; p < panels; ++p) product[p] += load(call.bias + (panel + p) * kPanel);
    }
    float* out = call.out + static_cast<size_t>(row) * call.out_stride;
    switch (call.epilogue) {
        case Epilogue::store:
            for (int p = 0; p < panels; ++p) store(out + (panel + p) * kPanel, product[p]);
            return;
        case Epilogue::add:
            for (int p = 0; p < panels; ++p) {
                float* target = out + (panel + p) * kPanel;
                store(target, load(target) + product[p]);
            }
            return;
        case Epilogue::gated:
            for (int p = 0; p + 1 < panels; p += 2) {
                store(out + (panel + p) / 2 * kPanel, silu(product[p]) * product[p + 1]);
            }
            return;
    }
}

// What a tile of rows x panels has summed.
template <int kRows, int kPanels>
struct TileSums {
    f32x16 of[kRows][kPanels];
};

// The sums as values: sums that are read in a loop that is not unrolled stay in memory all the time.
template <int kRows, int kPanels>
[[gnu::always_inline]] inline TileSums<kRows, kPanels> copied(const f32x16 (&sums)[kRows][kPanels]) {
    TileSums<kRows, kPanels> values;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int p = 0; p < kPanels; ++p) values.of[r][p] = sums[r][p];
    }
    return values;
}

template <int kRows, int kPanels>
inline void finish_rows(const LinearCall& call, int row, int panel, TileSums<kRows, kPanels> sums) {
    for (int r = 0; r < kRows; ++r) finish_row(call, row + r, panel, kPanels, sums.of[r]);
}

// Calls tile(row, panel) for tiles of at most kTileRows x kTilePanels; Tile::run<rows, panels>.
template <class Tile>
void for_each_tile(const LinearCall& call, const Tile& tile) {
    for (int panel = call.panel_begin; panel < call.panel_end;) {
        int panels = kTilePanels;
        while (panels > call.panel_end - panel) panels /= 2;
        for (int row = call.row_begin; row < call.row_end;) {
            const int left = call.row_end - row;
            if (left >= kTileRows) {
                if (panels == 4) tile.template run<kTileRows, 4>(row, panel);
                else if (panels == 2) tile.template run<kTileRows, 2>(row, panel);
                else tile.template run<kTileRows, 1>(row, panel);
                row += kTileRows;
            } else {
                if (panels == 4) tile.template run<1, 4>(row, panel);
                else if (panels == 2) tile.template run<1, 2>(row, panel);
                else tile.template run<1, 1>(row, panel);
                row += 1;
            }
        }
        panel += panels;
    }
}

// f32 and f16 weights with f32 rows.
template <bool kHalf>
struct FloatTile {
    const LinearCall& call;

    template <int kRows, int kPanels>
    void run(int row, int panel) const {
        const Linear& weight = *call.weight;
        const float* x[kRows];
        for (int r = 0; r < kRows; ++r) x[r] = call.rows->template row<float>(row + r);
        const uint8_t* w[kPanels];
        for (int p = 0; p < kPanels; ++p) w[p] = weight.panel(panel + p);
        f32x16 acc[kRows][kPanels] = {};
        for (int i = 0; i < weight.k; ++i) {
            f32x16 value[kPanels];
            for (int p = 0; p < kPanels; ++p) {
                if constexpr (kHalf) value[p] = load_half(reinterpret_cast<const uint16_t*>(w[p]) + i * kPanel);
                else value[p] = load(reinterpret_cast<const float*>(w[p]) + i * kPanel);
            }
            for (int r = 0; r < kRows; ++r) {
                for (int p = 0; p < kPanels; ++p) acc[r][p] += value[p] * x[r][i];
            }
        }
        finish_rows(call, row, panel, copied(acc));
    }
};

// bf16 weights with bf16 rows. `panels` may point at panels widened from a grouped format.
struct Bf16Tile {
    const LinearCall& call;
    const uint16_t* panels;  // of panel_begin

    template <int kRows, int kPanels>
    void run(int row, int panel) const {
        const int k_padded = call.weight->k_padded;
        const uint16_t* x[kRows];
        for (int r = 0; r < kRows; ++r) x[r] = call.rows->template row<uint16_t>(row + r);
        const uint16_t* w = panels + static_cast<size_t>(panel - call.panel_begin) * k_padded * kPanel;
        f32x16 acc[kRows][kPanels] = {};
        for (int i = 0; i < k_padded; i += 2) {
            for (int p = 0; p < kPanels; ++p) {
                f32x16 low, high;
                load_bf16_pairs(w + (static_cast<size_t>(p) * k_padded + i) * kPanel, low, high);
                for (int r = 0; r < kRows; ++r) {
                    acc[r][p] += low * bf16_to_float(x[r][i]);
                    acc[r][p] += high * bf16_to_float(x[r][i + 1]);
                }
            }
        }
        finish_rows(call, row, panel, copied(acc));
    }
};

// acc[lane] += sum of four products of signed bytes; `inputs` are four values shared by all lanes.
inline i32x16 dot4(i32x16 acc, int32_t inputs, const int8_t* weights) {
    const auto* x = reinterpret_cast<const int8_t*>(&inputs);
    int32_t totals[16];
    for (int lane = 0; lane < 16; ++lane) {
        totals[lane] = 0;
        for (int i = 0; i < 4; ++i) totals[lane] += x[i] * weights[lane * 4 + i];
    }
    return acc + load(totals);
}

// i8c weights with token_u8 rows, i8p weights with plain_u8 rows.
struct ChannelTile {
    const LinearCall& call;

    template <int kRows, int kPanels>
    void run(int row, int panel) const {
        const Linear& weight = *call.weight;
        i32x16 acc[kRows][kPanels] = {};
        for (int i = 0; i < weight.k_padded; i += 4) {
            for (int r = 0; r < kRows; ++r) {
                uint32_t inputs;
                std::memcpy(&inputs, call.rows->template row<uint8_t>(row + r) + i, 4);
                inputs ^= 0x80808080u;
                for (int p = 0; p < kPanels; ++p) {
                    const auto* w = reinterpret_cast<const int8_t*>(weight.panel(panel + p)) + i * kPanel;
                    acc[r][p] = dot4(acc[r][p], static_cast<int32_t>(inputs), w);
                }
            }
        }
        for (int r = 0; r < kRows; ++r) {
            f32x16 product[kPanels];
            for (int p = 0; p < kPanels; ++p) {
                product[p] = to_float(acc[r][p]) *
                             (load(weight.channel_scale() + (panel + p) * kPanel) * call.rows->scale[row + r]);
            }
            finish_row(call, row + r, panel, kPanels, product);
        }
    }
};

// The signed bytes of one group of a panel: [8][16][4]. i4g gives 0 to 15, i8g the value itself.
inline void group_values(const Linear& weight, int panel, int group, int8_t* values) {
    if (weight.format == Format::i8g) {
        const uint8_t* source = weight.panel(panel) + static_cast<size_t>(group) * 512;
        for (int i = 0; i < 512; ++i) values[i] = static_cast<int8_t>(source[i] ^ 0x80);
        return;
    }
    const uint8_t* source = weight.panel(panel) + static_cast<size_t>(group) * 256;
    for (int z = 0; z < 4; ++z) {
        for (int i = 0; i < 64; ++i) {
            values[z * 128 + i] = static_cast<int8_t>(source[z * 64 + i] & 15);
            values[z * 128 + 64 + i] = static_cast<int8_t>(source[z * 64 + i] >> 4);
        }
    }
}

// i8g and i4g weights with group_s8 rows, few rows at a time.
inline void linear_groups(const LinearCall& call) {
    const Linear& weight = *call.weight;
    const bool has_min = weight.format == Format::i4g;
    const int groups = weight.k_padded / kGroup;
    constexpr int kRows = 8;
    for (int row = call.row_begin; row < call.row_end; row += kRows) {
        const int rows = std::min(kRows, call.row_end - row);
        for (int panel = call.panel_begin; panel < call.panel_end; panel += 2) {
            const int panels = std::min(2, call.panel_end - panel);
            f32x16 acc[kRows][2] = {};
            for (int p = 0; p < panels; ++p) {
                for (int group = 0; group < groups; ++group) {
                    int8_t values[512];
                    group_values(weight, panel + p, group, values);
                    const f32x16 scale = load_half(weight.group_scale(panel + p) + group * kPanel);
                    const f32x16 minimum = has_min ? load_half(weight.group_min(panel + p) + group * kPanel) : f32x16{};
                    for (int r = 0; r < rows; ++r) {
                        const int8_t* x = call.rows->row<int8_t>(row + r) + group * kGroup;
                        i32x16 product{};
                        for (int step = 0; step < 8; ++step) {
                            int32_t inputs;
                            std::memcpy(&inputs, x + step * 4, 4);
                            product = dot4(product, inputs, values + step * 64);
                        }
                        const size_t at = static_cast<size_t>(row + r) * groups + group;
                        acc[r][p] += to_float(product) * scale * call.rows->group_scale[at];
                        acc[r][p] += minimum * call.rows->group_sum[at];
                    }
                }
            }
            for (int r = 0; r < rows; ++r) finish_row(call, row + r, panel, panels, acc[r]);
        }
    }
}

// Widens one panel of a grouped format to bf16 [k_padded / 2][16][2].
inline void widen_panel(const Linear& weight, int panel, uint16_t* out) {
    for (int group = 0; group < weight.k_padded / kGroup; ++group) {
        int8_t values[512];
        group_values(weight, panel, group, values);
        const f32x16 scale = load_half(weight.group_scale(panel) + group * kPanel);
        const f32x16 minimum =
            weight.format == Format::i4g ? load_half(weight.group_min(panel) + group * kPanel) : f32x16{};
        for (int step = 0; step < 8; ++step) {
            const auto bytes = load_as<i32x16>(values + step * 64);  // four neighbouring inputs a lane
            const auto rounded = [&](int left) { return bf16_bits(to_float((bytes << left) >> 24) * scale + minimum); };
            for (int pair = 0; pair < 2; ++pair) {
                const u32x16 both = (rounded(24 - 16 * pair) >> 16) ^ (rounded(16 - 16 * pair) & 0xffff0000u);
                store_as(out + (group * 16 + step * 2 + pair) * 32, both);
            }
        }
    }
}

// Grouped formats with bf16 rows, many rows: widen a few panels, use them for every row.
template <class Multiply, class Widen>
void linear_widened(const LinearCall& call, int panels_at_once, const Multiply& multiply, const Widen& widen) {
    const Linear& weight = *call.weight;
    const size_t panel_elements = static_cast<size_t>(weight.k_padded) * kPanel;
    thread_local Scratch room;
    auto* scratch = reinterpret_cast<uint16_t*>(room.get(panel_elements * panels_at_once * 2));
    LinearCall part = call;
    for (int panel = call.panel_begin; panel < call.panel_end; panel += panels_at_once) {
        part.panel_begin = panel;
        part.panel_end = std::min(panel + panels_at_once, call.panel_end);
        for (int p = panel; p < part.panel_end; ++p) widen(weight, p, scratch + (p - panel) * panel_elements);
        multiply(part, scratch);
    }
}

inline RowKind row_kind_portable(Format format, int num_rows) {
    constexpr int kFewRows = 8;  // up to here the grouped product is cheaper than widening the weights
    switch (format) {
        case Format::f32:
        case Format::f16: return RowKind::f32;
        case Format::bf16: return RowKind::bf16;
        case Format::i8c: return RowKind::token_u8;
        case Format::i8p: return RowKind::plain_u8;
        case Format::i8g:
        case Format::i4g: return num_rows <= kFewRows ? RowKind::group_s8 : RowKind::bf16;
    }
    return RowKind::f32;
}

inline void linear_portable(const LinearCall& call) {
    switch (call.weight->format) {
        case Format::f32: for_each_tile(call, FloatTile<false>{call}); return;
        case Format::f16: for_each_tile(call, FloatTile<true>{call}); return;
        case Format::bf16:
            for_each_tile(call,
                          Bf16Tile{call, reinterpret_cast<const uint16_t*>(call.weight->panel(call.panel_begin))});
            return;
        case Format::i8c:
        case Format::i8p: for_each_tile(call, ChannelTile{call}); return;
        case Format::i8g:
        case Format::i4g:
            if (call.rows->kind == RowKind::group_s8) {
                linear_groups(call);
                return;
            }
            linear_widened(
                call, 2,
                [](const LinearCall& part, const uint16_t* panels) { for_each_tile(part, Bf16Tile{part, panels}); },
                widen_panel);
            return;
    }
}

}  // namespace DSEEK_VARIANT
}  // namespace dseek
