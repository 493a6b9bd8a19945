// Runs the kernels on the host: the threads of a block are coroutines that change places at barriers and shuffles.
// It takes the place of kernels/intrinsics.cuh. Tensor-core instructions are carried out as the PTX ISA describes
// their fragments ("Matrix Fragments for mma", "ldmatrix"); asynchronous copies land when they are waited for, not
// before. Shared memory is NaN until it is written. Not a simulator: no timing, no memory model, no bank conflicts.
#pragma once
#define HEXGEN_INTRINSICS

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

#define DEVICE inline
#define KERNEL extern "C"
#define UNROLL
#define __launch_bounds__(...)
#define __shared__ static
#define nullptr_t std::nullptr_t
using std::max;
using std::min;

struct half_t {
    unsigned short bits;
};
struct bf16_t {
    unsigned short bits;
};
struct alignas(16) Chunk {
    unsigned words[4];
};

namespace emulation {

struct Index {
    unsigned x, y, z;
};
struct Copy {
    void* to;
    const void* from;
    bool valid;
};
struct Warp {
    int arrived = 0, generation = 0;
    alignas(16) unsigned char slots[32][64];
};
struct Fiber {
    ucontext_t context;
    jmp_buf place;
    std::unique_ptr<unsigned char[]> stack;
    Index thread;
    bool begun = false, done = false;
    std::deque<std::vector<Copy>> groups;  // committed, not yet landed
    std::vector<Copy> open;
};

inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline Fiber* current;
inline jmp_buf scheduler;
inline ucontext_t scheduler_context;
inline Index block, grid, block_size;
inline unsigned char* shared;
inline size_t shared_bytes;
inline std::function<void()> body;
inline int arrived, generation, alive;
inline long progress;

[[noreturn]] inline void fail(const char* what) {
    fprintf(stderr, "emulated kernel: %s (block %u,%u)\n", what, block.x, block.y);
    abort();
}
inline void yield() {
    if (_setjmp(current->place) == 0) _longjmp(scheduler, 1);
}
inline void release_if_complete() {
    if (alive > 0 && arrived == alive) {
        arrived = 0;
        generation++;
    }
}
inline void block_barrier() {
    progress++;
    const int before = generation;
    arrived++;
    release_if_complete();
    while (generation == before) yield();
}
inline Warp& my_warp() { return warps[current->thread.x / 32]; }
inline int my_lane() { return current->thread.x % 32; }
inline void all_lanes() {
    progress++;
    Warp& warp = my_warp();
    const int before = warp.generation;
    if (++warp.arrived == 32) {
        warp.arrived = 0;
        warp.generation++;
    }
    while (warp.generation == before) yield();
}
// What every lane of the warp has brought.
template <typename V>
std::vector<V> exchange(const V& mine) {
    static_assert(sizeof(V) <= 64);
    Warp& warp = my_warp();
    memcpy(warp.slots[my_lane()], &mine, sizeof(V));
    all_lanes();
    std::vector<V> all(32);
    for (int i = 0; i < 32; i++) memcpy(&all[i], warp.slots[i], sizeof(V));
    all_lanes();
    return all;
}
inline void entry() {
    body();
    current->done = true;
    progress++;
    alive--;
    release_if_complete();
    _longjmp(scheduler, 1);
}
inline void run_block(unsigned threads) {
    constexpr size_t STACK = 256 * 1024;
    if (fibers.size() != threads) {
        fibers = std::vector<Fiber>(threads);
        for (auto& f : fibers) f.stack.reset(new unsigned char[STACK]);
    }
    warps.assign((threads + 31) / 32, Warp());
    memset(shared, 0xff, shared_bytes);
    arrived = generation = 0;
    alive = threads;
    for (unsigned i = 0; i < threads; i++) {
        Fiber& f = fibers[i];
        f.thread = {i, 0, 0};
        f.begun = f.done = false;
        f.groups.clear();
        f.open.clear();
    }
    long seen = -1;
    for (unsigned round = 0; alive > 0; round++) {
        if (progress == seen) fail("deadlock: some threads wait at a barrier that others do not reach");
        seen = progress;
        for (unsigned n = 0; n < threads; n++) {
            Fiber& f = fibers[round % 2 ? threads - 1 - n : n];  // changing order: an accidental one hides races
            if (f.done) continue;
            current = &f;
            if (_setjmp(scheduler) == 0) {
                if (f.begun) _longjmp(f.place, 1);
                f.begun = true;
                getcontext(&f.context);
                f.context.uc_stack.ss_sp = f.stack.get();
                f.context.uc_stack.ss_size = STACK;
                f.context.uc_link = nullptr;
                makecontext(&f.context, entry, 0);
                setcontext(&f.context);
            }
        }
    }
}
inline void launch(unsigned x, unsigned y, unsigned threads, size_t bytes, std::function<void()> kernel) {
    body = kernel;
    std::vector<Chunk> memory(bytes / 16 + 1);
    shared = (unsigned char*)memory.data();
    shared_bytes = bytes;
    grid = {x, y, 1};
    block_size = {threads, 1, 1};
    for (unsigned i = 0; i < x; i++)
        for (unsigned j = 0; j < y; j++) {
            block = {i, j, 0};
            run_block(threads);
        }
}
inline void check_shared(const void* p, size_t bytes, size_t alignment) {
    const auto* at = (const unsigned char*)p;
    if (at < shared || at + bytes > shared + shared_bytes) fail("an address outside shared memory");
    if ((uintptr_t)p % alignment) fail("a misaligned address in shared memory");
}
inline void land(const std::vector<Copy>& copies) {
    for (const Copy& c : copies) {
        if (c.valid)
            memcpy(c.to, c.from, 16);
        else
            memset(c.to, 0, 16);
    }
}
}  // namespace emulation

