// Scores of cells in bf16: cells laid out like the keys of a page, so that the products of attention serve here too.
#pragma once

#include <immintrin.h>

#include <algorithm>

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

// A cell's values are rounded as `pack_cells_512` rounds them, and met by all heads at once.
template <int kHeads>
void score_row_heads(const RowScoreCall& call, int first_head) {
    thread_local Scratch room;
    auto* query = reinterpret_cast<uint16_t*>(room.get(static_cast<size_t>(kHeads) * call.dim * 2 + 64));
    for (int head = 0; head < kHeads; ++head) {
        round_to_bf16(call.query + (first_head + head) * call.query_stride, call.dim, query + head * call.dim);
    }
    constexpr int kAhead = 8;  // cells lie apart, where the processor does not look ahead by itself
    for (int i = 0; i < call.count; ++i) {
        const float* cell = call.cells[i];
        const float* later = call.cells[std::min(i + kAhead, call.count - 1)];
        for (int at = 0; at < call.dim; at += 16) ask_for(later + at);
        __m512 sums[kHeads];
        for (int head = 0; head < kHeads; ++head) sums[head] = _mm512_setzero_ps();
        for (int at = 0; at < call.dim; at += 32) {
            const bool full = at + 32 <= call.dim;  // the last sixteen of a width that is no multiple of 32
            const __m512 low = _mm512_loadu_ps(cell + at),
                         high = full ? _mm512_loadu_ps(cell + at + 16) : _mm512_setzero_ps();
            const __m512bh values = _mm512_cvtne2ps_pbh(high, low);
            const __mmask32 there = full ? 0xffffffff : 0xffff;
            for (int head = 0; head < kHeads; ++head) {
                const __m512i inputs = _mm512_maskz_loadu_epi16(there, query + head * call.dim + at);
                sums[head] = _mm512_dpbf16_ps(sums[head], reinterpret_cast<__m512bh>(inputs), values);
            }
        }
        for (int head = 0; head < kHeads; ++head) *call.place(first_head + head, i) = _mm512_reduce_add_ps(sums[head]);
    }
}

inline void score_row_512(const RowScoreCall& call) {
    if (call.exact) {
        score_row(call);
        return;
    }
    int head = 0;
    for (; head + 4 <= call.num_heads; head += 4) score_row_heads<4>(call, head);
    switch (call.num_heads - head) {
        case 3: score_row_heads<3>(call, head); return;
        case 2: score_row_heads<2>(call, head); return;
        case 1: score_row_heads<1>(call, head); return;
        default: return;
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
