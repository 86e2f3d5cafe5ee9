// Products of a strip of sixteen queries with AMX tiles; everything else is the AVX-512 attention.
#pragma once

#include <immintrin.h>

#include "../avx512/attention.h"
#include "linear.h"

namespace dseek {
namespace DSEEK_VARIANT {

struct MultiplyTiles {
    using Session = TileSession;

    template <int kTiles>
    static void columns(const uint16_t* a, size_t a_stride, const uint16_t* b, size_t b_stride, int steps, float* c,
                        size_t c_stride, bool accumulate) {
        const auto tile_c = [&](int tile) { return c + tile * 16; };
        if (accumulate) {
            _tile_loadd(0, tile_c(0), c_stride * 4);
            if constexpr (kTiles > 1) _tile_loadd(1, tile_c(1), c_stride * 4);
            if constexpr (kTiles > 2) _tile_loadd(2, tile_c(2), c_stride * 4);
            if constexpr (kTiles > 3) _tile_loadd(3, tile_c(3), c_stride * 4);
        } else {
            _tile_zero(0);
            if constexpr (kTiles > 1) _tile_zero(1);
            if constexpr (kTiles > 2) _tile_zero(2);
            if constexpr (kTiles > 3) _tile_zero(3);
        }
        for (int step = 0; step < steps; step += 16) {
            const uint16_t* rows = b + step * b_stride;
            _tile_loadd(4, a + step * 2, a_stride * 2);
            _tile_loadd(5, rows, b_stride * 2);
            _tile_dpbf16ps(0, 4, 5);
            if constexpr (kTiles > 1) {
                _tile_loadd(6, rows + 32, b_stride * 2);
                _tile_dpbf16ps(1, 4, 6);
            }
            if constexpr (kTiles > 2) {
                _tile_loadd(7, rows + 64, b_stride * 2);
                _tile_dpbf16ps(2, 4, 7);
            }
            if constexpr (kTiles > 3) {
                _tile_loadd(5, rows + 96, b_stride * 2);
                _tile_dpbf16ps(3, 4, 5);
            }
        }
        _tile_stored(0, tile_c(0), c_stride * 4);
        if constexpr (kTiles > 1) _tile_stored(1, tile_c(1), c_stride * 4);
        if constexpr (kTiles > 2) _tile_stored(2, tile_c(2), c_stride * 4);
        if constexpr (kTiles > 3) _tile_stored(3, tile_c(3), c_stride * 4);
    }

    static void strip(const uint16_t* a, size_t a_stride, const uint16_t* b, size_t b_stride, int steps, float* c,
                      size_t c_stride, int columns_wanted, bool accumulate) {
        if (steps % 16 != 0) {  // head widths that are no multiple of 32 do not fill a tile
            Multiply512::strip(a, a_stride, b, b_stride, steps, c, c_stride, columns_wanted, accumulate);
            return;
        }
        int column = 0;
        for (; column + 64 <= columns_wanted; column += 64) {
            columns<4>(a, a_stride, b + column * 2, b_stride, steps, c + column, c_stride, accumulate);
        }
        for (; column + 32 <= columns_wanted; column += 32) {
            columns<2>(a, a_stride, b + column * 2, b_stride, steps, c + column, c_stride, accumulate);
        }
        for (; column < columns_wanted; column += 16) {
            columns<1>(a, a_stride, b + column * 2, b_stride, steps, c + column, c_stride, accumulate);
        }
    }
};

}  // namespace DSEEK_VARIANT
}  // namespace dseek
