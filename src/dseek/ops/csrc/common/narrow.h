// Rows of bf16 to floats and back, and a whole page of bf16 at once.
#pragma once

#include <bit>
#include <cstring>

#include "kernels.h"
#include "numbers.h"

namespace dseek {
namespace DSEEK_VARIANT {

inline void widen(const uint16_t* source, int count, float* out) {
    for (int i = 0; i < count; ++i) out[i] = bf16_to_float(source[i]);
}

// Rounds to nearest even without a branch, so that the compiler can take several at once; a NaN stays a NaN.
inline void narrow(const float* source, int count, uint16_t* out) {
    for (int i = 0; i < count; ++i) {
        const uint32_t bits = std::bit_cast<uint32_t>(source[i]);
        const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, kept = (bits >> 16) | 0x40u;
        out[i] = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? kept : rounded);
    }
}

inline void store_page(const CacheLayout& layout, uint8_t* page, const uint16_t* key, const uint16_t* value) {
    const int d = layout.head_dim;
    auto* keys = reinterpret_cast<uint16_t*>(page);
    auto* values = reinterpret_cast<uint16_t*>(page + layout.value_offset);
    for (int slot = 0; slot < kPageTokens; ++slot) {
        for (int i = 0; i < d; i += 2) {
            std::memcpy(keys + (static_cast<size_t>(i / 2) * kPageTokens + slot) * 2, key + slot * d + i, 4);
        }
    }
    for (int slot = 0; slot < kPageTokens; slot += 2) {
        for (int i = 0; i < d; ++i) {
            values[(slot / 2 * d + i) * 2] = value[slot * d + i];
            values[(slot / 2 * d + i) * 2 + 1] = value[(slot + 1) * d + i];
        }
    }
}

}  // namespace DSEEK_VARIANT
}  // namespace dseek
