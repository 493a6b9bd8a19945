// How one warp attends some rows to some keys that lie in shared memory: on tensor cores, or with plain arithmetic.
// Both keep the running maximum, sum and result of their rows (online softmax, base 2) in registers.
//
// An engine owns ROWS rows; a lane has a part in SLOTS of them, row(0) ... row(SLOTS - 1). ``speaks_for_row``: of the
// lanes that share rows, the one that stores what they have in common.
#ifndef HEXGEN_ENGINES
#define HEXGEN_ENGINES
#include "intrinsics.cuh"

template <int SLOTS>
struct RowMask {
    int lower[SLOTS], upper[SLOTS];  // a slot's row sees keys lower ... upper
    const unsigned* bits[SLOTS];     // and of the run's own tokens those whose bit is set, where there is a tree
    int run_start;
    bool tree;

    DEVICE bool sees(int j, int key) const {
        if (key < lower[j] || key > upper[j]) return false;
        if (!tree || key < run_start) return true;
        const int k = key - run_start;
        return (bits[j][k >> 5] >> (k & 31)) & 1u;
    }
};

// 16 rows on tensor cores; fp16, from sm_80 on bf16 too. The layout is that of ``mma``'s accumulators in units of
// 16 x 16: eight elements a lane, of which bit 1 chooses between its two rows.
template <typename T, int HEAD, int WARP_KEYS>
struct TensorCores {
    static constexpr int ROWS = 16, SLOTS = 2, KEYS = WARP_KEYS, STRIDE = HEAD + 8, UNITS = KEYS / 16;
    using Mask = RowMask<SLOTS>;
    float result[HEAD / 16][8], peak[2], sum[2];

    static DEVICE int lane() { return threadIdx.x & 31; }
    static DEVICE int slot(int element) { return (element >> 1) & 1; }

#if __CUDA_ARCH__ >= 750
    static DEVICE int row(int j) { return (lane() >> 2) + 8 * j; }
    static DEVICE int column(int e) { return ((e >> 2) << 3) + 2 * (lane() & 3) + (e & 1); }
    static DEVICE bool speaks_for_row() { return (lane() & 3) == 0; }
    static constexpr int REDUCE_1 = 1, REDUCE_2 = 2;  // lanes with the same rows differ in these bits

    // scores[16 x 16 keys] += q[16 x 16] k[16 keys x 16]^T
    static DEVICE void multiply_keys(float (&scores)[UNITS][8], const T* q, const T* k) {
        UNROLL
        for (int c = 0; c < HEAD; c += 16) {
            unsigned a[4];
            load_matrices(a, q + (lane() & 15) * STRIDE + c + (lane() >> 4) * 8);
            UNROLL
            for (int u = 0; u < UNITS; u++) {
                unsigned b[4];
                const int key = u * 16 + (lane() & 7) + ((lane() >> 4) << 3);
                load_matrices(b, k + key * STRIDE + c + ((lane() >> 3) & 1) * 8);
                mma_16x8x16<T>(scores[u], a, b[0], b[1]);
                mma_16x8x16<T>(scores[u] + 4, a, b[2], b[3]);
            }
        }
    }
    // Probabilities in the accumulators' layout are already in that of a left operand.
    DEVICE void multiply_values(const float (&p)[UNITS][8], const T* v) {
        UNROLL
        for (int u = 0; u < UNITS; u++) {
            unsigned a[4];
            UNROLL
            for (int i = 0; i < 4; i++) a[i] = pack(p[u][2 * i], p[u][2 * i + 1]);
            UNROLL
            for (int c = 0; c < HEAD / 16; c++) {
                unsigned b[4];
                load_matrices_transposed(b, v + (u * 16 + (lane() & 15)) * STRIDE + c * 16 + (lane() >> 4) * 8);
                mma_16x8x16<T>(result[c], a, b[0], b[1]);
                mma_16x8x16<T>(result[c] + 4, a, b[2], b[3]);
            }
        }
    }
#else
    // sm_70: a quarter of the warp multiplies 8 x 8; quarter 0 and 2 have the first eight rows, 0 and 1 the first
    // eight columns.
    static DEVICE int high() { return lane() >> 4; }
    static DEVICE int row_block() { return (lane() >> 2) & 1; }
    static DEVICE int column_block() { return (lane() >> 3) & 1; }
    static DEVICE int row(int j) { return row_block() * 8 + high() * 4 + 2 * j + (lane() & 1); }
    static DEVICE int column(int e) { return column_block() * 8 + (e & 4) + (lane() & 2) + (e & 1); }
    static DEVICE bool speaks_for_row() { return (lane() & 10) == 0; }
    static constexpr int REDUCE_1 = 2, REDUCE_2 = 8;

