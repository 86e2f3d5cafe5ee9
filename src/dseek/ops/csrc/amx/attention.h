// Attention of many rows with AMX tiles: the products of a strip of sixteen queries with a page, and nothing else.
#pragma once

#include <immintrin.h>

#include "../avx512/attention.h"
#include "tiles.h"

namespace dseek {
namespace DSEEK_VARIANT {

// For head widths of 32 * kWidth. The sums of 32 columns are two tiles, of 64 four: enough for the tile unit to work on
// one while the others wait for their last product.
template <int kWidth>
struct StripTiles {
    static constexpr int kDim = 32 * kWidth;

    using Session = TileSession;

    explicit StripTiles(int) {}

    // scores [16][64] = query [16][d] x keys [d / 2][64][2].
    static void score(const Strip& strip, const uint16_t* keys, float* scores) {
        constexpr size_t kQueryRow = kDim * 2, kKeyRow = kPageTokens * 4, kScoreRow = kPageTokens * 4;
        zero_tile<0>();
        zero_tile<1>();
        zero_tile<2>();
        zero_tile<3>();
        for (int step = 0; step < kWidth; ++step) {
            const uint16_t* part = keys + step * 16 * kPageTokens * 2;
            load_tile<4>(strip.query + step * 32, kQueryRow);
            load_tile<5>(part, kKeyRow);
            multiply_bf16_tiles<0, 4, 5>();
            load_tile<6>(part + 32, kKeyRow);
            multiply_bf16_tiles<1, 4, 6>();
            load_tile<7>(part + 64, kKeyRow);
            multiply_bf16_tiles<2, 4, 7>();
            load_tile<5>(part + 96, kKeyRow);
            multiply_bf16_tiles<3, 4, 5>();
        }
        store_tile<0>(scores, kScoreRow);
        store_tile<1>(scores + 16, kScoreRow);
        store_tile<2>(scores + 32, kScoreRow);
        store_tile<3>(scores + 48, kScoreRow);
    }

    // out [16][d] += weights [16][64] x values [32][d][2], 32 channels at a time.
    static void add_output(const Strip& strip, const uint16_t* weights, const uint16_t* values) {
        constexpr size_t kWeightRow = kPageTokens * 2, kValueRow = kDim * 4, kOutRow = kDim * 4;
        const uint16_t* later = values + 16 * kDim * 2;  // of the page's keys
        load_tile<6>(weights, kWeightRow);
        load_tile<7>(weights + 32, kWeightRow);
        for (int column = 0; column < kDim; column += 32) {
            load_tile<0>(strip.out + column, kOutRow);
            load_tile<4>(values + column * 2, kValueRow);
            multiply_bf16_tiles<0, 6, 4>();
            load_tile<1>(strip.out + column + 16, kOutRow);
            load_tile<5>(values + column * 2 + 32, kValueRow);
            multiply_bf16_tiles<1, 6, 5>();
            load_tile<4>(later + column * 2, kValueRow);
            multiply_bf16_tiles<0, 7, 4>();
            load_tile<5>(later + column * 2 + 32, kValueRow);
            multiply_bf16_tiles<1, 7, 5>();
            store_tile<0>(strip.out + column, kOutRow);
            store_tile<1>(strip.out + column + 16, kOutRow);
        }
    }
};

inline void attention_amx(const AttentionCall& call) {
    attention_512(call, 3, [](const AttentionCall& many) {
        switch (many.layout->head_dim) {
            case 32: attention_strips<StripTiles<1>>(many); return;
            case 64: attention_strips<StripTiles<2>>(many); return;
            case 96: attention_strips<StripTiles<3>>(many); return;
            case 128: attention_strips<StripTiles<4>>(many); return;
            default: attention_strips<StripVectors>(many); return;
        }
    });
}

}  // namespace DSEEK_VARIANT
}  // namespace dseek
