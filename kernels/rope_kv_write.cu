// Per-head norm of queries and keys (where the model has it), rotary embedding, and the write of keys and values
// into their pages: one pass over the projected rows. Queries are rotated in place.
#include "intrinsics.cuh"

// A warp: one head of one token. Lane l has elements l, l + 32, ... of the first half and their partners in the second.
KERNEL void __launch_bounds__(128) rope_kv_write(
    void* qkv,               // [tokens][query heads, kv heads (keys), kv heads (values)][HEAD] of T
    const void* all_cosines, // [tokens][HEAD] of T
    const void* all_sines,   // [tokens][HEAD] of T, negative in the first half
    const void* q_norm,      // [HEAD] of T, or 0
    const void* k_norm,
    void* kv,                // the layer's pages: [pages][2][kv heads][page_size][HEAD] of T
    const long long* slots,  // [tokens]: page * page_size + place in the page; negative: nothing is written
    long long qkv_stride,    // elements from token to token
    int tokens, int query_heads, int kv_heads, int page_size, float eps) {
    using T = HX_DTYPE;
    constexpr int HALF = HX_HEAD / 2, PAIRS = (HALF + 31) / 32;
    const int heads = query_heads + 2 * kv_heads, lane = threadIdx.x & 31;
    const long long item = (long long)blockIdx.x * 4 + threadIdx.x / 32;
    if (item >= (long long)tokens * heads) return;
    const int token = (int)(item / heads), head = (int)(item % heads);
    const bool is_query = head < query_heads, is_value = head >= query_heads + kv_heads;
    T* row = (T*)qkv + token * qkv_stride + (long long)head * HX_HEAD;
    T* to = row;
    if (!is_query) {
        const long long slot = slots[token], page = slot / page_size, place = slot % page_size;
        if (slot < 0) return;
        const int kv_head = head - query_heads - (is_value ? kv_heads : 0);
        to = (T*)kv + (((page * 2 + (is_value ? 1 : 0)) * kv_heads + kv_head) * page_size + place) * HX_HEAD;
    }
    float low[PAIRS], high[PAIRS];
    UNROLL
    for (int i = 0; i < PAIRS; i++) {
        const int at = lane + 32 * i;
        low[i] = at < HALF ? to_float(row[at]) : 0.0f;
        high[i] = at < HALF ? to_float(row[at + HALF]) : 0.0f;
    }
    const T* norm = (const T*)(is_query ? q_norm : k_norm);
    if (!is_value && norm != nullptr) {
        float squares = 0.0f;
        UNROLL
        for (int i = 0; i < PAIRS; i++) squares += low[i] * low[i] + high[i] * high[i];
        UNROLL
        for (int bit = 16; bit > 0; bit >>= 1) squares += shuffle_xor(squares, bit);
        const float scale = rsqrtf(squares / HX_HEAD + eps);
        UNROLL
        for (int i = 0; i < PAIRS; i++) {
            const int at = lane + 32 * i;
            if (at < HALF) {  // rounded where the published models round
                low[i] = to_float(from_float<T>(to_float(from_float<T>(low[i] * scale)) * to_float(norm[at])));
                high[i] = to_float(from_float<T>(to_float(from_float<T>(high[i] * scale)) * to_float(norm[at + HALF])));
            }
        }
    }
    const T* cosines = (const T*)all_cosines + (long long)token * HX_HEAD;
    const T* sines = (const T*)all_sines + (long long)token * HX_HEAD;
    UNROLL
    for (int i = 0; i < PAIRS; i++) {
        const int at = lane + 32 * i;
        if (at < HALF) {
            float first = low[i], second = high[i];
            if (!is_value) {
                first = low[i] * to_float(cosines[at]) + high[i] * to_float(sines[at]);
                second = high[i] * to_float(cosines[at + HALF]) + low[i] * to_float(sines[at + HALF]);
            }
            to[at] = from_float<T>(first);
            to[at + HALF] = from_float<T>(second);
        }
    }
}
