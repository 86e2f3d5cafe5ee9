// Sixteen 32-bit lanes as one value: `f32x16`, `i32x16` and `u32x16` with the arithmetic that kernels need.
//
// With AVX-512 a value is one register and the compiler's own vector type. Elsewhere it is two or four registers as
// members of a struct: GCC lowers a vector type that is wider than the machine's registers through the stack, which
// made portable kernels ten to thirty times slower than this.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace dseek {
namespace DSEEK_VARIANT {

#if defined(__AVX512F__)

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));

// Less nothing: adding nothing would have to turn -0 into 0, at the cost of an addition.
inline f32x16 splat(float value) { return value - f32x16{}; }
inline f32x16 select(i32x16 mask, f32x16 yes, f32x16 no) { return mask ? yes : no; }
inline f32x16 to_float(i32x16 value) { return __builtin_convertvector(value, f32x16); }
inline i32x16 to_int(f32x16 value) { return __builtin_convertvector(value, i32x16); }
inline f32x16 as_float(u32x16 bits) { return reinterpret_cast<f32x16>(bits); }
inline u32x16 as_bits(f32x16 value) { return reinterpret_cast<u32x16>(value); }

// Lane i of the result is lane i ^ kDistance, for a distance of 1, 2, 4 or 8.
template <int kDistance>
inline f32x16 swap_lanes(f32x16 value) {
    i32x16 order;
    for (int lane = 0; lane < 16; ++lane) order[lane] = lane ^ kDistance;
    return __builtin_shuffle(value, order);
}

#else

#if defined(__AVX2__)
constexpr int kRegisterBytes = 32;
#else
constexpr int kRegisterBytes = 16;
#endif

template <class T>
struct Lanes {
    typedef T Part __attribute__((vector_size(kRegisterBytes)));
#if defined(__AVX2__)
    Part a, b;
#else
    Part a, b, c, d;
#endif

    T operator[](int lane) const {
        T values[16];
        std::memcpy(values, this, sizeof values);
        return values[lane];
    }
};

using f32x16 = Lanes<float>;
using i32x16 = Lanes<int32_t>;
using u32x16 = Lanes<uint32_t>;

// Applies `f` register by register.
template <class R, class F, class... X>
[[gnu::always_inline]] inline Lanes<R> each(const F& f, const X&... x) {
#if defined(__AVX2__)
    return {f(x.a...), f(x.b...)};
#else
    return {f(x.a...), f(x.b...), f(x.c...), f(x.d...)};
#endif
}

// Less nothing: adding nothing would have to turn -0 into 0, at the cost of an addition.
template <class T>
[[gnu::always_inline]] inline Lanes<T> fill(T value) {
    return each<T>([value](auto zero) { return value - zero; }, Lanes<T>{});
}

// One operator between two values, and between a value and a number.
#define DSEEK_LANES_OPERATOR(sign, Result)                                                                    \
    template <class T>                                                                                        \
    [[gnu::always_inline]] inline Lanes<Result> operator sign(const Lanes<T>& x, const Lanes<T>& y) {         \
        return each<Result>([](auto p, auto q) { return p sign q; }, x, y);                                   \
    }                                                                                                         \
    template <class T>                                                                                        \
    [[gnu::always_inline]] inline Lanes<Result> operator sign(const Lanes<T>& x, std::type_identity_t<T> y) { \
        return x sign fill<T>(y);                                                                             \
    }
#define DSEEK_LANES_ASSIGNMENT(sign)                                                       \
    template <class T, class Y>                                                            \
    [[gnu::always_inline]] inline Lanes<T>& operator sign## = (Lanes<T> & x, const Y& y) { \
        return x = x sign y;                                                               \
    }
DSEEK_LANES_OPERATOR(+, T)
DSEEK_LANES_OPERATOR(-, T)
DSEEK_LANES_OPERATOR(*, T)
DSEEK_LANES_OPERATOR(/, T)
DSEEK_LANES_OPERATOR(&, T)
DSEEK_LANES_OPERATOR(^, T)
DSEEK_LANES_OPERATOR(>, int32_t)
DSEEK_LANES_OPERATOR(<, int32_t)
DSEEK_LANES_OPERATOR(>=, int32_t)
DSEEK_LANES_OPERATOR(<=, int32_t)
DSEEK_LANES_OPERATOR(==, int32_t)
DSEEK_LANES_ASSIGNMENT(+)
DSEEK_LANES_ASSIGNMENT(-)
DSEEK_LANES_ASSIGNMENT(*)
DSEEK_LANES_ASSIGNMENT(^)
#undef DSEEK_LANES_OPERATOR
#undef DSEEK_LANES_ASSIGNMENT

