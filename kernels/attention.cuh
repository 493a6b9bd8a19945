// Attention over pages, one body for decoding and prefilling; decode_attention.cu and prefill_attention.cu choose
// how warps share the work.
//
// A *run* is some neighbouring tokens of one sequence (one token when it decodes). For one KV head, its *rows* are
// its tokens times the query heads that read this KV head, in the order (token, head): they all share one read of
// keys and values. A *task* is a tile of rows against a range of keys; what runs over several ranges is put together
// by attention_reduce.cu (flash decoding). Within a task: FlashAttention's online softmax (Dao et al.,
// arXiv:2205.14135, algorithm 1; base 2, as in FlashAttention-2, arXiv:2307.08691), accumulated in fp32.
//
// Keys and values of a layer: [pages][2: key, value][kv heads][PAGE][HEAD] of T.
#ifndef HEXGEN_ATTENTION
#define HEXGEN_ATTENTION
#include "engines.cuh"

struct Run {
    int row;     // of the first token, in the step's rows
    int length;  // tokens
    int start;   // position of the first token in its sequence
    int pages;   // where the sequence's pages begin in ``pages``
};

struct Task {
    int run;        // negative: nothing to do (tables of captured graphs are as long as their longest step's)
    int first_row;  // of the run's rows; tiles are equally many rows for all KV heads
    int key_begin;  // positions of the keys to look at, at most: the mask may leave fewer
    int key_end;
    int partial;  // where the unfinished result goes; -1: the task is the whole of its rows' attention
};

struct Attention {
    const void* q;         // [tokens][>= query heads][HEAD] of T; a token every q_stride elements
    const void* kv;        // the layer's pages
    void* out;             // [tokens][query heads][HEAD] of T
    const Run* runs;
    const Task* tasks;     // one a block along x
    const int* pages;
    float* partial_out;    // [partials][kv heads][rows of a tile][HEAD], not yet divided by the sum
    float* partial_stats;  // [partials][kv heads][rows of a tile][2]: base-2 maximum and sum
    // A tree of drafted tokens: bit k of row t (of ``tree_words`` words, one row a token of the step) says whether
    // the token sees the run's k-th token. 0: every token sees the run's tokens up to itself.
    const unsigned* tree;
    long long q_stride;
    int query_heads, kv_heads;
    int group, shift;      // local query head h reads local KV head (h + shift) / group
    int window;            // 0: none; else a token sees itself and window - 1 positions before
    int tree_words;
    float scale;           // of scores, times log2(e)
};

// Kernels take the fields one by one: launchers pass plain scalars.
#define ATTENTION_PARAMETERS                                                                                   \
    const void *q, const void *kv, void *out, const Run *runs, const Task *tasks, const int *pages,            \
        float *partial_out, float *partial_stats, const unsigned *tree, long long q_stride, int query_heads,   \
        int kv_heads, int group, int shift, int window, int tree_words, float scale
#define ATTENTION_VALUES                                                                                       \
    {q, kv, out, runs, tasks, pages, partial_out, partial_stats, tree, q_stride, query_heads, kv_heads, group, \
     shift, window, tree_words, scale}

// The query heads [first, first + count) that read a KV head: fewer at the edges of an uneven shard.
struct Readers {
    int first, count;
    DEVICE Readers(const Attention& a, int kv_head) {
        const int from = kv_head * a.group - a.shift, to = from + a.group;
        first = from < 0 ? 0 : from;
        count = (to > a.query_heads ? a.query_heads : to) - first;
    }
};

template <typename T, int HEAD, int PAGE, class Engine, int WARPS_M, int WARPS_N, int STAGES>
struct AttentionBlock {
    static constexpr int THREADS = 32 * WARPS_M * WARPS_N;
    static constexpr int ROWS = Engine::ROWS * WARPS_M;   // of a task
    static constexpr int KEYS = Engine::KEYS * WARPS_N;   // of a tile of keys
    static constexpr int STRIDE = Engine::STRIDE;         // elements between rows in shared memory
    static constexpr int PER_CHUNK = 16 / (int)sizeof(T);
    static constexpr int CHUNKS = HEAD / PER_CHUNK;       // of a row