    static DEVICE void load_four(unsigned (&r)[2], const T* from) {
        const unsigned* words = (const unsigned*)from;
        r[0] = words[0];
        r[1] = words[1];
    }
    static DEVICE void multiply_keys(float (&scores)[UNITS][8], const T* q, const T* k) {
        const T* q_row = q + (row_block() * 8 + high() * 4 + (lane() & 3)) * STRIDE;
        const T* k_row = k + (column_block() * 8 + high() * 4 + (lane() & 3)) * STRIDE;
        UNROLL
        for (int c = 0; c < HEAD; c += 4) {
            unsigned a[2], b[2];
            load_four(a, q_row + c);
            UNROLL
            for (int u = 0; u < UNITS; u++) {
                load_four(b, k_row + u * 16 * STRIDE + c);
                mma_8x8x4<false>(scores[u], a, b);
            }
        }
    }
    DEVICE void multiply_values(const float (&p)[UNITS][8], const T* v) {
        const bool odd = lane() & 2;  // which of its two rows the lane has in a left operand
        UNROLL
        for (int u = 0; u < UNITS; u++) {
            UNROLL
            for (int kk = 0; kk < 4; kk++) {  // four keys at a time; their probabilities are in two lanes
                const int e = (kk & 1) * 4, source = (lane() & ~8) | ((kk >> 1) << 3);
                const unsigned even_row = pack(p[u][e], p[u][e + 1]), odd_row = pack(p[u][e + 2], p[u][e + 3]);
                const unsigned same = shuffle(odd ? odd_row : even_row, source);
                const unsigned other = shuffle(odd ? even_row : odd_row, source ^ 2);
                unsigned a[2] = {odd ? other : same, odd ? same : other};
                const T* v_row = v + (u * 16 + kk * 4 + (lane() & 3)) * STRIDE + column_block() * 8 + high() * 4;
                UNROLL
                for (int c = 0; c < HEAD / 16; c++) {
                    unsigned b[2];
                    load_four(b, v_row + c * 16);
                    mma_8x8x4<true>(result[c], a, b);
                }
            }
        }
    }
#endif

    static DEVICE unsigned pack(float low, float high) {
        return (unsigned)from_float<T>(low).bits | ((unsigned)from_float<T>(high).bits << 16);
    }

    DEVICE void clear() {
        UNROLL
        for (int c = 0; c < HEAD / 16; c++) {
            UNROLL
            for (int e = 0; e < 8; e++) result[c][e] = 0.0f;
        }
        peak[0] = peak[1] = -infinity();
        sum[0] = sum[1] = 0.0f;
    }

    DEVICE void step(const T* q, const T* k, const T* v, int first_key, bool masked, const Mask& mask, float scale) {
        float scores[UNITS][8];
        UNROLL
        for (int u = 0; u < UNITS; u++) {
            UNROLL
            for (int e = 0; e < 8; e++) scores[u][e] = 0.0f;
        }
        multiply_keys(scores, q, k);
        if (masked) {
            UNROLL
            for (int u = 0; u < UNITS; u++) {
                UNROLL
                for (int e = 0; e < 8; e++)
                    if (!mask.sees(slot(e), first_key + u * 16 + column(e))) scores[u][e] = -infinity();
            }
        }
        float highest[2] = {-infinity(), -infinity()};
        UNROLL
        for (int u = 0; u < UNITS; u++) {
            UNROLL
            for (int e = 0; e < 8; e++) {
                scores[u][e] *= scale;
                highest[slot(e)] = fmaxf(highest[slot(e)], scores[u][e]);
            }
        }
        float base[2], factor[2];
        UNROLL
        for (int j = 0; j < 2; j++) {
            highest[j] = fmaxf(highest[j], shuffle_xor(highest[j], REDUCE_1));
            highest[j] = fmaxf(highest[j], shuffle_xor(highest[j], REDUCE_2));
            highest[j] = fmaxf(highest[j], peak[j]);
            base[j] = highest[j] == -infinity() ? 0.0f : highest[j];  // nothing seen yet: no inf - inf
            factor[j] = exp2_fast(peak[j] - base[j]);
            peak[j] = highest[j];
            sum[j] *= factor[j];
        }
        UNROLL
        for (int u = 0; u < UNITS; u++) {
            UNROLL
            for (int e = 0; e < 8; e++) {
                scores[u][e] = exp2_fast(scores[u][e] - base[slot(e)]);
                sum[slot(e)] += scores[u][e];
            }
        }
        UNROLL
        for (int c = 0; c < HEAD / 16; c++) {
            UNROLL
            for (int e = 0; e < 8; e++) result[c][e] *= factor[slot(e)];
        }
        multiply_values(scores, v);
    }

    // Every lane has summed its own keys.
    DEVICE void finish() {
        UNROLL
        for (int j = 0; j < 2; j++) {
            sum[j] += shuffle_xor(sum[j], REDUCE_1);
            sum[j] += shuffle_xor(sum[j], REDUCE_2);
        }
    }