[[gnu::always_inline]] inline f32x16 operator-(const f32x16& x) {
    return each<float>([](auto p) { return -p; }, x);
}
template <class T>
[[gnu::always_inline]] inline Lanes<T> operator<<(const Lanes<T>& x, int bits) {
    return each<T>([bits](auto p) { return p << bits; }, x);
}
template <class T>
[[gnu::always_inline]] inline Lanes<T> operator>>(const Lanes<T>& x, int bits) {
    return each<T>([bits](auto p) { return p >> bits; }, x);
}
inline f32x16 splat(float value) { return fill<float>(value); }
[[gnu::always_inline]] inline f32x16 select(const i32x16& mask, const f32x16& yes, const f32x16& no) {
    return each<float>([](auto m, auto p, auto q) { return m ? p : q; }, mask, yes, no);
}
[[gnu::always_inline]] inline f32x16 to_float(const i32x16& value) {
    return each<float>([](auto p) { return __builtin_convertvector(p, f32x16::Part); }, value);
}
[[gnu::always_inline]] inline i32x16 to_int(const f32x16& value) {
    return each<int32_t>([](auto p) { return __builtin_convertvector(p, i32x16::Part); }, value);
}
[[gnu::always_inline]] inline f32x16 as_float(const u32x16& bits) {
    return each<float>([](auto p) { return reinterpret_cast<f32x16::Part>(p); }, bits);
}
[[gnu::always_inline]] inline u32x16 as_bits(const f32x16& value) {
    return each<uint32_t>([](auto p) { return reinterpret_cast<u32x16::Part>(p); }, value);
}

// Lane i of the result is lane i ^ kDistance, for a distance of 1, 2, 4 or 8.
template <int kDistance>
inline f32x16 swap_lanes(const f32x16& value) {
    constexpr int kLanes = kRegisterBytes / 4;
    if constexpr (kDistance < kLanes) {
        i32x16::Part order;
        for (int lane = 0; lane < kLanes; ++lane) order[lane] = lane ^ kDistance;
        return each<float>([order](auto p) { return __builtin_shuffle(p, order); }, value);
#if defined(__AVX2__)
    } else {
        return {value.b, value.a};
    }
#else
    } else if constexpr (kDistance == kLanes) {
        return {value.b, value.a, value.d, value.c};
    } else {
        return {value.c, value.d, value.a, value.b};
    }
#endif
}

#endif

// Lanes from and to any address. Register by register, since copies of a whole struct go through smaller registers.
template <class V>
[[gnu::always_inline]] inline V load_as(const void* source) {
    V value;
#if defined(__AVX512F__)
    std::memcpy(&value, source, sizeof value);
#else
    const auto* bytes = static_cast<const char*>(source);
    std::memcpy(&value.a, bytes, kRegisterBytes);
    std::memcpy(&value.b, bytes + kRegisterBytes, kRegisterBytes);
#if !defined(__AVX2__)
    std::memcpy(&value.c, bytes + 2 * kRegisterBytes, kRegisterBytes);
    std::memcpy(&value.d, bytes + 3 * kRegisterBytes, kRegisterBytes);
#endif
#endif
    return value;
}

template <class V>
[[gnu::always_inline]] inline void store_as(void* target, const V& value) {
#if defined(__AVX512F__)
    std::memcpy(target, &value, sizeof value);
#else
    auto* bytes = static_cast<char*>(target);
    std::memcpy(bytes, &value.a, kRegisterBytes);
    std::memcpy(bytes + kRegisterBytes, &value.b, kRegisterBytes);
#if !defined(__AVX2__)
    std::memcpy(bytes + 2 * kRegisterBytes, &value.c, kRegisterBytes);
    std::memcpy(bytes + 3 * kRegisterBytes, &value.d, kRegisterBytes);
#endif
#endif
}

[[gnu::always_inline]] inline f32x16 load(const float* source) { return load_as<f32x16>(source); }
[[gnu::always_inline]] inline i32x16 load(const int32_t* source) { return load_as<i32x16>(source); }
[[gnu::always_inline]] inline void store(float* target, const f32x16& value) { store_as(target, value); }
[[gnu::always_inline]] inline void store(int32_t* target, const i32x16& value) { store_as(target, value); }

inline f32x16 max(f32x16 a, f32x16 b) { return select(a > b, a, b); }
inline f32x16 min(f32x16 a, f32x16 b) { return select(a < b, a, b); }

inline float sum(f32x16 value) {
#if defined(__AVX512F__)
    float total = 0.f;
    for (int lane = 0; lane < 16; ++lane) total += value[lane];
    return total;
#elif defined(__AVX2__)
    const auto half = value.a + value.b;
    float lanes[8];
    std::memcpy(lanes, &half, sizeof lanes);
    return ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) + ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7]));
#else
    const auto part = (value.a + value.b) + (value.c + value.d);
    return (part[0] + part[1]) + (part[2] + part[3]);
#endif
}

inline float largest_lane(f32x16 value) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps(reinterpret_cast<__m512>(value));
#else
    value = max(value, swap_lanes<8>(value));
    value = max(value, swap_lanes<4>(value));
    value = max(value, swap_lanes<2>(value));
    return max(value, swap_lanes<1>(value))[0];
#endif
}

// Whether any lane of a comparison holds.
inline bool any_lane(i32x16 value) {
#if defined(__AVX512F__)
    const auto bits = reinterpret_cast<__m512i>(value);
    return _mm512_test_epi32_mask(bits, bits) != 0;
#else
    int64_t parts[8], any = 0;
    std::memcpy(parts, &value, sizeof parts);
    for (const int64_t part : parts) any |= part;
    return any != 0;
#endif
}

}  // namespace DSEEK_VARIANT
}  // namespace dseek