    static DEVICE void load_queries(T* to, const Attention& a, const Run& run, const Readers& readers, int first_row,
                                    int rows) {
        for (int i = threadIdx.x; i < ROWS * CHUNKS; i += THREADS) {
            const int r = i / CHUNKS, part = i % CHUNKS;
            const bool valid = r < rows;
            const int row = first_row + (valid ? r : 0);
            const int token = run.row + row / readers.count, head = readers.first + row % readers.count;
            const T* from = (const T*)a.q + token * a.q_stride + head * HEAD + part * PER_CHUNK;
            copy_async(to + r * STRIDE + part * PER_CHUNK, from, valid);
        }
    }

    // Keys and values at positions [first, first + KEYS); zeros from ``end`` on, where nobody may look.
    static DEVICE void load_tile(T* to, const Attention& a, const int* pages, int kv_head, int first, int end) {
        for (int i = threadIdx.x; i < KEYS * CHUNKS; i += THREADS) {
            const int r = i / CHUNKS, part = i % CHUNKS;
            const bool valid = first + r < end;
            const int position = valid ? first + r : first;
            const long long page = pages[position / PAGE];
            const long long key_row = ((page * 2) * a.kv_heads + kv_head) * PAGE + position % PAGE;
            const T* key = (const T*)a.kv + key_row * HEAD + part * PER_CHUNK;
            T* place = to + r * STRIDE + part * PER_CHUNK;
            copy_async(place, key, valid);
            copy_async(place + KEYS * STRIDE, key + (long long)a.kv_heads * PAGE * HEAD, valid);
        }
    }

    static DEVICE void run(const Attention& a) {
        const Task task = a.tasks[blockIdx.x];
        if (task.run < 0) return;
        const Run run = a.runs[task.run];
        const int kv_head = blockIdx.y, warp = threadIdx.x / 32, warp_m = warp / WARPS_N, warp_n = warp % WARPS_N;
        const Readers readers(a, kv_head);
        const int all_rows = run.length * readers.count;
        if (task.first_row >= all_rows) return;
        const int rows = min(ROWS, all_rows - task.first_row);
        const int first_token = task.first_row / readers.count;
        const int last_token = (task.first_row + rows - 1) / readers.count;
        const int end = min(task.key_end, run.start + last_token + 1);
        const int first_seen = a.window > 0 ? max(0, run.start + first_token - a.window + 1) : 0;
        const int begin = max(task.key_begin, first_seen);
        const int tiles = end > begin ? (end - begin + KEYS - 1) / KEYS : 0;

        T* queries = (T*)dynamic_shared();
        T* stages = queries + ROWS * STRIDE;
        const int* pages = a.pages + run.pages;
        constexpr int STAGE = 2 * KEYS * STRIDE;

        Engine engine;
        typename Engine::Mask mask;
        engine.clear();
        mask.run_start = run.start;
        mask.tree = a.tree != nullptr;
        UNROLL
        for (int j = 0; j < Engine::SLOTS; j++) {
            const int r = warp_m * Engine::ROWS + engine.row(j);
            const int token = r < rows ? (task.first_row + r) / readers.count : last_token;
            const int position = run.start + token;
            mask.lower[j] = a.window > 0 ? position - a.window + 1 : 0;
            mask.upper[j] = min(position, end - 1);
            mask.bits[j] = a.tree + (long long)(run.row + token) * a.tree_words;
        }
        // Keys in [open_from, open_to] are seen by every row of the block.
        const int open_from = a.window > 0 ? run.start + last_token - a.window + 1 : 0;
        const int open_to = a.tree != nullptr ? run.start - 1 : min(run.start + first_token, end - 1);

        load_queries(queries, a, run, readers, task.first_row, rows);
        UNROLL
        for (int s = 0; s < (STAGES > 1 ? STAGES - 1 : 1); s++) {
            if (s < tiles) load_tile(stages + s * STAGE, a, pages, kv_head, begin + s * KEYS, end);
            copies_commit();
        }
        for (int tile = 0; tile < tiles; tile++) {
            copies_wait<(STAGES > 1 ? STAGES - 2 : 0)>();
            __syncthreads();  // the tile is here, and the one before has been used by everybody
            if (STAGES > 1) {
                const int next = tile + STAGES - 1;
                if (next < tiles)
                    load_tile(stages + next % STAGES * STAGE, a, pages, kv_head, begin + next * KEYS, end);
                copies_commit();
            }
            const T* keys = stages + tile % STAGES * STAGE + warp_n * Engine::KEYS * STRIDE;
            const int first_key = begin + tile * KEYS + warp_n * Engine::KEYS;
            const bool open = first_key >= open_from && first_key + Engine::KEYS - 1 <= open_to;
            const T* mine = queries + warp_m * Engine::ROWS * STRIDE;
            engine.step(mine, keys, keys + KEYS * STRIDE, first_key, !open, mask, a.scale);
            if (STAGES == 1) {
                __syncthreads();
                if (tile + 1 < tiles)
                    load_tile(stages, a, pages, kv_head, begin + (tile + 1) * KEYS, end);
                copies_commit();
            }
        }
        copies_wait<0>();
        engine.finish();
        if (WARPS_N > 1) {
            __syncthreads();
            merge(engine, (float*)stages, warp_m, warp_n);
            if (warp_n != 0) return;
        }
        store(engine, a, task, run, readers, kv_head, warp_m * Engine::ROWS, rows);
    }

