// What the kernels ask of the hardware: 16-bit floats, shuffles, asynchronous copies, tensor cores. Nothing here
// includes a CUDA header, so that NVRTC needs no files beside these. The test suite puts its own emulation of this
// file in its place (tests/kernel_host/emulation.h) and runs the kernels on the host.
#ifndef HEXGEN_INTRINSICS
#define HEXGEN_INTRINSICS

#define DEVICE __device__ __forceinline__
#define KERNEL extern "C" __global__
#define UNROLL _Pragma("unroll")

struct half_t {
    unsigned short bits;
};
struct bf16_t {
    unsigned short bits;
};

struct alignas(16) Chunk {  // what one thread moves at once
    unsigned words[4];
};

DEVICE float infinity() { return __int_as_float(0x7f800000); }
DEVICE float bits_to_float(unsigned bits) { return __uint_as_float(bits); }
DEVICE unsigned float_to_bits(float x) { return __float_as_uint(x); }

DEVICE float to_float(float x) { return x; }
DEVICE float to_float(half_t x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}
DEVICE float to_float(bf16_t x) { return __uint_as_float((unsigned)x.bits << 16); }

template <typename T>
DEVICE T from_float(float x);
template <>
DEVICE float from_float<float>(float x) {
    return x;
}
template <>
DEVICE half_t from_float<half_t>(float x) {
    half_t y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}
template <>
DEVICE bf16_t from_float<bf16_t>(float x) {
    bf16_t y;
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#else
    const unsigned bits = __float_as_uint(x);
    // Round to nearest, ties to even; a NaN stays one.
    const unsigned rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    y.bits = (unsigned short)((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fffu : rounded);
#endif
    return y;
}

DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

template <typename V>
DEVICE V shuffle(V value, int source) {
    return __shfl_sync(0xffffffffu, value, source);
}
template <typename V>
DEVICE V shuffle_xor(V value, int mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
}
DEVICE unsigned ballot(bool here) { return __ballot_sync(0xffffffffu, here); }
DEVICE void warp_barrier() { __syncwarp(); }

DEVICE unsigned char* dynamic_shared() {
    extern __shared__ __align__(16) unsigned char hexgen_shared[];
    return hexgen_shared;
}

DEVICE unsigned shared_address(const void* pointer) { return (unsigned)__cvta_generic_to_shared(pointer); }

// 16 bytes from global to shared memory, zeros where not ``valid``. From sm_80 on asynchronous: there after
// ``copies_wait`` and a barrier. Before, it is there after a barrier.
DEVICE void copy_async(void* to, const void* from, bool valid) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0)
                 : "memory");
#else
    Chunk chunk = {{0u, 0u, 0u, 0u}};
    if (valid) chunk = *(const Chunk*)from;
    *(Chunk*)to = chunk;
#endif
}
DEVICE void copies_commit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int PENDING>  // groups that may still be under way
DEVICE void copies_wait() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}

// ---- tensor cores; layouts of fragments: PTX ISA, "Matrix Fragments for mma" ---------------------------------

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8 (sm_75).
DEVICE void load_matrices(unsigned (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
DEVICE void load_matrices_transposed(unsigned (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// c[16 x 8] += a[16 x 16] b[16 x 8]: one instruction from sm_80 on, two halves of k on sm_75 (fp16 only).
template <typename T>
DEVICE void mma_16x8x16(float* c, const unsigned (&a)[4], unsigned b0, unsigned b1);
template <>
DEVICE void mma_16x8x16<half_t>(float* c, const unsigned (&a)[4], unsigned b0, unsigned b1) {
#if __CUDA_ARCH__ >= 800
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#elif __CUDA_ARCH__ >= 750
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(b0));
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}
template <>
DEVICE void mma_16x8x16<bf16_t>(float* c, const unsigned (&a)[4], unsigned b0, unsigned b1) {
#if __CUDA_ARCH__ >= 800
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// Each quarter of a warp (lanes 4q .. 4q + 3 and 16 + 4q ...): c[8 x 8] += a[8 x 4] b[4 x 8], in fp16 (sm_70).
// ``B_ROWS``: b is held by rows (a lane has 4 neighbouring columns of one row), else by columns.
template <bool B_ROWS>
DEVICE void mma_8x8x4(float* c, const unsigned (&a)[2], const unsigned (&b)[2]) {
    if (B_ROWS) {
        asm volatile(
            "mma.sync.aligned.m8n8k4.row.row.f32.f16.f16.f32 {%0, %1, %2, %3, %4, %5, %6, %7}, {%8, %9}, "
            "{%10, %11}, {%0, %1, %2, %3, %4, %5, %6, %7};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7])
            : "r"(a[0]), "r"(a[1]), "r"(b[0]), "r"(b[1]));
    } else {
        asm volatile(
            "mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 {%0, %1, %2, %3, %4, %5, %6, %7}, {%8, %9}, "
            "{%10, %11}, {%0, %1, %2, %3, %4, %5, %6, %7};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7])
            : "r"(a[0]), "r"(a[1]), "r"(b[0]), "r"(b[1]));
    }
}

#endif  // HEXGEN_INTRINSICS
