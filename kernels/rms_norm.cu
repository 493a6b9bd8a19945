// RMS norm (Zhang & Sennrich, arXiv:1910.07467), fused with the addition of a residual: residual += x, then
// out = residual / sqrt(mean(residual^2) + eps) * weight. Without x only the norm.
#include "intrinsics.cuh"

// A block: one row.
KERNEL void __launch_bounds__(256) rms_norm(HX_DTYPE* residual, const HX_DTYPE* x, const HX_DTYPE* weight, HX_DTYPE* out,
                                            int size, float eps) {
    using T = HX_DTYPE;
    __shared__ float sums[8];
    constexpr int PER = 16 / (int)sizeof(T);
    struct alignas(16) Vector {
        T element[PER];
    };
    const long long row = (long long)blockIdx.x * size;
    const bool whole = size % PER == 0;  // else rows are not aligned to 16 bytes
    float squares = 0.0f;
    for (int i = threadIdx.x; i < (whole ? size / PER : 0); i += 256) {
        Vector value = ((const Vector*)(residual + row))[i];
        if (x != nullptr) {
            const Vector more = ((const Vector*)(x + row))[i];
            UNROLL
            for (int e = 0; e < PER; e++)
                value.element[e] = from_float<T>(to_float(value.element[e]) + to_float(more.element[e]));
            ((Vector*)(residual + row))[i] = value;
        }
        UNROLL
        for (int e = 0; e < PER; e++) squares += to_float(value.element[e]) * to_float(value.element[e]);
    }
    for (int i = threadIdx.x; i < (whole ? 0 : size); i += 256) {
        T value = residual[row + i];
        if (x != nullptr) residual[row + i] = value = from_float<T>(to_float(value) + to_float(x[row + i]));
        squares += to_float(value) * to_float(value);
    }
    UNROLL
    for (int bit = 16; bit > 0; bit >>= 1) squares += shuffle_xor(squares, bit);
    if ((threadIdx.x & 31) == 0) sums[threadIdx.x / 32] = squares;
    __syncthreads();
    float total = 0.0f;
    UNROLL
    for (int w = 0; w < 8; w++) total += sums[w];
    const float scale = rsqrtf(total / size + eps);
    for (int i = threadIdx.x; i < (whole ? size / PER : 0); i += 256) {
        const Vector value = ((const Vector*)(residual + row))[i], w = ((const Vector*)weight)[i];
        Vector y;
        UNROLL
        for (int e = 0; e < PER; e++)
            y.element[e] = from_float<T>(to_float(from_float<T>(to_float(value.element[e]) * scale)) *
                                         to_float(w.element[e]));
        ((Vector*)(out + row))[i] = y;
    }
    for (int i = threadIdx.x; i < (whole ? 0 : size); i += 256)
        out[row + i] = from_float<T>(to_float(from_float<T>(to_float(residual[row + i]) * scale)) * to_float(weight[i]));
}
