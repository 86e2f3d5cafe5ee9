// Linear kernels for AMX: 32 rows x 32 channels in four accumulator tiles, int8 and bf16.
//
// The packed panels are tiles as they stand: sixteen steps of a panel are 1 KiB in the order that a B tile wants.
// A pair of panels meets all rows of a chunk before the next pair comes. Long inputs are cut into parts, so that a
// part of the two panels stays in the first-level cache while the rows pass by; the sums wait in a buffer meanwhile.
// Scales, bias and the epilogue are applied by vectors.
#pragma once

#include <immintrin.h>

#include "../avx512/linear.h"
#include "tiles.h"

namespace dseek {
namespace DSEEK_VARIANT {

struct Int8Product {
    using Value = uint8_t;
    static constexpr int kInputs = 64;  // of one tile step

    template <int kSums, int kA, int kB>
    static void multiply() {
        multiply_int8_tiles<kSums, kA, kB>();
    }
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

    template <int kSums, int kA, int kB>
    static void multiply() {
        multiply_bf16_tiles<kSums, kA, kB>();
    }
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

constexpr int kBlockRows = 2 * kTileHeight;
constexpr int kChunkBlocks = 8;
constexpr size_t kChunkBytes = 1200 << 10;  // of activations: they and two pairs of panels fit a cache of 2 MiB
constexpr int kPartSteps = 8;               // of a part of the inputs: 16 KiB of two panels
constexpr int kLeastStepsToCut = 13;        // fewer stay in the cache as they are
constexpr int kLeastBlocksToCut = 3;        // with fewer rows a panel is not read often enough

struct alignas(64) BlockSums {
    uint8_t tiles[4][kTileBytes];  // row tile by row tile, in each panel by panel
};

// From the sums of a block to the output, row by row.
template <class Product, bool kTwoPanels, Epilogue kEpilogue>
void finish_rows(const LinearCall& call, int row, int panel, const BlockSums& sums) {
    const typename Product::Channels first(call, panel), second(call, kTwoPanels ? panel + 1 : panel);
    const bool biased = call.bias != nullptr;
    const __m512 first_bias = biased ? _mm512_loadu_ps(call.bias + panel * kPanel) : _mm512_setzero_ps();
    const __m512 second_bias =
        biased && kTwoPanels ? _mm512_loadu_ps(call.bias + (panel + 1) * kPanel) : _mm512_setzero_ps();
    const int channel = kEpilogue == Epilogue::gated ? panel / 2 * kPanel : panel * kPanel;
    const int rows = std::min(kBlockRows, call.row_end - row);
    float* out = call.out + static_cast<size_t>(row) * call.out_stride + channel;
    for (int r = 0; r < rows; ++r, out += call.out_stride) {
        const uint8_t* source = sums.tiles[r / kTileHeight * 2] + r % kTileHeight * kTileRowBytes;
        __m512 a = _mm512_add_ps(Product::finish(call, row + r, first, source), first_bias), b = _mm512_setzero_ps();
        if constexpr (kTwoPanels) {
            b = _mm512_add_ps(Product::finish(call, row + r, second, source + kTileBytes), second_bias);
        }
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

template <class Product, bool kTwoPanels>
void finish_block(const LinearCall& call, int row, int panel, const BlockSums& sums) {
    switch (call.epilogue) {
        case Epilogue::store: finish_rows<Product, kTwoPanels, Epilogue::store>(call, row, panel, sums); return;
        case Epilogue::add: finish_rows<Product, kTwoPanels, Epilogue::add>(call, row, panel, sums); return;
        case Epilogue::gated: finish_rows<Product, kTwoPanels, Epilogue::gated>(call, row, panel, sums); return;
    }
}

// A part of the inputs of one block: up to 32 rows and two panels. Rows past the end are read (the row buffers are
// padded) and dropped.
template <class Product, bool kTwoRowTiles, bool kTwoPanels>
void multiply_block(const uint8_t* rows, size_t row_bytes, const uint8_t* panel, size_t panel_size, int steps,
                    bool resume, BlockSums& sums, Ahead ahead) {
    const uint8_t* lower = rows + kTileHeight * row_bytes;
    if (resume) {
        load_tile<0>(sums.tiles[0], kTileRowBytes);
        if constexpr (kTwoPanels) load_tile<1>(sums.tiles[1], kTileRowBytes);
        if constexpr (kTwoRowTiles) load_tile<2>(sums.tiles[2], kTileRowBytes);
        if constexpr (kTwoRowTiles && kTwoPanels) load_tile<3>(sums.tiles[3], kTileRowBytes);
    } else {
        zero_tile<0>();
        if constexpr (kTwoPanels) zero_tile<1>();
        if constexpr (kTwoRowTiles) zero_tile<2>();
        if constexpr (kTwoRowTiles && kTwoPanels) zero_tile<3>();
    }
    for (int step = 0; step < steps; ++step) {
        for (int line = 0; line < ahead.lines_per_step; ++line, ahead.data += 64) {
            _mm_prefetch(reinterpret_cast<const char*>(ahead.data), _MM_HINT_T1);
        }
        load_tile<4>(rows + step * kTileRowBytes, row_bytes);
        load_tile<6>(panel + step * kTileBytes, kTileRowBytes);
        Product::template multiply<0, 4, 6>();
        if constexpr (kTwoPanels) {
            load_tile<7>(panel + panel_size + step * kTileBytes, kTileRowBytes);
            Product::template multiply<1, 4, 7>();
        }
        if constexpr (kTwoRowTiles) {
            load_tile<5>(lower + step * kTileRowBytes, row_bytes);
            Product::template multiply<2, 5, 6>();
            if constexpr (kTwoPanels) Product::template multiply<3, 5, 7>();
        }
    }
    store_tile<0>(sums.tiles[0], kTileRowBytes);
    if constexpr (kTwoPanels) store_tile<1>(sums.tiles[1], kTileRowBytes);
    if constexpr (kTwoRowTiles) store_tile<2>(sums.tiles[2], kTileRowBytes);
    if constexpr (kTwoRowTiles && kTwoPanels) store_tile<3>(sums.tiles[3], kTileRowBytes);
}

// One or two panels with all rows of a call that is one chunk.
template <class Product, bool kTwoPanels>
void multiply_panels(const LinearCall& call, const uint8_t* panels, int panel) {
    alignas(64) static thread_local BlockSums sums[kChunkBlocks];
    using Value = typename Product::Value;
    const int steps = call.weight->k_padded / Product::kInputs;
    const int blocks = (call.row_end - call.row_begin + kBlockRows - 1) / kBlockRows;
    const bool cut = steps >= kLeastStepsToCut && blocks >= kLeastBlocksToCut;
    const int parts = cut ? (steps + kPartSteps - 1) / kPartSteps : 1;
    const int part_steps = (steps + parts - 1) / parts;
    const size_t row_bytes = call.rows->stride * sizeof(Value);
    const size_t panel_size = static_cast<size_t>(steps) * kTileBytes;
    const uint8_t* weights = panels + static_cast<size_t>(panel - call.panel_begin) * panel_size;
    const auto* rows = reinterpret_cast<const uint8_t*>(call.rows->template row<Value>(call.row_begin));
    Ahead ahead;
    if (panel + 4 <= call.panel_end) {
        ahead.data = weights + 2 * panel_size;
        ahead.lines_per_step = (2 * kTileHeight + blocks - 1) / blocks;  // the next two panels have 32 lines a step
    }
    for (int begin = 0; begin < steps; begin += part_steps) {
        const int count = std::min(part_steps, steps - begin);
        const bool last = begin + count == steps;
        for (int block = 0; block < blocks; ++block) {
            const int row = block * kBlockRows;
            const uint8_t* source = rows + row * row_bytes + begin * kTileRowBytes;
            const uint8_t* part = weights + static_cast<size_t>(begin) * kTileBytes;
            if (call.row_begin + row + kTileHeight < call.row_end) {
                multiply_block<Product, true, kTwoPanels>(source, row_bytes, part, panel_size, count, begin > 0,
                                                          sums[block], ahead);
            } else {
                multiply_block<Product, false, kTwoPanels>(source, row_bytes, part, panel_size, count, begin > 0,
                                                           sums[block], ahead);
            }
            if (ahead.data != nullptr) ahead.data += static_cast<size_t>(ahead.lines_per_step) * count * 64;
            // A block's sums are finished while the tiles work on the next one.
            if (last && block > 0) {
                finish_block<Product, kTwoPanels>(call, call.row_begin + row - kBlockRows, panel, sums[block - 1]);
            }
        }
    }
    finish_block<Product, kTwoPanels>(call, call.row_begin + (blocks - 1) * kBlockRows, panel, sums[blocks - 1]);
}

// `panels` points at panel_begin's data.
template <class Product>
void multiply_tiles(const LinearCall& call, const uint8_t* panels) {
    const size_t row_bytes = call.rows->stride * sizeof(typename Product::Value);
    const int rows = call.row_end - call.row_begin;
    const int most = std::clamp(static_cast<int>(kChunkBytes / row_bytes) / kBlockRows, 1, kChunkBlocks) * kBlockRows;
    const int chunks = (rows + most - 1) / most;
    const int step = round_up((rows + chunks - 1) / chunks, kBlockRows);
    LinearCall chunk = call;
    for (chunk.row_begin = call.row_begin; chunk.row_begin < call.row_end; chunk.row_begin += step) {
        chunk.row_end = std::min(chunk.row_begin + step, call.row_end);
        int panel = call.panel_begin;
        for (; panel + 2 <= call.panel_end; panel += 2) multiply_panels<Product, true>(chunk, panels, panel);
        if (panel < call.panel_end) multiply_panels<Product, false>(chunk, panels, panel);
    }
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
    if (per_channel(weight.format)) {
        multiply_tiles<Int8Product>(call, weight.panel(call.panel_begin));
    } else if (weight.format == Format::bf16) {
        multiply_tiles<Bf16Product>(call, weight.panel(call.panel_begin));
    } else {
        linear_widened(
            call, 2,
            [](const LinearCall& part, const uint16_t* panels) {
                multiply_tiles<Bf16Product>(part, reinterpret_cast<const uint8_t*>(panels));
            },
            widen_panel_512);
    }
}

}  // namespace DSEEK_VARIANT
}  // namespace dseek
