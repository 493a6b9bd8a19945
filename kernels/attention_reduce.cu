// Puts together what several tasks found for the same rows over different keys (flash decoding's second kernel).
#include "attention.cuh"

struct Job {
    int run, first_row;  // a negative run: nothing to do
    int first_partial, partials;
};

// A block along x: one row of a tile of ``tile_rows``; along y: a KV head. Its four warps take every fourth partial.
KERNEL void __launch_bounds__(128) attention_reduce(const Job* jobs, int tile_rows, ATTENTION_PARAMETERS) {
    const Attention a = ATTENTION_VALUES;
    constexpr int COLUMNS = (HX_HEAD + 31) / 32;
    __shared__ float results[4][HX_HEAD], stats[4][2];
    const Job job = jobs[blockIdx.x / tile_rows];
    if (job.run < 0) return;
    const int r = blockIdx.x % tile_rows, kv_head = blockIdx.y, lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    const Run run = a.runs[job.run];
    const Readers readers(a, kv_head);
    const int row = job.first_row + r;
    if (row >= run.length * readers.count) return;
    float result[COLUMNS], peak = -infinity(), sum = 0.0f;
    UNROLL
    for (int c = 0; c < COLUMNS; c++) result[c] = 0.0f;
    for (int i = warp; i < job.partials; i += 4) {
        const long long at = ((long long)(job.first_partial + i) * a.kv_heads + kv_head) * tile_rows + r;
        const float other = a.partial_stats[at * 2], other_sum = a.partial_stats[at * 2 + 1];
        if (other == -infinity()) continue;  // the mask left nothing of this range
        const float highest = fmaxf(peak, other);
        const float old_factor = exp2_fast(peak - highest), factor = exp2_fast(other - highest);
        peak = highest;
        sum = sum * old_factor + other_sum * factor;
        UNROLL
        for (int c = 0; c < COLUMNS; c++) {
            const int column = lane + 32 * c;
            const float value = column < HX_HEAD ? a.partial_out[at * HX_HEAD + column] : 0.0f;
            result[c] = result[c] * old_factor + value * factor;
        }
    }
    if (lane == 0) {
        stats[warp][0] = peak;
        stats[warp][1] = sum;
    }
    UNROLL
    for (int c = 0; c < COLUMNS; c++)
        if (lane + 32 * c < HX_HEAD) results[warp][lane + 32 * c] = result[c];
    __syncthreads();
    float highest = stats[0][0], total = 0.0f, factors[4];
    UNROLL
    for (int w = 1; w < 4; w++) highest = fmaxf(highest, stats[w][0]);
    UNROLL
    for (int w = 0; w < 4; w++) {
        factors[w] = highest == -infinity() ? 0.0f : exp2_fast(stats[w][0] - highest);
        total += stats[w][1] * factors[w];
    }
    const float divided = total > 0.0f ? 1.0f / total : 0.0f;
    const long long token = run.row + row / readers.count;
    HX_DTYPE* place = (HX_DTYPE*)a.out + (token * a.query_heads + readers.first + row % readers.count) * HX_HEAD;
    for (int column = threadIdx.x; column < HX_HEAD; column += 128) {
        float value = 0.0f;
        UNROLL
        for (int w = 0; w < 4; w++) value += results[w][column] * factors[w];
        place[column] = from_float<HX_DTYPE>(value * divided);
    }
}
