// The best tokens of a shard of the vocabulary, as keys of 64 bits: the order-preserving bits of the logit, then the
// inverted id, so that of equal logits the lowest id has the largest key (worker/sampling_math.py, to_keys).
// NaN counts as 0, infinities as the largest finite values (as in the sampler), and minus zero equals zero.
#include "intrinsics.cuh"

typedef long long Key;

DEVICE unsigned ordered(float x) {  // unsigned order is the order of the floats
    const float largest = bits_to_float(0x7f7fffffu);
    unsigned bits = float_to_bits(x != x ? 0.0f : fminf(fmaxf(x, -largest), largest));
    if (bits == 0x80000000u) bits = 0u;
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
DEVICE Key key_of(unsigned order, int id) {
    const long long value = (int)(order ^ 0x80000000u);  // signed order
    return (long long)((unsigned long long)value << 32) | (long long)(0xffffffffu - (unsigned)id);
}

// The largest key of each row of logits [rows][columns]; ids begin at ``first_id``. A block: one row.
KERNEL void __launch_bounds__(256) greedy(const float* logits, const long long* rows, Key* out, int columns, int first_id) {
    __shared__ Key best_of_warp[8];
    const float* row = logits + (rows != nullptr ? rows[blockIdx.x] : (long long)blockIdx.x) * columns;
    unsigned best = 0u;
    int at = -1;
    for (int i = threadIdx.x; i < columns; i += 256) {
        const unsigned order = ordered(row[i]);
        if (order > best || at < 0) {
            best = order;
            at = i;
        }
    }
    Key key = at < 0 ? (Key)(1ull << 63) : key_of(best, first_id + at);
    UNROLL
    for (int bit = 16; bit > 0; bit >>= 1) {
        const Key other = shuffle_xor(key, bit);
        key = other > key ? other : key;
    }
    if ((threadIdx.x & 31) == 0) best_of_warp[threadIdx.x / 32] = key;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int w = 1; w < 8; w++) key = best_of_warp[w] > key ? best_of_warp[w] : key;
        out[blockIdx.x] = key;
    }
}

// The ``count`` largest keys of each row, in no order: the count-th largest logit by four rounds of counting eight
// bits, then everything above it, and of its equals the lowest ids. 0 < count <= columns. A block: one row.
KERNEL void __launch_bounds__(256) top_keys(const float* logits, Key* out, int columns, int first_id, int count) {
    __shared__ unsigned histogram[256];
    __shared__ unsigned shared_prefix, shared_wanted, taken;
    __shared__ unsigned equals_of_warp[8];
    const float* row = logits + (long long)blockIdx.x * columns;
    Key* place = out + (long long)blockIdx.x * count;
    unsigned prefix = 0u, wanted = (unsigned)count;  // the wanted-th largest among those that share the prefix
    for (int shift = 24; shift >= 0; shift -= 8) {
        histogram[threadIdx.x] = 0u;
        __syncthreads();
        for (int i = threadIdx.x; i < columns; i += 256) {
            const unsigned order = ordered(row[i]);
            if (shift == 24 || (order >> (shift + 8)) == (prefix >> (shift + 8)))
                atomicAdd(&histogram[(order >> shift) & 255u], 1u);
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            unsigned left = wanted;
            int digit = 255;
            while (histogram[digit] < left) left -= histogram[digit--];
            shared_prefix = prefix | ((unsigned)digit << shift);
            shared_wanted = left;
            taken = 0u;
        }
        __syncthreads();
        prefix = shared_prefix;
        wanted = shared_wanted;
    }
    // ``prefix`` is the count-th largest now; ``wanted`` of its equals are taken, in order of their ids.
    unsigned equals_before = 0u;
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x & 31;
    for (int first = 0; first < columns; first += 256) {
        const int i = first + threadIdx.x;
        const unsigned order = i < columns ? ordered(row[i]) : 0u;
        const bool equal = i < columns && order == prefix;
        const unsigned votes = ballot(equal);
        if (lane == 0) equals_of_warp[warp] = __popc(votes);
        __syncthreads();
        unsigned rank = equals_before + __popc(votes & ((1u << lane) - 1u)), all = 0u;
        for (unsigned w = 0; w < 8; w++) {
            if (w < warp) rank += equals_of_warp[w];
            all += equals_of_warp[w];
        }
        if (i < columns && (order > prefix || (equal && rank < wanted)))
            place[atomicAdd(&taken, 1u)] = key_of(order, first_id + i);
        equals_before += all;
        __syncthreads();
    }
}
