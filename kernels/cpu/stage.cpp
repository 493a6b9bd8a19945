// The layers of a stage on a CPU: one call for any number of them, or for the two halves of one where the ranks of a
// stage must add up their parts in between. Called through ctypes by worker/cpu_kernels.py, which keeps the structs in
// step with these.
#include "attention.h"

#ifdef _OPENMP
#include <omp.h>
#endif

extern "C" {

struct Shape {
    int64_t hidden, query_heads, kv_heads, head_dim, columns, page_size;
    int64_t threads;
    int64_t adds_residual;  // 0: products with `o` and `down` replace the hidden states
    const int64_t* first_reader;  // [kv_heads + 1]: KV head h is read by query heads [h], ..., [h + 1] - 1
    double eps;
};

struct Layer {  // packed weights as product.h says; vectors as they are; null where the model has none
    const void *input_norm, *qkv, *qkv_bias, *q_norm, *k_norm, *o, *o_bias, *post_norm, *gate_up, *gate_up_bias,
        *down, *down_bias;
    int64_t window;  // 0: none
};

struct Step {
    int64_t tokens, n_runs;
    const int64_t* runs;  // [n_runs][4]: first row, tokens, position of the first, its place in `pages`
    const int64_t* pages;
    const int64_t* slots;  // [tokens]: page * page_size + offset, where keys and values go
    const void *cos, *sin;  // [tokens][head_dim]; the sines signed for swapped halves
    void* hidden;  // [tokens][hidden], changed in place
    void* kv;  // pages of the first layer
    int64_t layer_elements;  // from one layer's pages to the next's
    float* scratch;  // hexgen_scratch_floats()
};
}

namespace {

struct Scratch {
    float *normed, *wide, *mixed, *own;
    int64_t own_floats;  // of each thread

    static int64_t attention_floats(const Shape& s, const Step& b) {
        int64_t most = 0;
        for (int64_t r = 0; r < b.n_runs; r++) {
            const int64_t length = b.runs[4 * r + 1], seen = b.runs[4 * r + 2] + length;
            const int64_t here = length == 1 ? decode_floats(seen) : prefill_floats(seen, s.head_dim);
            most = here > most ? here : most;
        }
        return round_up(most, 16);
    }
    static int64_t qkv_width(const Shape& s) { return (s.query_heads + 2 * s.kv_heads) * s.head_dim; }
    static int64_t mixed_width(const Shape& s) { return s.query_heads * s.head_dim; }
    static int64_t shared_width(const Shape& s) {  // queries, keys, values and what is mixed; or the MLP's columns
        const int64_t attention = qkv_width(s) + mixed_width(s);
        return attention > s.columns ? attention : s.columns;
    }
    static int64_t total(const Shape& s, const Step& b) {
        return b.tokens * (s.hidden + shared_width(s)) + s.threads * attention_floats(s, b) + 64;
    }
    Scratch(const Shape& s, const Step& b) : own_floats(attention_floats(s, b)) {
        normed = b.scratch;
        wide = normed + b.tokens * s.hidden;
        mixed = wide + b.tokens * qkv_width(s);
        own = wide + b.tokens * shared_width(s);
    }
    float* mine() const {
#ifdef _OPENMP
        return own + omp_get_thread_num() * own_floats;
#else
        return own;
#endif
    }
};

// RMS norm of one row (Zhang & Sennrich, arXiv:1910.07467).
template <class T>
void norm_row(const T* x, const T* weight, int64_t n, float eps, float* out) {
    Vec squares[2] = {};
    int64_t i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES) {
        const Vec a = load(x + i), b = load(x + i + LANES);
        squares[0] += a * a;
        squares[1] += b * b;
    }
    float total = sum(squares[0] + squares[1]);
    for (; i < n; i++) total += to_float(x[i]) * to_float(x[i]);
    const float scale = 1.0f / std::sqrt(total / static_cast<float>(n) + eps);
    for (i = 0; i + LANES <= n; i += LANES) store(out + i, load(x + i) * scale * load(weight + i));
    for (; i < n; i++) out[i] = to_float(x[i]) * scale * to_float(weight[i]);
}

template <class T>
void norms(const T* x, const T* weight, int64_t rows, int64_t n, float eps, float* out) {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; row++) norm_row(x + row * n, weight, n, eps, out + row * n);
}

// hidden (+)= x times a packed weight [n outputs: hidden], plus a bias on the rank that adds the residual.
template <class T>
void add_product(
    const Shape& s, const T* weight, const T* bias, int64_t k, const float* x, int64_t rows, T* hidden) {
    const bool adds = s.adds_residual != 0;
    product(weight, s.hidden, k, x, rows, s.threads, [&](Piece at, const float* v, int64_t stride) {
        for (int64_t m = 0; m < at.rows; m++) {
            T* to = hidden + (at.row + m) * s.hidden + at.first;
            for (int64_t j = 0; j < at.count; j++) {
                float value = v[m * stride + j];
                if (adds) value += to_float(to[j]) + (bias ? to_float(bias[at.first + j]) : 0.0f);
                put(to + j, value);
            }
        }
    });
}

