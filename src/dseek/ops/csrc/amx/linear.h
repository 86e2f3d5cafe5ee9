// Linear kernels for AMX: 32 rows x 32 channels in four accumulator tiles, int8 and bf16.
//
// The packed panels are tiles as they stand: sixteen steps of a panel are 1 KiB in the order that a B tile wants.
// Accumulators go through a small buffer to the vector side, where scales, bias and the epilogue are applied.
#pragma once

#include <immintrin.h>

#include "../avx512/linear.h"

namespace dseek {
namespace DSEEK_VARIANT {

constexpr int kTileRows16 = 16;
constexpr int kTileBytes = 64;  // a tile row

struct alignas(64) TileConfig {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

// Tile registers are state of a thread: set up before use, given back after, so that the thread's other work does not
// carry them through every context switch.
class TileSession {
public:
    TileSession() {
        TileConfig config;
        for (int tile = 0; tile < 8; ++tile) {
            config.row_bytes[tile] = kTileBytes;
            config.rows[tile] = kTileRows16;
        }
        // Not _tile_loadconfig: GCC 12 declares that it reads eight of the 64 bytes, and may drop the stores to the
        // rest.
        __asm__ volatile("ldtilecfg %0" : : "m"(config));
    }
    ~TileSession() { _tile_release(); }
};

struct Int8Product {
    using Value = uint8_t;
    static constexpr int kInputs = 64;  // of one tile step

    // The compiler's tile intrinsics take register numbers as literals only: one function a quarter of the block.
    static void multiply_top_left() { _tile_dpbusd(0, 4, 6); }
    static void multiply_top_right() { _tile_dpbusd(1, 4, 7); }
    static void multiply_bottom_left() { _tile_dpbusd(2, 5, 6); }
    static void multiply_bottom_right() { _tile_dpbusd(3, 5, 7); }
    // What turns a panel's sums into numbers, loaded once for all rows of a block.
    struct Channels {
        __m512i offset;
        __m512 scale;
        Channels(const LinearCall& call, int panel)
            : offset(_mm512_loadu_si512(call.weight->channel_sum() + panel * kPanel)),
              scale(_mm512_loadu_ps(call.weight->channel_scale() + panel * kPanel)) {}
    };
    static __m512 finish(const LinearCall& call, int row, const Channels& channels, const void* sums) {
        const __m512 value = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_load_si512(sums), channels.offset));
        return _mm512_mul_ps(value, _mm512_mul_ps(channels.scale, _mm512_set1_ps(call.rows->scale[row])));
    }
};

struct Bf16Product {
    using Value = uint16_t;
    static constexpr int kInputs = 32;

