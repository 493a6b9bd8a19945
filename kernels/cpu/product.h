// Products of a few rows with a packed weight.
//
// A weight of n outputs and k inputs is stored in panels of PANEL outputs: [n / PANEL][k][PANEL], one after the other
// as they are read, once a step. The n % PANEL outputs that are left follow as plain rows [n % PANEL][k]. Every output
// is one chain of additions over k, whatever the number of rows: a row's result does not depend on its batch.
#pragma once

#include "vectors.h"

// How far ahead of its use one row asks for a panel, in bytes. Measured on an EPYC 7003, together with SIDE_BY_SIDE:
// 8 panels and 256 to 384 bytes read 14 % faster than 4 panels and 1024 bytes, and faster than a plain sum does.
constexpr int AHEAD_BYTES = 384;

// out[m * ldo + p * PANEL + j] = sum over i of x[m][i] * panel p [i][j]. With one row, memory is the limit and every panel
// is asked for ahead of its use, and not to be kept: what else a step needs should stay in the caches. With more
// rows, `ahead` is asked for, `pace` elements at each i: a part of the next panel, so that memory and arithmetic both
// work all the time.
template <class T, int M, int P>
static __attribute__((noinline)) void tile(
    const float* x, int64_t ldx, const T* panels, int64_t k, float* out, int64_t ldo, const T* ahead, int64_t pace) {
    Vec sums[M][P][2] = {};
    for (int64_t i = 0; i < k; i++) {
#pragma GCC unroll 8
        for (int p = 0; p < P; p++) {
            const T* row = panels + p * k * PANEL + i * PANEL;
            if (M == 1) __builtin_prefetch(reinterpret_cast<const char*>(row) + AHEAD_BYTES, 0, 0);
            else __builtin_prefetch(ahead + (p * k + i) * pace, 0, 2);
            Pair w = load_row(row);
            if (M == 4) in_registers(w);
#pragma GCC unroll 12
            for (int m = 0; m < M; m++) {
                sums[m][p][0] += w.low * x[m * ldx + i];
                sums[m][p][1] += w.high * x[m * ldx + i];
            }
        }
    }
#pragma GCC unroll 12
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
        for (int p = 0; p < P; p++) {
            store(out + m * ldo + p * PANEL, sums[m][p][0]);
            store(out + m * ldo + p * PANEL + LANES, sums[m][p][1]);
        }
}

// Panels side by side: enough independent sums to hide an addition's latency, and with one row as many streams as
// memory answers best.
template <class T>
constexpr int side_by_side(int rows) {  // three rows of two panels of bfloat16 would need more registers than AVX2 has
    return rows == 1 ? 8 : rows == 2 || (rows == 3 && (sizeof(T) == 4 || LANES == 16)) ? 2 : 1;
}
constexpr int GROUP = 8;  // panels of one piece of work, at most
constexpr int TILE_FLOATS = TILE_ROWS * GROUP * PANEL;

template <class T, int M>
static void tile_of(
    const float* x, int64_t ldx, const T* panels, int64_t k, float* out, int count, const T* ahead, int64_t pace) {
    constexpr int most = side_by_side<T>(M);
    const int64_t ldo = int64_t(count) * PANEL;
    while (count > 0) {
        int now = count < most ? count : most;
        if (most >= 8 && now == 8) tile<T, M, most >= 8 ? 8 : 1>(x, ldx, panels, k, out, ldo, ahead, pace);
        else if (most >= 4 && now >= 4) tile<T, M, most >= 4 ? 4 : 1>(x, ldx, panels, k, out, ldo, ahead, pace), now = 4;
        else if (most >= 4 && now == 3) tile<T, M, most >= 4 ? 3 : 1>(x, ldx, panels, k, out, ldo, ahead, pace);
        else if (most >= 2 && now == 2) tile<T, M, most >= 2 ? 2 : 1>(x, ldx, panels, k, out, ldo, ahead, pace);
        else tile<T, M, 1>(x, ldx, panels, k, out, ldo, ahead, pace);
        panels += now * k * PANEL, out += now * PANEL, ahead += now * k * pace, count -= now;
    }
}

// `out` holds TILE_FLOATS: [rows][count * PANEL]. 1 <= rows <= TILE_ROWS, count <= GROUP.
template <class T, int M = TILE_ROWS>
static inline void run_tile(
    int rows, const float* x, int64_t ldx, const T* panels, int64_t k, float* out, int count, const T* ahead,
    int64_t pace) {
    if (rows == M) return tile_of<T, M>(x, ldx, panels, k, out, count, ahead, pace);
    if constexpr (M > 1) run_tile<T, M - 1>(rows, x, ldx, panels, k, out, count, ahead, pace);
}

template <class T>
static float dot(const float* x, const T* w, int64_t k) {
    Vec sums[2] = {};
    int64_t i = 0;
    for (; i + 2 * LANES <= k; i += 2 * LANES) {
        sums[0] += load(x + i) * load(w + i);
        sums[1] += load(x + i + LANES) * load(w + i + LANES);
    }
    float total = sum(sums[0] + sums[1]);
    for (; i < k; i++) total += x[i] * to_float(w[i]);
    return total;
}

// Rows that are worked on while a panel is near: their inputs should stay in the second-level cache.
constexpr int64_t ROW_CHUNK = 48;

