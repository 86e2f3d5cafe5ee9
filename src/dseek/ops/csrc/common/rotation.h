// The Hadamard rotation that makes per-row int8 accurate, shared by weights (at packing) and activations (at run time).
//
// A few inputs of a transformer are tens of times larger than the rest, and one int8 scale a row then leaves little
// resolution for the others. Rotating inputs and weights by the same orthogonal matrix leaves every product as it was
// and spreads the outliers (Ashkboos et al. 2024, QuaRot, section 4). The matrix is block diagonal, chosen so that its
// transform is mostly additions between registers: the row is cut into runs of 2^p registers of sixteen values, the
// longest first, and each run is multiplied by the Hadamard matrix of size 2^p across its registers and by that of size
// 16 across their lanes, which together are the Hadamard matrix of the whole run.
#pragma once

#include <cmath>

#include "vec.h"

namespace dseek {
namespace DSEEK_VARIANT {

constexpr int kRotationRegisters = 64;

// Butterflies between the registers of one run, from `source` to x; unnormalised. Two stages at a time halve the passes
// over memory.
inline void hadamard_registers(const float* source, float* x, int num_registers) {
    int half = 1;
    if (num_registers >= 4) {
        for (int i = 0; i < num_registers; i += 4) {
            const f32x16 a = load(source + i * 16), b = load(source + i * 16 + 16);
            const f32x16 c = load(source + i * 16 + 32), d = load(source + i * 16 + 48);
            const f32x16 s = a + b, t = a - b, u = c + d, v = c - d;
            store(x + i * 16, s + u);
            store(x + i * 16 + 16, t + v);
            store(x + i * 16 + 32, s - u);
            store(x + i * 16 + 48, t - v);
        }
        half = 4;
    } else if (source != x) {
        std::memcpy(x, source, static_cast<size_t>(num_registers) * 64);
    }
    for (; half * 4 <= num_registers; half *= 4) {
        for (int start = 0; start < num_registers; start += 4 * half) {
            for (int i = start; i < start + half; ++i) {
                float* p = x + i * 16;
                const f32x16 a = load(p), b = load(p + half * 16), c = load(p + half * 32), d = load(p + half * 48);
                const f32x16 s = a + b, t = a - b, u = c + d, v = c - d;
                store(p, s + u);
                store(p + half * 16, t + v);
                store(p + half * 32, s - u);
                store(p + half * 48, t - v);
            }
        }
    }
    if (half < num_registers) {
        for (int i = 0; i < half; ++i) {
            const f32x16 a = load(x + i * 16), b = load(x + (half + i) * 16);
            store(x + i * 16, a + b);
            store(x + (half + i) * 16, a - b);
        }
    }
}

// The 16-point Hadamard matrix across the lanes of one register; unnormalised.
inline f32x16 hadamard_lanes(f32x16 x) {
    alignas(64) static constexpr float kSign1[16] = {1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1};
    alignas(64) static constexpr float kSign2[16] = {1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1};
    alignas(64) static constexpr float kSign4[16] = {1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1};
    alignas(64) static constexpr float kSign8[16] = {1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1, -1};
    x = x * load(kSign1) + swap_lanes<1>(x);
    x = x * load(kSign2) + swap_lanes<2>(x);
    x = x * load(kSign4) + swap_lanes<4>(x);
    return x * load(kSign8) + swap_lanes<8>(x);
}

// Rotates `size` values from `source` to x, which may be the same; `size` is a multiple of 16.
inline void rotate(const float* source, float* x, int size) {
    int done = 0;
    while (done < size) {
        const int left = (size - done) / 16;
        int run = 1;
        while (run * 2 <= left && run * 2 <= kRotationRegisters) run *= 2;
        float* start = x + done;
        hadamard_registers(source + done, start, run);
        const float norm = 1.f / std::sqrt(static_cast<float>(run * 16));
        for (int i = 0; i < run; ++i) store(start + i * 16, hadamard_lanes(load(start + i * 16)) * norm);
        done += run * 16;
    }
}

inline void rotate(float* x, int size) { rotate(x, x, size); }

}  // namespace DSEEK_VARIANT
}  // namespace dseek