// Rotary embedding in place (Su et al., arXiv:2104.09864): x * cos + swap_halves(x) * signed sin.
template <class T>
void rotate(float* x, const T* cos, const T* sin, int64_t dim) {
    const int64_t half = dim / 2;
    for (int64_t d = 0; d < half; d++) {
        const float a = x[d], b = x[d + half];
        x[d] = a * to_float(cos[d]) + b * to_float(sin[d]);
        x[d + half] = b * to_float(cos[d + half]) + a * to_float(sin[d + half]);
    }
}

// Norms of heads, rotary embedding, queries scaled, keys and values to their pages.
template <class T>
void place_heads(const Shape& s, const Layer& w, const Step& b, T* kv, float* qkv) {
    const int64_t heads = s.query_heads + 2 * s.kv_heads, dim = s.head_dim;
    const float scale = 1.0f / std::sqrt(static_cast<float>(dim)), eps = static_cast<float>(s.eps);
#pragma omp for schedule(static)
    for (int64_t item = 0; item < b.tokens * heads; item++) {
        const int64_t row = item / heads, head = item % heads;
        float* x = qkv + item * dim;
        const bool query = head < s.query_heads, value = head >= s.query_heads + s.kv_heads;
        if (!value) {
            const T* weight = static_cast<const T*>(query ? w.q_norm : w.k_norm);
            if (weight) {
                float total = 0;
                for (int64_t d = 0; d < dim; d++) total += x[d] * x[d];
                const float by = 1.0f / std::sqrt(total / static_cast<float>(dim) + eps);
                for (int64_t d = 0; d < dim; d++) x[d] = x[d] * by * to_float(weight[d]);
            }
            rotate(x, static_cast<const T*>(b.cos) + row * dim, static_cast<const T*>(b.sin) + row * dim, dim);
        }
        if (query) {
            for (int64_t d = 0; d < dim; d++) x[d] *= scale;
            continue;
        }
        const int64_t kv_head = head - s.query_heads - (value ? s.kv_heads : 0);
        const int64_t page = b.slots[row] / s.page_size, offset = b.slots[row] % s.page_size;
        T* to = kv + (((page * 2 + value) * s.kv_heads + kv_head) * s.page_size + offset) * dim;
        for (int64_t d = 0; d < dim; d++) put(to + d, x[d]);
    }
}

template <class T>
void attend(const Shape& s, const Layer& w, const Step& b, const T* kv, const float* qkv, const Scratch& scratch,
            float* own) {
    const int64_t wide = Scratch::qkv_width(s), narrow = Scratch::mixed_width(s), dim = s.head_dim;
    // Long runs are cut for several threads where there are fewer runs and heads than threads.
    const int64_t parts = b.n_runs * s.kv_heads >= s.threads ? 1 : s.threads;
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < b.n_runs * s.kv_heads * parts; item++) {
        const int64_t* run = b.runs + 4 * (item / (s.kv_heads * parts));
        const int64_t part = item % parts, head = item / parts % s.kv_heads;
        const int64_t row = run[0], length = run[1], start = run[2];
        const int64_t begin = s.first_reader[head], queries = s.first_reader[head + 1] - begin;
        const Pages<T> pages{kv, b.pages + run[3], s.kv_heads, s.page_size, dim};
        const float* q = qkv + row * wide + begin * dim;
        float* out = scratch.mixed + row * narrow + begin * dim;
        if (queries == 0 || (length == 1 && part > 0)) continue;
        if (length == 1) {
            const int64_t first = w.window && start >= w.window ? start - w.window + 1 : 0;
            decode_attention(q, queries, pages, head, first, start + 1, out, own);
            continue;
        }
        const int64_t from = length * part / parts, to = length * (part + 1) / parts;
        if (from < to) prefill_attention(q, wide, queries, start, from, to, w.window, pages, head, out, narrow, own);
    }
}

