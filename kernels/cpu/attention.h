// Attention of one run of tokens over the pages of its sequence, for one KV head. Nothing is gathered for decoding.
//
// A layer's pages are [pages][2][kv_heads][page_size][head_dim]; side 0 is keys, side 1 values.
#pragma once

#include "product.h"

template <class T>
struct Pages {
    const T* data;  // of one layer
    const int64_t* table;  // the sequence's pages, from position 0 on
    int64_t kv_heads, page_size, head_dim;

    // The rows of a page for one side and head: [page_size][head_dim]
    const T* rows(int64_t page, int side, int64_t head) const {
        return data + ((table[page] * 2 + side) * kv_heads + head) * page_size * head_dim;
    }
};

INLINE int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Turns scores[0, n) into weights that add up to 1, in place.
static void softmax(float* scores, int64_t n) {
    float most = scores[0];
    for (int64_t i = 1; i < n; i++) most = scores[i] > most ? scores[i] : most;
    Vec sums = {};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        const Vec e = exponential(load(scores + i) - most);
        store(scores + i, e);
        sums += e;
    }
    float last[LANES], total = sum(sums);
    for (int64_t j = i; j < n; j++) last[j - i] = scores[j] - most;
    if (i < n) {
        for (int64_t j = n - i; j < LANES; j++) last[j] = -88.0f;
        Vec values = load(last);
        values = exponential(values);
        memcpy(last, &values, sizeof last);
        for (int64_t j = i; j < n; j++) total += scores[j] = last[j - i];
    }
    const float scale = 1.0f / total;
    for (i = 0; i + LANES <= n; i += LANES) store(scores + i, load(scores + i) * scale);
    for (; i < n; i++) scores[i] *= scale;
}

INLINE void prefetch(const void* from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(from) + i);
}

// scores[g * stride + t] = q[g] . key t, for G queries and `count` keys of one page, of which `room` may be read.
// Writes up to LANES - 1 scores further.
template <class T, int G>
INLINE void score(
    const float* q, const T* keys, int64_t count, int64_t room, int64_t dim, float* scores, int64_t stride) {
    int64_t t = 0;
    const int64_t whole = dim / LANES * LANES;
    for (; t < count && t + LANES <= room; t += LANES)
#pragma GCC unroll 4
        for (int g = 0; g < G; g++) {
            Vec sums[LANES] = {};
            for (int64_t d = 0; d < whole; d += LANES) {
                const Vec part = load(q + g * dim + d);
#pragma GCC unroll 16
                for (int s = 0; s < LANES; s++) sums[s] += part * load(keys + (t + s) * dim + d);
            }
            Vec total = sums_of(sums);
            for (int64_t d = whole; d < dim; d++)
                for (int s = 0; s < LANES; s++) total[s] += q[g * dim + d] * to_float(keys[(t + s) * dim + d]);
            store(scores + g * stride + t, total);
        }
    for (; t < count; t++)
        for (int g = 0; g < G; g++) scores[g * stride + t] = dot(q + g * dim, keys + t * dim, dim);
}

// out[g][d] for d in [begin, begin + D * LANES): the weighted sum of the values of positions [first, end).
template <class T, int G, int D>
INLINE void mix(
    const Pages<T>& pages, int64_t head, int64_t first, int64_t end, const float* weights, int64_t stride,
    int64_t begin, float* out) {
    Vec sums[G][D] = {};
    const int64_t size = pages.page_size, dim = pages.head_dim;
    for (int64_t at = first; at < end;) {
        const int64_t page = at / size, stop = (page + 1) * size < end ? (page + 1) * size : end;
        const T* row = pages.rows(page, 1, head) + (at - page * size) * dim + begin;
        if (stop < end && begin == 0) prefetch(pages.rows(page + 1, 1, head), size * dim * int64_t(sizeof(T)));
        for (; at < stop; at++, row += dim)
#pragma GCC unroll 4
            for (int d = 0; d < D; d++) {
                const Vec value = load(row + d * LANES);
#pragma GCC unroll 4
                for (int g = 0; g < G; g++) sums[g][d] += value * weights[g * stride + at - first];
            }
    }
    for (int g = 0; g < G; g++)
        for (int d = 0; d < D; d++) store(out + g * dim + begin + d * LANES, sums[g][d]);
}

// One token of G queries [G][dim] (scaled already) at `position`: out [G][dim]. `scratch` [G][positions seen + LANES].
template <class T, int G>
static void attend_one(
    const float* q, const Pages<T>& pages, int64_t head, int64_t first, int64_t end, float* out, float* scratch) {
    const int64_t size = pages.page_size, dim = pages.head_dim, n = end - first, stride = n + LANES;
    const int64_t page_bytes = size * dim * int64_t(sizeof(T));
    for (int64_t at = first; at < end;) {
        const int64_t page = at / size, stop = (page + 1) * size < end ? (page + 1) * size : end;
        const T* keys = pages.rows(page, 0, head) + (at - page * size) * dim;
        prefetch(pages.rows(stop < end ? page + 1 : first / size, stop < end ? 0 : 1, head), page_bytes);
        score<T, G>(q, keys, stop - at, (page + 1) * size - at, dim, scratch + at - first, stride);
        at = stop;
    }
    for (int g = 0; g < G; g++) softmax(scratch + g * stride, n);
    int64_t d = 0;
    for (; d + 4 * LANES <= dim; d += 4 * LANES) mix<T, G, 4>(pages, head, first, end, scratch, stride, d, out);
    for (; d + LANES <= dim; d += LANES) mix<T, G, 1>(pages, head, first, end, scratch, stride, d, out);
    for (; d < dim; d++)
        for (int g = 0; g < G; g++) {
            float total = 0;
            for (int64_t at = first; at < end; at++)
                total += scratch[g * stride + at - first] *
                         to_float(pages.rows(at / size, 1, head)[at % size * dim + d]);
            out[g * dim + d] = total;
        }
}

