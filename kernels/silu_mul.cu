// silu(gate) * up over rows [gate columns, up columns] (SwiGLU: Shazeer, arXiv:2002.05202).
#include "intrinsics.cuh"

KERNEL void __launch_bounds__(256) silu_mul(const HX_DTYPE* gate_up, HX_DTYPE* out, int columns) {
    using T = HX_DTYPE;
    constexpr int PER = 16 / (int)sizeof(T);
    struct alignas(16) Vector {
        T element[PER];
    };
    const long long row = blockIdx.y;
    const T* gate = gate_up + row * 2 * columns;
    const T* up = gate + columns;
    const int first = blockIdx.x * 256 + threadIdx.x, step = gridDim.x * 256;
    auto one = [](T g, T u) {
        const float x = to_float(g);
        const float active = to_float(from_float<T>(x / (1.0f + exp2_fast(-1.4426950408889634f * x))));
        return from_float<T>(active * to_float(u));
    };
    if (columns % PER == 0) {
        for (int i = first; i < columns / PER; i += step) {
            const Vector g = ((const Vector*)gate)[i], u = ((const Vector*)up)[i];
            Vector y;
            UNROLL
            for (int e = 0; e < PER; e++) y.element[e] = one(g.element[e], u.element[e]);
            ((Vector*)(out + row * columns))[i] = y;
        }
    } else {
        for (int i = first; i < columns; i += step) out[row * columns + i] = one(gate[i], up[i]);
    }
}