    template <class F>
    DEVICE void each(F f) {
        UNROLL
        for (int c = 0; c < HEAD / 16; c++) {
            UNROLL
            for (int e = 0; e < 8; e++) f(slot(e), c * 16 + column(e), result[c][e]);
        }
    }
};

// WARP_ROWS rows in plain fp32 arithmetic: for fp32, and for bf16 where no tensor core takes it. A lane has one key
// when scores are made, and every 32nd column of the results.
template <typename T, int HEAD, int WARP_KEYS, int WARP_ROWS>
struct PlainArithmetic {
    static constexpr int ROWS = WARP_ROWS, SLOTS = WARP_ROWS, KEYS = WARP_KEYS;
    static constexpr int PER_CHUNK = 16 / (int)sizeof(T), STRIDE = HEAD + PER_CHUNK, COLUMNS = (HEAD + 31) / 32;
    using Mask = RowMask<SLOTS>;
    float result[ROWS][COLUMNS], peak[ROWS], sum[ROWS];

    static DEVICE int lane() { return threadIdx.x & 31; }
    static DEVICE int row(int j) { return j; }
    static DEVICE bool speaks_for_row() { return lane() == 0; }

    DEVICE void clear() {
        UNROLL
        for (int j = 0; j < ROWS; j++) {
            peak[j] = -infinity();
            sum[j] = 0.0f;
            UNROLL
            for (int c = 0; c < COLUMNS; c++) result[j][c] = 0.0f;
        }
    }

    static DEVICE void widen(float (&to)[PER_CHUNK], const T* from) {
        const Chunk chunk = *(const Chunk*)from;
        UNROLL
        for (int i = 0; i < PER_CHUNK; i++) {
            if constexpr (sizeof(T) == 4)
                to[i] = bits_to_float(chunk.words[i]);
            else
                to[i] = to_float(T{(unsigned short)(chunk.words[i / 2] >> (16 * (i & 1)))});
        }
    }

    DEVICE void step(const T* q, const T* k, const T* v, int first_key, bool masked, const Mask& mask, float scale) {
        float scores[ROWS];
        UNROLL
        for (int j = 0; j < ROWS; j++) scores[j] = 0.0f;
        const bool has_key = KEYS == 32 || lane() < KEYS;
        const T* key = k + (has_key ? lane() : 0) * STRIDE;
        UNROLL
        for (int c = 0; c < HEAD; c += PER_CHUNK) {
            float wide_key[PER_CHUNK];
            widen(wide_key, key + c);
            UNROLL
            for (int j = 0; j < ROWS; j++) {
                float wide_query[PER_CHUNK];
                widen(wide_query, q + j * STRIDE + c);
                UNROLL
                for (int i = 0; i < PER_CHUNK; i++) scores[j] += wide_query[i] * wide_key[i];
            }
        }
        UNROLL
        for (int j = 0; j < ROWS; j++) {
            const bool seen = has_key && (!masked || mask.sees(j, first_key + lane()));
            scores[j] = seen ? scores[j] * scale : -infinity();
            float highest = scores[j];
            UNROLL
            for (int bit = 16; bit > 0; bit >>= 1) highest = fmaxf(highest, shuffle_xor(highest, bit));
            highest = fmaxf(highest, peak[j]);
            const float base = highest == -infinity() ? 0.0f : highest;
            const float factor = exp2_fast(peak[j] - base);
            peak[j] = highest;
            scores[j] = exp2_fast(scores[j] - base);
            sum[j] = sum[j] * factor + scores[j];
            UNROLL
            for (int c = 0; c < COLUMNS; c++) result[j][c] *= factor;
        }
        UNROLL
        for (int n = 0; n < KEYS; n++) {
            float value[COLUMNS];
            UNROLL
            for (int c = 0; c < COLUMNS; c++) {
                const int at = lane() + 32 * c;
                value[c] = HEAD % 32 == 0 || at < HEAD ? to_float(v[n * STRIDE + at]) : 0.0f;
            }
            UNROLL
            for (int j = 0; j < ROWS; j++) {
                const float p = shuffle(scores[j], n);
                UNROLL
                for (int c = 0; c < COLUMNS; c++) result[j][c] += p * value[c];
            }
        }
    }

    DEVICE void finish() {
        UNROLL
        for (int j = 0; j < ROWS; j++) {
            UNROLL
            for (int bit = 16; bit > 0; bit >>= 1) sum[j] += shuffle_xor(sum[j], bit);
        }
    }

    template <class F>
    DEVICE void each(F f) {
        UNROLL
        for (int j = 0; j < ROWS; j++) {
            UNROLL
            for (int c = 0; c < COLUMNS; c++) {
                const int at = lane() + 32 * c;
                if (HEAD % 32 == 0 || at < HEAD) f(j, at, result[j][c]);
            }
        }
    }
};
#endif  // HEXGEN_ENGINES