    // Warps that saw different keys: everything goes into the first of them. ``area``: [WARPS_N][ROWS][2] maxima and
    // sums, then [ROWS][HEAD] results.
    static DEVICE void merge(Engine& engine, float* area, int warp_m, int warp_n) {
        float* results = area + WARPS_N * ROWS * 2;
        float* stats = area + warp_n * ROWS * 2;
        UNROLL
        for (int j = 0; j < Engine::SLOTS; j++) {
            const int r = warp_m * Engine::ROWS + engine.row(j);
            if (engine.speaks_for_row()) {
                stats[r * 2] = engine.peak[j];
                stats[r * 2 + 1] = engine.sum[j];
            }
        }
        __syncthreads();
        float factor[Engine::SLOTS];
        UNROLL
        for (int j = 0; j < Engine::SLOTS; j++) {
            const int r = warp_m * Engine::ROWS + engine.row(j);
            float peak = -infinity(), sum = 0.0f;
            UNROLL
            for (int w = 0; w < WARPS_N; w++) peak = fmaxf(peak, area[(w * ROWS + r) * 2]);
            const float base = peak == -infinity() ? 0.0f : peak;
            UNROLL
            for (int w = 0; w < WARPS_N; w++)
                sum += area[(w * ROWS + r) * 2 + 1] * exp2_fast(area[(w * ROWS + r) * 2] - base);
            factor[j] = exp2_fast(engine.peak[j] - base);
            engine.peak[j] = peak;
            engine.sum[j] = sum;
        }
        UNROLL
        for (int w = WARPS_N - 1; w >= 0; w--) {
            if (w == warp_n) {
                engine.each([&](int j, int column, float& value) {
                    float* place = results + (warp_m * Engine::ROWS + engine.row(j)) * HEAD + column;
                    value *= factor[j];
                    if (w < WARPS_N - 1) value += *place;
                    if (w > 0) *place = value;
                });
            }
            __syncthreads();
        }
    }

    static DEVICE void store(Engine& engine, const Attention& a, const Task& task, const Run& run,
                             const Readers& readers, int kv_head, int warp_row, int rows) {
        if (task.partial >= 0) {
            const long long tile = ((long long)task.partial * a.kv_heads + kv_head) * ROWS;
            engine.each([&](int j, int column, float& value) {
                const int r = warp_row + engine.row(j);
                if (r < rows) a.partial_out[(tile + r) * HEAD + column] = value;
            });
            UNROLL
            for (int j = 0; j < Engine::SLOTS; j++) {
                const int r = warp_row + engine.row(j);
                if (r < rows && engine.speaks_for_row()) {
                    a.partial_stats[(tile + r) * 2] = engine.peak[j];
                    a.partial_stats[(tile + r) * 2 + 1] = engine.sum[j];
                }
            }
            return;
        }
        float scale[Engine::SLOTS];
        T* place[Engine::SLOTS];
        UNROLL
        for (int j = 0; j < Engine::SLOTS; j++) {
            const int row = task.first_row + warp_row + engine.row(j);
            const long long token = run.row + row / readers.count;
            place[j] = (T*)a.out + (token * a.query_heads + readers.first + row % readers.count) * HEAD;
            scale[j] = engine.sum[j] > 0.0f ? 1.0f / engine.sum[j] : 0.0f;
        }
        engine.each([&](int j, int column, float& value) {
            if (warp_row + engine.row(j) < rows) place[j][column] = from_float<T>(value * scale[j]);
        });
    }
};
#endif  // HEXGEN_ATTENTION
