// Element by element reductions of what several ranks hold, always in the order of the ranks.
//
// Plain loops over tiles that stay in the first cache, so that the compiler vectorises them for each variant. There is
// no multiplication followed by an addition, hence nothing to contract: every variant computes the same bits.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "kernels.h"
#include "numbers.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace dseek {
namespace DSEEK_VARIANT {

constexpr size_t kReduceTile = 512;

// How an element is stored and what it is computed in: 16-bit floats are widened, summed, and rounded once.
struct StoredBf16 {
    using Stored = uint16_t;
    using Wide = float;
    static void widen(const Stored* source, size_t count, Wide* out) {
        for (size_t i = 0; i < count; ++i) out[i] = bf16_to_float(source[i]);
    }
    static void narrow(const Wide* source, size_t count, Stored* out) {
        for (size_t i = 0; i < count; ++i) {
            const uint32_t bits = std::bit_cast<uint32_t>(source[i]);
            const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, kept = (bits >> 16) | 0x40u;
            out[i] = static_cast<Stored>((bits & 0x7fffffffu) > 0x7f800000u ? kept : rounded);
        }
    }
};

struct StoredHalf {
    using Stored = uint16_t;
    using Wide = float;
    static void widen(const Stored* source, size_t count, Wide* out) {
        size_t i = 0;
#if defined(__F16C__)
        for (; i + 8 <= count; i += 8) {
            _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i))));
        }
#endif
        for (; i < count; ++i) out[i] = half_to_float(source[i]);
    }
    static void narrow(const Wide* source, size_t count, Stored* out) {
        size_t i = 0;
#if defined(__F16C__)
        for (; i + 8 <= count; i += 8) {
            _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i),
                             _mm256_cvtps_ph(_mm256_loadu_ps(source + i), _MM_FROUND_TO_NEAREST_INT));
        }
#endif
        for (; i < count; ++i) out[i] = float_to_half(source[i]);
    }
};

template <class T>
struct StoredPlain {
    using Stored = T;
    using Wide = T;
    static void widen(const Stored* source, size_t count, Wide* out) { std::memcpy(out, source, count * sizeof(T)); }
    static void narrow(const Wide* source, size_t count, Stored* out) { std::memcpy(out, source, count * sizeof(T)); }
};

// Integers wrap around: sums and products are taken in the unsigned type, wide enough not to be promoted to int.
struct TakeSum {
    template <class T>
    static T apply(T a, T b) {
        if constexpr (std::is_integral_v<T>) return static_cast<T>(static_cast<uint64_t>(a) + static_cast<uint64_t>(b));
        else return a + b;
    }
};

struct TakeProduct {
    template <class T>
    static T apply(T a, T b) {
        if constexpr (std::is_integral_v<T>) return static_cast<T>(static_cast<uint64_t>(a) * static_cast<uint64_t>(b));
        else return a * b;
    }
};

// A NaN of either side is the result.
struct TakeLeast {
    template <class T>
    static T apply(T a, T b) {
        return (a < b) | (a != a) ? a : b;
    }
};

struct TakeGreatest {
    template <class T>
    static T apply(T a, T b) {
        return (a > b) | (a != a) ? a : b;
    }
};

struct TakeAnd {
    template <class T>
    static T apply(T a, T b) {
        return static_cast<T>(a & b);
    }
};

struct TakeOr {
    template <class T>
    static T apply(T a, T b) {
        return static_cast<T>(a | b);
    }
};

struct TakeXor {
    template <class T>
    static T apply(T a, T b) {
        return static_cast<T>(a ^ b);
    }
};

template <class Kind, class Take>
void reduce_tiles(const ReduceCall& call) {
    using Stored = typename Kind::Stored;
    using Wide = typename Kind::Wide;
    alignas(64) Wide sum[kReduceTile], next[kReduceTile];
    for (size_t begin = 0; begin < call.count; begin += kReduceTile) {
        const size_t count = std::min(kReduceTile, call.count - begin);
        Kind::widen(static_cast<const Stored*>(call.sources[0]) + begin, count, sum);
        for (int source = 1; source < call.num_sources; ++source) {
            const Stored* stored = static_cast<const Stored*>(call.sources[source]) + begin;
            if constexpr (std::is_same_v<Stored, Wide>) {
                for (size_t i = 0; i < count; ++i) sum[i] = Take::apply(sum[i], stored[i]);
            } else {
                Kind::widen(stored, count, next);
                for (size_t i = 0; i < count; ++i) sum[i] = Take::apply(sum[i], next[i]);
            }
        }
        if constexpr (std::is_floating_point_v<Wide>) {
            if (call.reduction == Reduction::average) {
                const Wide divisor = static_cast<Wide>(call.num_sources);
                for (size_t i = 0; i < count; ++i) sum[i] = sum[i] / divisor;
            }
        }
        for (int out = 0; out < call.num_outs; ++out) {
            Kind::narrow(sum, count, static_cast<Stored*>(call.outs[out]) + begin);
        }
    }
}

template <class Kind>
void reduce_kind(const ReduceCall& call) {
    switch (call.reduction) {
        case Reduction::sum:
        case Reduction::average: return reduce_tiles<Kind, TakeSum>(call);
        case Reduction::product: return reduce_tiles<Kind, TakeProduct>(call);
        case Reduction::least: return reduce_tiles<Kind, TakeLeast>(call);
        case Reduction::greatest: return reduce_tiles<Kind, TakeGreatest>(call);
        default: break;
    }
    if constexpr (std::is_integral_v<typename Kind::Wide>) {
        if (call.reduction == Reduction::bit_and) return reduce_tiles<Kind, TakeAnd>(call);
        if (call.reduction == Reduction::bit_or) return reduce_tiles<Kind, TakeOr>(call);
        if (call.reduction == Reduction::bit_xor) return reduce_tiles<Kind, TakeXor>(call);
    }
}

inline void reduce(const ReduceCall& call) {
    switch (call.element) {
        case Element::float32: return reduce_kind<StoredPlain<float>>(call);
        case Element::float64: return reduce_kind<StoredPlain<double>>(call);
        case Element::bfloat16: return reduce_kind<StoredBf16>(call);
        case Element::float16: return reduce_kind<StoredHalf>(call);
        case Element::int8: return reduce_kind<StoredPlain<int8_t>>(call);
        case Element::uint8: return reduce_kind<StoredPlain<uint8_t>>(call);
        case Element::int16: return reduce_kind<StoredPlain<int16_t>>(call);
        case Element::int32: return reduce_kind<StoredPlain<int32_t>>(call);
        case Element::int64: return reduce_kind<StoredPlain<int64_t>>(call);
    }
}

}  // namespace DSEEK_VARIANT
}  // namespace dseek
