// Vectors of floats as wide as the machine's registers, by GCC's and Clang's vector extensions: one source for AVX2,
// AVX-512 and NEON. Compiled for the machine at hand (-march=native).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)
constexpr int LANES = 16;
constexpr int TILE_ROWS = 12;  // accumulators of a tile: TILE_ROWS x 2, of 32 registers
#elif defined(__AVX__)
constexpr int LANES = 8;
constexpr int TILE_ROWS = 6;  // of 16 registers
#else
constexpr int LANES = 4;
constexpr int TILE_ROWS = 6;
#endif
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

INLINE float sum(Vec x) {
    float parts[LANES], total = 0;
    memcpy(parts, &x, sizeof parts);
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int i = 0; i < width; i++) parts[i] += parts[i + width];
    total = parts[0];
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