template <class T>
void attention_half(const Shape& s, const Layer& w, const Step& b, T* kv, const Scratch& scratch, float* own) {
    T* hidden = static_cast<T*>(b.hidden);
    const int64_t wide = Scratch::qkv_width(s);
    norms(hidden, static_cast<const T*>(w.input_norm), b.tokens, s.hidden, static_cast<float>(s.eps), scratch.normed);
    const T* bias = static_cast<const T*>(w.qkv_bias);
    product(static_cast<const T*>(w.qkv), wide, s.hidden, scratch.normed, b.tokens, s.threads,
            [&](Piece at, const float* v, int64_t stride) {
                for (int64_t m = 0; m < at.rows; m++) {
                    float* to = scratch.wide + (at.row + m) * wide + at.first;
                    for (int64_t j = 0; j < at.count; j++)
                        to[j] = v[m * stride + j] + (bias ? to_float(bias[at.first + j]) : 0.0f);
                }
            });
#pragma omp barrier
    place_heads(s, w, b, kv, scratch.wide);
    attend(s, w, b, kv, scratch.wide, scratch, own);
    add_product(s, static_cast<const T*>(w.o), static_cast<const T*>(w.o_bias), Scratch::mixed_width(s),
                scratch.mixed, b.tokens, hidden);
}

template <class T>
void mlp_half(const Shape& s, const Layer& w, const Step& b, const Scratch& scratch) {
    T* hidden = static_cast<T*>(b.hidden);
    norms(hidden, static_cast<const T*>(w.post_norm), b.tokens, s.hidden, static_cast<float>(s.eps), scratch.normed);
    const T* gate = static_cast<const T*>(w.gate_up);
    const T* bias = static_cast<const T*>(w.gate_up_bias);
    float* active = scratch.wide;
    product_of_two(
        gate, gate + s.columns * s.hidden, s.columns, s.hidden, scratch.normed, b.tokens, s.threads,
        [&](Piece at, const float* g, const float* u) {
            for (int64_t m = 0; m < at.rows; m++) {
                float* to = active + (at.row + m) * s.columns + at.first;
                const float *gates = g + m * at.count, *ups = u + m * at.count;
                float biased[2][GROUP * PANEL];
                if (bias) {
                    for (int64_t j = 0; j < at.count; j++) {
                        biased[0][j] = gates[j] + to_float(bias[at.first + j]);
                        biased[1][j] = ups[j] + to_float(bias[s.columns + at.first + j]);
                    }
                    gates = biased[0], ups = biased[1];
                }
                int64_t j = 0;
                for (; j + LANES <= at.count; j += LANES) {
                    const Vec x = load(gates + j);
                    store(to + j, x / (exponential(-x) + 1.0f) * load(ups + j));
                }
                for (; j < at.count; j++) to[j] = gates[j] / (1.0f + std::exp(-gates[j])) * ups[j];
            }
        });
#pragma omp barrier
    add_product(s, static_cast<const T*>(w.down), static_cast<const T*>(w.down_bias), s.columns, active, b.tokens,
                hidden);
}

template <class T>
void layers(const Shape& s, const Layer* weights, int64_t count, const Step& b, int64_t halves) {
    const Scratch scratch(s, b);
#pragma omp parallel num_threads(static_cast<int>(s.threads)) if (s.threads > 1)
    {
        float* own = scratch.mine();
        for (int64_t i = 0; i < count; i++) {
            if (halves & 1) {
                attention_half(s, weights[i], b, static_cast<T*>(b.kv) + i * b.layer_elements, scratch, own);
#pragma omp barrier
            }
            if (halves & 2) {
                mlp_half<T>(s, weights[i], b, scratch);
#pragma omp barrier
            }
        }
    }
}

// out [rows][n] float32 = RMS norm of hidden [rows][k], times a packed head of n outputs. scratch [rows][k].
template <class T>
void logits(const T* hidden, const T* weight, const T* head, int64_t rows, int64_t k, int64_t n, double eps,
            int64_t threads, float* scratch, float* out) {
#pragma omp parallel num_threads(static_cast<int>(threads)) if (threads > 1)
    {
        norms(hidden, weight, rows, k, static_cast<float>(eps), scratch);
        product(head, n, k, scratch, rows, threads, [&](Piece at, const float* v, int64_t stride) {
            for (int64_t m = 0; m < at.rows; m++)
                memcpy(out + (at.row + m) * n + at.first, v + m * stride, sizeof(float) * at.count);
        });
    }
}

// Attention alone: `qkv` as the product with the weights of that name leaves it, rotated, queries scaled, keys and
// values in their pages; out [tokens][query_heads * head_dim].
template <class T>
void attention_alone(const Shape& s, const Layer& w, const Step& b, const float* qkv, float* out) {
    Scratch scratch(s, b);
    scratch.mixed = out;
#pragma omp parallel num_threads(static_cast<int>(s.threads)) if (s.threads > 1)
    attend(s, w, b, static_cast<const T*>(b.kv), qkv, scratch, scratch.mine());
}