#define threadIdx (emulation::current->thread)
#define blockIdx (emulation::block)
#define gridDim (emulation::grid)
#define blockDim (emulation::block_size)

inline void __syncthreads() { emulation::block_barrier(); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline unsigned atomicAdd(unsigned* p, unsigned x) {
    const unsigned before = *p;
    *p += x;
    return before;
}

DEVICE float infinity() { return INFINITY; }
DEVICE float bits_to_float(unsigned bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
DEVICE unsigned float_to_bits(float x) {
    unsigned bits;
    memcpy(&bits, &x, 4);
    return bits;
}
DEVICE float to_float(float x) { return x; }
DEVICE float to_float(half_t x) {
    _Float16 h;
    memcpy(&h, &x, 2);
    return (float)h;
}
DEVICE float to_float(bf16_t x) { return bits_to_float((unsigned)x.bits << 16); }
template <typename T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
    return x;
}
template <>
inline half_t from_float<half_t>(float x) {
    const _Float16 h = (_Float16)x;
    half_t y;
    memcpy(&y, &h, 2);
    return y;
}
template <>
inline bf16_t from_float<bf16_t>(float x) {
    const unsigned bits = float_to_bits(x);
    if (x != x) return bf16_t{0x7fff};
    return bf16_t{(unsigned short)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
DEVICE float exp2_fast(float x) { return exp2f(x); }

template <typename V>
DEVICE V shuffle(V value, int source) {
    return emulation::exchange(value)[source & 31];
}
template <typename V>
DEVICE V shuffle_xor(V value, int mask) {
    return emulation::exchange(value)[emulation::my_lane() ^ mask];
}
DEVICE unsigned ballot(bool here) {
    const auto all = emulation::exchange((int)here);
    unsigned votes = 0;
    for (int i = 0; i < 32; i++) votes |= (all[i] ? 1u : 0u) << i;
    return votes;
}
DEVICE void warp_barrier() { emulation::all_lanes(); }
DEVICE unsigned char* dynamic_shared() { return emulation::shared; }

DEVICE void copy_async(void* to, const void* from, bool valid) {
    emulation::check_shared(to, 16, 16);
    if ((uintptr_t)from % 16) emulation::fail("a misaligned address in global memory");
    emulation::current->open.push_back({to, from, valid});
#if __CUDA_ARCH__ < 800
    emulation::land(emulation::current->open);
    emulation::current->open.clear();
#endif
}
DEVICE void copies_commit() {
    emulation::current->groups.push_back(emulation::current->open);
    emulation::current->open.clear();
}
template <int PENDING>
DEVICE void copies_wait() {
    auto& groups = emulation::current->groups;
    while ((int)groups.size() > PENDING) {
        emulation::land(groups.front());
        groups.pop_front();
    }
}

// ldmatrix .x4: lane 8 i + r gives the address of row r of matrix i. Lane l receives of every matrix the elements
// 2 (l % 4) and the next of row l / 4; transposed: of column l / 4.
DEVICE void load_any(unsigned (&r)[4], const void* row, bool transposed) {
    emulation::check_shared(row, 16, 16);
    const auto rows = emulation::exchange((const unsigned short*)row);
    const int lane = emulation::my_lane(), g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; i++) {
        const unsigned short low = transposed ? rows[8 * i + 2 * t][g] : rows[8 * i + g][2 * t];
        const unsigned short high = transposed ? rows[8 * i + 2 * t + 1][g] : rows[8 * i + g][2 * t + 1];
        r[i] = low | ((unsigned)high << 16);
    }
}
DEVICE void load_matrices(unsigned (&r)[4], const void* row) { load_any(r, row, false); }
DEVICE void load_matrices_transposed(unsigned (&r)[4], const void* row) { load_any(r, row, true); }

template <typename T>
float element(const unsigned* registers, int i) {
    return to_float(T{(unsigned short)(registers[i / 2] >> (16 * (i % 2)))});
}

// m16n8k16: with g = lane / 4, t = lane % 4: A's element i is at row g (+ 8 for i in 2, 3, 6, 7), column
// 2 t + i % 2 (+ 8 from i = 4 on); B's at row 2 t + i % 2 (+ 8 from i = 2 on), column g; C's at row g (+ 8 from
// i = 2 on), column 2 t + i % 2. (On sm_75 two m16n8k8, whose fragments are the halves of these.)
template <typename T>
DEVICE void mma_16x8x16(float* c, const unsigned (&a)[4], unsigned b0, unsigned b1) {
#if __CUDA_ARCH__ < 800
    static_assert(sizeof(T) == 2 && std::is_same_v<T, half_t>, "bf16 needs sm_80");
#endif
    struct Operands {
        unsigned a[4], b[2];
    };
    const auto all = emulation::exchange(Operands{{a[0], a[1], a[2], a[3]}, {b0, b1}});
    float left[16][16], right[16][8];
    for (int lane = 0; lane < 32; lane++) {
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 8; i++)
            left[g + (i & 2 ? 8 : 0)][2 * t + i % 2 + (i >= 4 ? 8 : 0)] = element<T>(all[lane].a, i);
        for (int i = 0; i < 4; i++) right[2 * t + i % 2 + (i >= 2 ? 8 : 0)][g] = element<T>(all[lane].b, i);
    }
    const int g = emulation::my_lane() / 4, t = emulation::my_lane() % 4;
    for (int i = 0; i < 4; i++) {
        const int row = g + (i >= 2 ? 8 : 0), column = 2 * t + i % 2;
        for (int k = 0; k < 16; k++) c[i] += left[row][k] * right[k][column];
    }
}

// m8n8k4: quarter q of the warp is lanes 4 q ... 4 q + 3 and 16 more. A (by rows): a lane has row lane % 4 (+ 4 in
// the upper half-warp), element i is column i. B by columns: column lane % 4 (+ 4), element i is row i; by rows:
// row lane % 4, element i is column i (+ 4). C (fp32): row (lane & 1) + (i & 2) (+ 4), column (i & 4) + (lane & 2) +
// (i & 1).
template <bool B_ROWS>
DEVICE void mma_8x8x4(float* c, const unsigned (&a)[2], const unsigned (&b)[2]) {
    struct Operands {
        unsigned a[2], b[2];
    };
    const auto all = emulation::exchange(Operands{{a[0], a[1]}, {b[0], b[1]}});
    const int me = emulation::my_lane(), quarter = (me % 16) / 4;
    float left[8][4], right[4][8];
    for (int n = 0; n < 8; n++) {
        const int lane = quarter * 4 + n % 4 + (n >= 4 ? 16 : 0), up = n >= 4 ? 4 : 0;
        for (int i = 0; i < 4; i++) {
            left[lane % 4 + up][i] = element<half_t>(all[lane].a, i);
            if (B_ROWS)
                right[lane % 4][i + up] = element<half_t>(all[lane].b, i);
            else
                right[i][lane % 4 + up] = element<half_t>(all[lane].b, i);
        }
    }
    for (int i = 0; i < 8; i++) {
        const int row = (me & 1) + (i & 2) + (me >= 16 ? 4 : 0), column = (i & 4) + (me & 2) + (i & 1);
        for (int k = 0; k < 4; k++) c[i] += left[row][k] * right[k][column];
    }
}
