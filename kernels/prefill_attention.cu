// Prefilling: runs of many tokens, possibly late in a long context, so that the warps of a block share the rows
// (HX_WARPS_M) and every tile of keys serves all of them.
#include "attention_entry.cuh"

// Two blocks a multiprocessor are what the launch arithmetic aims at; without that word ptxas aims at more on sm_70,
// and spills.
KERNEL void __launch_bounds__(Block::THREADS, 2) prefill_attention(ATTENTION_PARAMETERS) {
    const Attention a = ATTENTION_VALUES;
    Block::run(a);
}