struct Piece {  // of a result: rows [row, row + rows), outputs [first, first + count)
    int64_t row, rows, first, count;
};

// How many of the rows that are left the next tile takes: as even as can be. In float32, five and three are a little
// better than four and four (85 against 81 GFLOP/s); in bfloat16, much worse (67 against 97).
template <class T>
INLINE int64_t next_rows(int64_t left, int64_t blocks) {
    if (left <= 1 || blocks <= 1) return left;
    const int64_t even = (left + blocks - 1) / blocks;
    return sizeof(T) == 4 && even < TILE_ROWS && (even == 4 || left - even == 4) ? even + 1 : even;
}

// One piece of work of the loop below: panels [panel, panel + count) for all rows, `emit(Piece, values, stride)`.
template <class T, class Emit>
static inline void panels_times(
    const T* weight, int64_t k, int64_t panel, int count, const float* x, int64_t first, int64_t rows, Emit emit) {
    float out[TILE_FLOATS];
    const int64_t blocks = (rows + TILE_ROWS - 1) / TILE_ROWS;
    const int most = rows == 1 ? GROUP : 2;
    for (int done = 0, now; done < count; done += now) {
        now = count - done < most ? count - done : most;
        const T* here = weight + (panel + done) * k * PANEL;
        const int64_t pace = PANEL / blocks;
        for (int64_t b = 0, row = 0; row < rows; b++) {
            const int64_t take = next_rows<T>(rows - row, blocks - b);
            run_tile<T>(
                static_cast<int>(take), x + (first + row) * k, k, here, k, out, now,
                here + now * k * (PANEL + b * pace), pace);
            emit(Piece{first + row, take, (panel + done) * PANEL, int64_t(now) * PANEL}, out, int64_t(now) * PANEL);
            row += take;
        }
    }
}

// All panels that one row reads at once make a unit of work, unless too few units were left to share.
INLINE int panels_a_unit(int64_t panels, int64_t rows, int64_t threads) {
    return rows == 1 && panels >= 2 * GROUP * threads ? GROUP : 4;
}

// Inside a parallel region: x [rows, k] times a packed weight of n outputs. Ends without a barrier.
template <class T, class Emit>
static void product(const T* weight, int64_t n, int64_t k, const float* x, int64_t rows, int64_t threads, Emit emit) {
    const int64_t panels = n / PANEL, tail = n % PANEL;
    const T* rest = weight + panels * PANEL * k;
    for (int64_t first = 0; first < rows; first += ROW_CHUNK) {
        const int64_t here = rows - first < ROW_CHUNK ? rows - first : ROW_CHUNK;
        const int wide = panels_a_unit(panels, here, threads);
        const int64_t groups = (panels + wide - 1) / wide, units = groups + (tail ? 1 : 0);
        const int64_t chunk = 1 + units / (8 * threads);
#pragma omp for schedule(dynamic, chunk) nowait
        for (int64_t unit = 0; unit < units; unit++) {
            if (unit < groups) {
                const int64_t left = panels - wide * unit;
                const int count = static_cast<int>(left < wide ? left : wide);
                panels_times(weight, k, wide * unit, count, x, first, here, emit);
                continue;
            }
            float out[PANEL];
            for (int64_t row = first; row < first + here; row++) {
                for (int64_t j = 0; j < tail; j++) out[j] = dot(x + row * k, rest + j * k, k);
                emit(Piece{row, 1, panels * PANEL, tail}, out, tail);
            }
        }
    }
}

// The same for two weights of one shape at once, whose results belong together: gate and up.
template <class T, class Emit>
static void product_of_two(
    const T* one, const T* two, int64_t n, int64_t k, const float* x, int64_t rows, int64_t threads, Emit emit) {
    const int64_t panels = n / PANEL, tail = n % PANEL;
    for (int64_t first = 0; first < rows; first += ROW_CHUNK) {
        const int64_t here = rows - first < ROW_CHUNK ? rows - first : ROW_CHUNK;
        const int wide = here == 1 ? panels_a_unit(panels, 1, threads) : 1;
        const int64_t groups = (panels + wide - 1) / wide, units = groups + (tail ? 1 : 0);
        const int64_t chunk = 1 + units / (8 * threads);
#pragma omp for schedule(dynamic, chunk) nowait
        for (int64_t unit = 0; unit < units; unit++) {
            if (unit < groups) {
                const int64_t left = panels - wide * unit;
                const int count = static_cast<int>(left < wide ? left : wide);
                float kept[ROW_CHUNK * PANEL];  // here == 1: GROUP panels of one row
                panels_times(one, k, wide * unit, count, x, first, here, [&](Piece at, const float* v, int64_t) {
                    memcpy(kept + (at.row - first) * PANEL, v, sizeof(float) * at.rows * at.count);
                });
                panels_times(two, k, wide * unit, count, x, first, here, [&](Piece at, const float* v, int64_t) {
                    emit(at, kept + (at.row - first) * PANEL, v);
                });
                continue;
            }
            float a[PANEL], b[PANEL];
            for (int64_t row = first; row < first + here; row++) {
                for (int64_t j = 0; j < tail; j++) {
                    a[j] = dot(x + row * k, one + (panels * PANEL + j) * k, k);
                    b[j] = dot(x + row * k, two + (panels * PANEL + j) * k, k);
                }
                emit(Piece{row, 1, panels * PANEL, tail}, a, b);
            }
        }
    }
}