// x [rows][k] times what was packed as [n][k]: out [rows][n]
template <class T>
void product_alone(const T* packed, int64_t n, int64_t k, const float* x, int64_t rows, int64_t threads, float* out) {
#pragma omp parallel num_threads(static_cast<int>(threads)) if (threads > 1)
    product(packed, n, k, x, rows, threads, [&](Piece at, const float* v, int64_t stride) {
        for (int64_t m = 0; m < at.rows; m++)
            memcpy(out + (at.row + m) * n + at.first, v + m * stride, sizeof(float) * at.count);
    });
}

// out [count][k]: rows of what was packed as [n][k].
template <class T>
void rows_of(const T* packed, int64_t n, int64_t k, const int64_t* ids, int64_t count, T* out) {
    const int64_t whole = n / PANEL * PANEL;
    for (int64_t row = 0; row < count; row++, out += k) {
        const int64_t id = ids[row], place = id % PANEL;
        if (id >= whole) {
            memcpy(out, packed + id * k, sizeof(T) * k);
            continue;
        }
        const T* from = packed + (id - place) * k + (sizeof(T) == 4 ? place : place % LANES * 2 + place / LANES);
        for (int64_t i = 0; i < k; i++) out[i] = from[i * PANEL];
    }
}

// Cosines and signed sines [tokens][dim] of positions times frequencies [dim / 2], `step` further for each token.
template <class T>
void angles(const int64_t* positions, int64_t tokens, const float* frequencies, int64_t step, int64_t dim,
            float factor, T* cos, T* sin) {
    const int64_t half = dim / 2;
    for (int64_t row = 0; row < tokens; row++, frequencies += step, cos += dim, sin += dim)
        for (int64_t d = 0; d < half; d++) {
            const float angle = static_cast<float>(positions[row]) * frequencies[d];
            const float c = std::cos(angle) * factor, s = std::sin(angle) * factor;
            put(cos + d, c), put(cos + half + d, c), put(sin + d, -s), put(sin + half + d, s);
        }
}

}  // namespace

extern "C" {

int64_t hexgen_lanes() { return LANES; }

int64_t hexgen_scratch_floats(const Shape* s, const Step* b) { return Scratch::total(*s, *b); }

// halves: 1 attention, 2 MLP, 3 both.
void hexgen_layers_float32(const Shape* s, const Layer* w, int64_t count, const Step* b, int64_t halves) {
    layers<float>(*s, w, count, *b, halves);
}
void hexgen_layers_bfloat16(const Shape* s, const Layer* w, int64_t count, const Step* b, int64_t halves) {
    layers<bf16>(*s, w, count, *b, halves);
}
void hexgen_logits_float32(const float* hidden, const float* weight, const float* head, int64_t rows, int64_t k,
                           int64_t n, double eps, int64_t threads, float* scratch, float* out) {
    logits(hidden, weight, head, rows, k, n, eps, threads, scratch, out);
}
void hexgen_logits_bfloat16(const bf16* hidden, const bf16* weight, const bf16* head, int64_t rows, int64_t k,
                            int64_t n, double eps, int64_t threads, float* scratch, float* out) {
    logits(hidden, weight, head, rows, k, n, eps, threads, scratch, out);
}
void hexgen_rows_float32(const float* packed, int64_t n, int64_t k, const int64_t* ids, int64_t count, float* out) {
    rows_of(packed, n, k, ids, count, out);
}
void hexgen_angles_float32(const int64_t* positions, int64_t tokens, const float* frequencies, int64_t step,
                          int64_t dim, double factor, float* cos, float* sin) {
    angles(positions, tokens, frequencies, step, dim, static_cast<float>(factor), cos, sin);
}
void hexgen_rows_bfloat16(const bf16* packed, int64_t n, int64_t k, const int64_t* ids, int64_t count, bf16* out) {
    rows_of(packed, n, k, ids, count, out);
}
void hexgen_angles_bfloat16(const int64_t* positions, int64_t tokens, const float* frequencies, int64_t step,
                          int64_t dim, double factor, bf16* cos, bf16* sin) {
    angles(positions, tokens, frequencies, step, dim, static_cast<float>(factor), cos, sin);
}
void hexgen_attention_float32(const Shape* s, const Layer* w, const Step* b, const float* qkv, float* out) {
    attention_alone<float>(*s, *w, *b, qkv, out);
}
void hexgen_product_float32(const float* packed, int64_t n, int64_t k, const float* x, int64_t rows, int64_t threads,
                           float* out) {
    product_alone(packed, n, k, x, rows, threads, out);
}
void hexgen_attention_bfloat16(const Shape* s, const Layer* w, const Step* b, const float* qkv, float* out) {
    attention_alone<bf16>(*s, *w, *b, qkv, out);
}
void hexgen_product_bfloat16(const bf16* packed, int64_t n, int64_t k, const float* x, int64_t rows, int64_t threads,
                           float* out) {
    product_alone(packed, n, k, x, rows, threads, out);
}
}
