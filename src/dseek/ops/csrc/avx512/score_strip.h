// Scores of cells in bf16: cells laid out like the keys of a page, so that the products of attention serve here too.
#pragma once

#include <immintrin.h>

#include "../common/open_cells.h"
#include "attention_page.h"
#include "cache.h"

namespace dseek {
namespace DSEEK_VARIANT {

inline void pack_cells_512(const float* const* cells, int count, int dim, bool exact, void* page) {
    if (exact) {
        pack_cells(cells, count, dim, exact, page);
        return;
    }
    auto* keys = static_cast<uint16_t*>(page);
    for (int slot = 0; slot < kPageTokens; slot += 16) {
        for (int i = 0; i < dim; i += 32) {
            const bool full = i + 32 <= dim;  // a width that is no multiple of 32 leaves eight pairs empty
            __m512i pairs[16];
            for (int cell = 0; cell < 16; ++cell) {
                pairs[cell] = _mm512_setzero_si512();
                if (slot + cell >= count) continue;
                const float* source = cells[slot + cell] + i;
                const __m512 low = _mm512_loadu_ps(source),
                             high = full ? _mm512_loadu_ps(source + 16) : _mm512_setzero_ps();
                pairs[cell] = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
            }
            transpose16(pairs);
            for (int pair = 0; pair < (full ? 16 : 8); ++pair) {
                _mm512_storeu_si512(keys + (static_cast<size_t>(i / 2 + pair) * kPageTokens + slot) * 2, pairs[pair]);
            }
        }
    }
}

// `multiply(query, keys, scores)` forms scores [16][64] of bf16 queries [16][dim] and one page.
template <class Multiply>
void score_strip_bf16(const float* query, int dim, const void* pages, int num_pages, float* scores,
                      const Multiply& multiply) {
    thread_local Scratch room;
    auto* rounded = reinterpret_cast<uint16_t*>(room.get(static_cast<size_t>(kStripRows) * dim * 2));
    round_to_bf16(query, kStripRows * dim, rounded);
    const auto* keys = static_cast<const uint16_t*>(pages);
    for (int page = 0; page < num_pages; ++page) {
        multiply(rounded, keys + static_cast<size_t>(page) * dim * kPageTokens * 2,
                 scores + static_cast<size_t>(page) * kStripRows * kPageTokens);
    }
}

inline void score_strip_avx512(const float* query, int dim, bool exact, const void* pages, int num_pages,
                               float* scores) {
    if (exact) {
        score_strip(query, dim, exact, pages, num_pages, scores);
        return;
    }
    score_strip_bf16(query, dim, pages, num_pages, scores, [&](uint16_t* rows, const uint16_t* keys, float* out) {
        multiply_strip(rows, dim, keys, kPageTokens * 2, dim / 2, out, kPageTokens, kPageTokens, false);
    });
}

}  // namespace DSEEK_VARIANT
}  // namespace dseek
