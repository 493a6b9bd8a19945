// Decoding: runs are short and contexts long, so that the warps of a block share the keys (HX_WARPS_N), and tasks
// the context (splits). The query heads of a KV head are the rows of one tile: keys and values are read once.
#include "attention_entry.cuh"

KERNEL void __launch_bounds__(Block::THREADS) decode_attention(ATTENTION_PARAMETERS) {
    const Attention a = ATTENTION_VALUES;
    Block::run(a);
}
