// AMX tile instructions with register numbers as template arguments, and the session they need.
//
// Written as assembly, not with GCC's intrinsics: those do not tell the compiler that a tile is loaded from memory, so
// that stores to a buffer just before could be moved or dropped.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dseek {
namespace DSEEK_VARIANT {

constexpr int kTileHeight = 16;
constexpr int kTileRowBytes = 64;
constexpr int kTileBytes = kTileHeight * kTileRowBytes;

template <int kTile>
[[gnu::always_inline]] inline void load_tile(const void* source, size_t stride_bytes) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(source), "r"(stride_bytes), "i"(kTile) : "memory");
}

template <int kTile>
[[gnu::always_inline]] inline void store_tile(void* target, size_t stride_bytes) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(target), "r"(stride_bytes), "i"(kTile) : "memory");
}

template <int kTile>
[[gnu::always_inline]] inline void zero_tile() {
    __asm__ volatile("tilezero %%tmm%c0" : : "i"(kTile));
}

// sums += a x b in bf16, sixteen rows by sixteen columns over 32 inputs.
template <int kSums, int kA, int kB>
[[gnu::always_inline]] inline void multiply_bf16_tiles() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSums), "i"(kA), "i"(kB));
}

// sums += a x b with unsigned a and signed b, over 64 inputs.
template <int kSums, int kA, int kB>
[[gnu::always_inline]] inline void multiply_int8_tiles() {
    __asm__ volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSums), "i"(kA), "i"(kB));
}

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
            config.row_bytes[tile] = kTileRowBytes;
            config.rows[tile] = kTileHeight;
        }
        // Not _tile_loadconfig: GCC 12 declares that it reads eight of the 64 bytes, and may drop the stores to the
        // rest.
        __asm__ volatile("ldtilecfg %0" : : "m"(config));
    }
    ~TileSession() { __asm__ volatile("tilerelease"); }
    TileSession(const TileSession&) = delete;
    TileSession& operator=(const TileSession&) = delete;
};

}  // namespace DSEEK_VARIANT
}  // namespace dseek
