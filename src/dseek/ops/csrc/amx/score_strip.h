// Scores of cells with AMX tiles.
#pragma once

#include "../avx512/score_strip.h"
#include "attention.h"

namespace dseek {
namespace DSEEK_VARIANT {

template <int kWidth>
void score_strip_tiles(const float* query, const void* pages, int num_pages, float* scores) {
    const TileSession session;
    score_strip_bf16(query, 32 * kWidth, pages, num_pages, scores,
                     [](uint16_t* rows, const uint16_t* keys, float* out) {
                         StripTiles<kWidth>::score({rows, nullptr, nullptr, nullptr}, keys, out);
                     });
}

inline void score_strip_amx(const float* query, int dim, bool exact, const void* pages, int num_pages, float* scores) {
    switch (exact ? 0 : dim) {
        case 32: score_strip_tiles<1>(query, pages, num_pages, scores); return;
        case 64: score_strip_tiles<2>(query, pages, num_pages, scores); return;
        case 96: score_strip_tiles<3>(query, pages, num_pages, scores); return;
        case 128: score_strip_tiles<4>(query, pages, num_pages, scores); return;
        case 160: score_strip_tiles<5>(query, pages, num_pages, scores); return;
        default: score_strip_avx512(query, dim, exact, pages, num_pages, scores);
    }
}

}  // namespace DSEEK_VARIANT
}  // namespace dseek