    // The compiler's tile intrinsics take register numbers as literals only: one function a quarter of the block.
    static void multiply_top_left() { _tile_dpbf16ps(0, 4, 6); }
    static void multiply_top_right() { _tile_dpbf16ps(1, 4, 7); }
    static void multiply_bottom_left() { _tile_dpbf16ps(2, 5, 6); }
    static void multiply_bottom_right() { _tile_dpbf16ps(3, 5, 7); }
    struct Channels {
        Channels(const LinearCall&, int) {}
    };
    static __m512 finish(const LinearCall&, int, const Channels&, const void* sums) { return _mm512_load_ps(sums); }
};

// Bytes that a block brings nearer while it computes: its share of the panels that come next. Without this every first
// block of a panel would wait for weights from the last-level cache, and with few rows there are not many others.
struct Ahead {
    const uint8_t* data = nullptr;
    int lines_per_step = 0;
};

// From the sums of a block to the output, row by row.
template <class Product, bool kTwoPanels, Epilogue kEpilogue>
void finish_tiles(const LinearCall& call, int row, int panel, int rows, const uint8_t (*sums)[1024]) {
    const typename Product::Channels first(call, panel), second(call, kTwoPanels ? panel + 1 : panel);
    const bool biased = call.bias != nullptr;
    const __m512 first_bias = biased ? _mm512_loadu_ps(call.bias + panel * kPanel) : _mm512_setzero_ps();
    const __m512 second_bias =
        biased && kTwoPanels ? _mm512_loadu_ps(call.bias + (panel + 1) * kPanel) : _mm512_setzero_ps();
    const int channel = kEpilogue == Epilogue::gated ? panel / 2 * kPanel : panel * kPanel;
    float* out = call.out + static_cast<size_t>(row) * call.out_stride + channel;
    for (int r = 0; r < rows; ++r, out += call.out_stride) {
        const uint8_t* source = sums[r / 16 * 2] + r % 16 * kTileBytes;
        __m512 a = _mm512_add_ps(Product::finish(call, row + r, first, source), first_bias), b = _mm512_setzero_ps();
        if constexpr (kTwoPanels) b = _mm512_add_ps(Product::finish(call, row + r, second, source + 1024), second_bias);
        if constexpr (kEpilogue == Epilogue::gated) {
            _mm512_storeu_ps(out, _mm512_mul_ps(silu_512(a), b));
            continue;
        }
        if constexpr (kEpilogue == Epilogue::add) {
            a = _mm512_add_ps(a, _mm512_loadu_ps(out));
            if constexpr (kTwoPanels) b = _mm512_add_ps(b, _mm512_loadu_ps(out + kPanel));
        }
        _mm512_storeu_ps(out, a);
        if constexpr (kTwoPanels) _mm512_storeu_ps(out + kPanel, b);
    }
}

// One block of up to 32 rows and two panels. Rows past the end are read (the row buffers are padded) and dropped.
template <class Product, bool kTwoRowTiles, bool kTwoPanels>
void amx_block(const LinearCall& call, const uint8_t* panels, int row, int panel, Ahead ahead) {
    const Linear& weight = *call.weight;
    using Value = typename Product::Value;
    const size_t a_stride = call.rows->stride * sizeof(Value);
    const uint8_t* a0 = reinterpret_cast<const uint8_t*>(call.rows->template row<Value>(row));
    const uint8_t* a1 = a0 + kTileRows16 * a_stride;
    const size_t panel_size = static_cast<size_t>(weight.k_padded) * kPanel * sizeof(Value);
    const uint8_t* b0 = panels + static_cast<size_t>(panel - call.panel_begin) * panel_size;
    const uint8_t* b1 = b0 + panel_size;
    const int steps = weight.k_padded / Product::kInputs;
    _tile_zero(0);
    if constexpr (kTwoPanels) _tile_zero(1);
    if constexpr (kTwoRowTiles) _tile_zero(2);
    if constexpr (kTwoRowTiles && kTwoPanels) _tile_zero(3);
    for (int step = 0; step < steps; ++step) {
        for (int line = 0; line < ahead.lines_per_step; ++line, ahead.data += 64) {
            _mm_prefetch(reinterpret_cast<const char*>(ahead.data), _MM_HINT_T1);
        }
        _tile_loadd(4, a0 + step * kTileBytes, a_stride);
        _tile_loadd(6, b0 + step * 1024, kTileBytes);
        Product::multiply_top_left();
        if constexpr (kTwoPanels) {
            _tile_loadd(7, b1 + step * 1024, kTileBytes);
            Product::multiply_top_right();
        }
        if constexpr (kTwoRowTiles) {
            _tile_loadd(5, a1 + step * kTileBytes, a_stride);
            Product::multiply_bottom_left();
            if constexpr (kTwoPanels) Product::multiply_bottom_right();
        }
    }
    alignas(64) static thread_local uint8_t sums[4][1024];
    _tile_stored(0, sums[0], kTileBytes);
    if constexpr (kTwoPanels) _tile_stored(1, sums[1], kTileBytes);
    if constexpr (kTwoRowTiles) _tile_stored(2, sums[2], kTileBytes);
    if constexpr (kTwoRowTiles && kTwoPanels) _tile_stored(3, sums[3], kTileBytes);
    const int rows = std::min(kTwoRowTiles ? 32 : 16, call.row_end - row);
    switch (call.epilogue) {
        case Epilogue::store: finish_tiles<Product, kTwoPanels, Epilogue::store>(call, row, panel, rows, sums); return;
        case Epilogue::add: finish_tiles<Product, kTwoPanels, Epilogue::add>(call, row, panel, rows, sums); return;
        case Epilogue::gated: finish_tiles<Product, kTwoPanels, Epilogue::gated>(call, row, panel, rows, sums); return;
    }
}

template <class Product, bool kTwoPanels>
void amx_rows(const LinearCall& call, const uint8_t* panels, int panel) {
    const int blocks = (call.row_end - call.row_begin + 31) / 32;
    const int steps = call.weight->k_padded / Product::kInputs;
    Ahead ahead;
    if (panel + 4 <= call.panel_end) {
        ahead.data = panels + static_cast<size_t>(panel + 2 - call.panel_begin) * steps * 1024;
        ahead.lines_per_step = (32 + blocks - 1) / blocks;  // the next two panels have 32 lines a step
    }
    const size_t share = static_cast<size_t>(ahead.lines_per_step) * steps * 64;
    int row = call.row_begin;
    for (; row + 16 < call.row_end; row += 32) {
        amx_block<Product, true, kTwoPanels>(call, panels, row, panel, ahead);
        ahead.data += share;
    }
    if (row < call.row_end) amx_block<Product, false, kTwoPanels>(call, panels, row, panel, ahead);
}

// `panels` points at panel_begin's data.
template <class Product>
void amx_product(const LinearCall& call, const uint8_t* panels) {
    int panel = call.panel_begin;
    for (; panel + 2 <= call.panel_end; panel += 2) amx_rows<Product, true>(call, panels, panel);
    if (panel < call.panel_end) amx_rows<Product, false>(call, panels, panel);
}

inline void linear_amx(const LinearCall& call) {
    constexpr int kFewRows = 6;  // a vector tile is as fast up to here, and reads nothing twice
    const Linear& weight = *call.weight;
    const bool grouped = weight.format == Format::i8g || weight.format == Format::i4g;
    const bool wide = weight.format == Format::f32 || weight.format == Format::f16;
    if (wide || call.row_end - call.row_begin <= kFewRows || (grouped && call.rows->kind == RowKind::group_s8)) {
        linear_avx512(call);
        return;
    }
    const TileSession session;
    if (weight.format == Format::i8c) {
        amx_product<Int8Product>(call, weight.panel(call.panel_begin));
    } else if (weight.format == Format::bf16) {
        amx_product<Bf16Product>(call, weight.panel(call.panel_begin));
    } else {
        linear_widened(
            call, 2,
            [](const LinearCall& part, const uint16_t* panels) {
                amx_product<Bf16Product>(part, reinterpret_cast<const uint8_t*>(panels));
            },
            widen_panel_512);
    }
}

}  // namespace DSEEK_VARIANT
}  // namespace dseek
