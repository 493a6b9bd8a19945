// What is fixed when an attention kernel is compiled: HX_DTYPE, HX_HEAD (a multiple of 16), HX_PAGE, HX_TENSOR_CORES
// (0 or 1), HX_WARPS_M, HX_WARPS_N, HX_WARP_ROWS (16 on tensor cores), HX_WARP_KEYS, HX_STAGES.
#include "attention.cuh"

static_assert(HX_HEAD % 16 == 0 && HX_WARP_KEYS % 16 == 0, "tiles are made of units of 16");
#if HX_TENSOR_CORES
using Engine = TensorCores<HX_DTYPE, HX_HEAD, HX_WARP_KEYS>;
#else
using Engine = PlainArithmetic<HX_DTYPE, HX_HEAD, HX_WARP_KEYS, HX_WARP_ROWS>;
#endif
static_assert(Engine::ROWS == HX_WARP_ROWS, "the launch arithmetic and the kernel disagree on a tile's rows");
using Block = AttentionBlock<HX_DTYPE, HX_HEAD, HX_PAGE, Engine, HX_WARPS_M, HX_WARPS_N, HX_STAGES>;