// Any number of queries of one token and one KV head.
template <class T>
static void decode_attention(
    const float* q, int64_t queries, const Pages<T>& pages, int64_t head, int64_t first, int64_t end, float* out,
    float* scratch) {
    const int64_t dim = pages.head_dim;
    for (int64_t g = 0; g < queries;) {
        const int64_t left = queries - g;
        if (left >= 4) attend_one<T, 4>(q + g * dim, pages, head, first, end, out + g * dim, scratch), g += 4;
        else if (left >= 2) attend_one<T, 2>(q + g * dim, pages, head, first, end, out + g * dim, scratch), g += 2;
        else attend_one<T, 1>(q + g * dim, pages, head, first, end, out + g * dim, scratch), g += 1;
    }
}

// What decode_attention and prefill_attention need of scratch for `seen` positions, in floats.
INLINE int64_t decode_floats(int64_t seen) { return 4 * (seen + LANES); }
INLINE int64_t prefill_floats(int64_t seen, int64_t dim) {
    const int64_t wide = round_up(seen, PANEL), deep = round_up(dim, PANEL);
    return wide * (dim + deep) + TILE_ROWS * (wide + dim);
}

// Tokens [from, to) of a run whose first token is at position `start`: `queries` query rows a token, which begin at
// q + token * ldq; the results go to out + token * ldo. window 0: none.
// Keys of positions from `first` on are laid out in panels [PANEL positions] and values in panels [PANEL dimensions],
// so that both products are the tiles of product.h.
template <class T>
static void prefill_attention(
    const float* q, int64_t ldq, int64_t queries, int64_t start, int64_t from, int64_t to, int64_t window,
    const Pages<T>& pages, int64_t head, float* out, int64_t ldo, float* scratch) {
    const int64_t size = pages.page_size, dim = pages.head_dim;
    const int64_t oldest = window && start + from >= window ? start + from - window + 1 : 0;
    const int64_t seen = start + to - oldest, wide = round_up(seen, PANEL), deep = round_up(dim, PANEL);
    float* keys = scratch;              // [wide / PANEL][dim][PANEL]
    float* values = keys + wide * dim;  // [deep / PANEL][wide][PANEL]
    float* weights = values + wide * deep;
    float* block = weights + TILE_ROWS * wide;  // [TILE_ROWS][dim]
    for (int64_t t = 0; t < wide; t++) {
        const int64_t at = oldest + t;
        const bool real = t < seen;
        const T* key = real ? pages.rows(at / size, 0, head) + at % size * dim : nullptr;
        const T* value = real ? pages.rows(at / size, 1, head) + at % size * dim : nullptr;
        float* column = keys + t / PANEL * dim * PANEL + t % PANEL;
        for (int64_t d = 0; d < dim; d++) column[d * PANEL] = real ? to_float(key[d]) : 0.0f;
        for (int64_t d = 0; d < deep; d++)
            values[(d / PANEL * wide + t) * PANEL + d % PANEL] = real && d < dim ? to_float(value[d]) : 0.0f;
    }
    const int64_t rows = (to - from) * queries;  // query rows, those of one token together
    for (int64_t row = 0; row < rows; row += TILE_ROWS) {
        const int take = static_cast<int>(rows - row < TILE_ROWS ? rows - row : TILE_ROWS);
        const int64_t last = start + from + (row + take - 1) / queries - oldest;  // the latest key that is seen
        for (int m = 0; m < take; m++) {
            const int64_t token = from + (row + m) / queries;
            memcpy(block + m * dim, q + token * ldq + (row + m) % queries * dim, sizeof(float) * dim);
        }
        float tiles[TILE_FLOATS];
        for (int64_t p = 0; p * PANEL <= last; p++) {
            run_tile<float>(take, block, dim, keys + p * dim * PANEL, dim, tiles, 1, keys, 0);
            for (int m = 0; m < take; m++) memcpy(weights + m * wide + p * PANEL, tiles + m * PANEL, sizeof(float) * PANEL);
        }
        for (int m = 0; m < take; m++) {
            const int64_t at = start + from + (row + m) / queries;
            const int64_t low = window && at >= window ? at - window + 1 - oldest : 0, high = at - oldest + 1;
            float* mine = weights + m * wide;
            memset(mine, 0, sizeof(float) * low);
            softmax(mine + low, high - low);
            for (int64_t t = high; t <= last; t++) mine[t] = 0.0f;
        }
        for (int64_t p = 0; p < deep / PANEL; p++) {
            run_tile<float>(take, weights, wide, values + p * wide * PANEL, last + 1, tiles, 1, values, 0);
            const int64_t left = dim - p * PANEL, count = left < PANEL ? left : PANEL;
            for (int m = 0; m < take; m++) {
                const int64_t token = from + (row + m) / queries;
                float* to_here = out + token * ldo + (row + m) % queries * dim + p * PANEL;
                memcpy(to_here, tiles + m * PANEL, sizeof(float) * count);
            }
        }
    }
}
