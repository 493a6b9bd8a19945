// Vectors of floats as wide as the machine's registers, by GCC's and Clang's vector extensions: one source for AVX2,
// AVX-512 and NEON. Compiled for the machine at hand (-march=native).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define INLINE static inline __attribute__((always_inline))

#ifndef HX_LANES  // given by tests alone: the compiler makes any width out of what the machine has
#if defined(__AVX512F__)
#define HX_LANES 16
#elif defined(__AVX__)
#define HX_LANES 8
#else
#define HX_LANES 4
#endif
#endif
constexpr int LANES = HX_LANES;
constexpr int TILE_ROWS = HX_LANES == 16 ? 12 : 6;  // x 2 accumulators, of 32 or 16 registers
constexpr int PANEL = 2 * LANES;  // outputs of a panel of weights

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef float LooseVec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t IntVec __attribute__((vector_size(4 * LANES)));
typedef uint32_t BitVec __attribute__((vector_size(4 * LANES)));
typedef uint32_t LooseBitVec __attribute__((vector_size(4 * LANES), aligned(2), may_alias));
typedef uint16_t LooseHalfVec __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

struct bf16 {
    uint16_t bits;
};

INLINE Vec splat(float x) { return Vec{} + x; }
INLINE Vec load(const float* p) { return *reinterpret_cast<const LooseVec*>(p); }
INLINE Vec load(const bf16* p) {
    const BitVec wide = __builtin_convertvector(*reinterpret_cast<const LooseHalfVec*>(p), BitVec);
    return reinterpret_cast<Vec>(wide << 16);
}
INLINE void store(float* p, Vec x) { *reinterpret_cast<LooseVec*>(p) = x; }

INLINE float to_float(float x) { return x; }
INLINE float to_float(bf16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
INLINE void put(float* p, float x) { *p = x; }
// To the nearest, ties to even, as torch rounds.
INLINE void put(bf16* p, float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u)
        p->bits = static_cast<uint16_t>(bits >> 16 | 0x40u);
    else
        p->bits = static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// The two halves of one row of a panel. bf16 panels hold outputs j and j + LANES side by side, so that widening is a
// shift and a mask.
struct Pair {
    Vec low, high;
};
INLINE Pair load_row(const float* p) { return {load(p), load(p + LANES)}; }
INLINE Pair load_row(const bf16* p) {
    const BitVec both = *reinterpret_cast<const LooseBitVec*>(p);
    return {reinterpret_cast<Vec>(both << 16), reinterpret_cast<Vec>(both & 0xffff0000u)};
}

// Keeps the compiler from reading both halves from memory again in each of several multiplications: loads would be
// the limit. Only where a vector is one register.
INLINE void in_registers(Pair& pair) {
#if defined(__x86_64__) && (HX_LANES == 4 || (HX_LANES == 8 && defined(__AVX__)) || defined(__AVX512F__))
    __asm__("" : "+v"(pair.low), "+v"(pair.high));
#elif defined(__aarch64__) && HX_LANES == 4
    __asm__("" : "+w"(pair.low), "+w"(pair.high));
#endif
}

// Sums of neighbours, those of `a` and of `b` in turn: a0+a1, b0+b1, a2+a3, b2+b3, ...
INLINE Vec fold(Vec a, Vec b) {
#if HX_LANES == 16
    return __builtin_shufflevector(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
           __builtin_shufflevector(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
#elif HX_LANES == 8
    return __builtin_shufflevector(a, b, 0, 8, 2, 10, 4, 12, 6, 14) +
           __builtin_shufflevector(a, b, 1, 9, 3, 11, 5, 13, 7, 15);
#else
    return __builtin_shufflevector(a, b, 0, 4, 2, 6) + __builtin_shufflevector(a, b, 1, 5, 3, 7);
#endif
}
// The same with pairs of neighbours, and with fours, and with eights: a tree that ends with one sum a place.
INLINE Vec fold2(Vec a, Vec b) {
#if HX_LANES == 16
    return __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
           __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
#elif HX_LANES == 8
    return __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13) +
           __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
#else
    return __builtin_shufflevector(a, b, 0, 1, 4, 5) + __builtin_shufflevector(a, b, 2, 3, 6, 7);
#endif
}
#if HX_LANES > 4
INLINE Vec fold4(Vec a, Vec b) {
#if HX_LANES == 16
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
           __builtin_shufflevector(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
#else
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11) +
           __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
#endif
}
#endif
#if HX_LANES == 16
INLINE Vec fold8(Vec a, Vec b) {
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
}
#endif

// Place i of the result: the sum of all places of x[i].
INLINE Vec sums_of(const Vec* x) {
#if HX_LANES == 16
    Vec four[4];
    for (int i = 0; i < 4; i++)
        four[i] = fold2(fold(x[4 * i], x[4 * i + 1]), fold(x[4 * i + 2], x[4 * i + 3]));
    return fold8(fold4(four[0], four[1]), fold4(four[2], four[3]));
#elif HX_LANES == 8
    return fold4(fold2(fold(x[0], x[1]), fold(x[2], x[3])), fold2(fold(x[4], x[5]), fold(x[6], x[7])));
#else
    return fold2(fold(x[0], x[1]), fold(x[2], x[3]));
#endif
}

INLINE float sum(Vec x) {
    float total = 0;
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) total += x[i];
    return total;
}

INLINE Vec larger(Vec a, Vec b) { return a > b ? a : b; }
INLINE Vec smaller(Vec a, Vec b) { return a < b ? a : b; }

// e^x to about 2 units in the last place: range reduction by ln 2 in two parts, then a polynomial of degree 5
// (the coefficients of Cephes' expf, Moshier). Below -87 the smallest normal number, near enough to 0.
INLINE Vec exponential(Vec x) {
    x = smaller(larger(x, splat(-87.0f)), splat(88.0f));
    const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const Vec shifted = x * 1.44269504088896341f + magic;
    const IntVec power = reinterpret_cast<IntVec>(shifted) - reinterpret_cast<IntVec>(magic);
    const Vec n = shifted - magic;
    const Vec r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    Vec y = splat(1.9875691500e-4f);
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    return y * reinterpret_cast<Vec>((power + 127) << 23);
}
