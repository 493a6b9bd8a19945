"""What no plan can exceed: every device busy all the time with nothing but the arithmetic itself."""

from __future__ import annotations

from collections.abc import Sequence

from hexgen.cluster import DeviceType
from hexgen.model import DTYPE_BYTES, DType, ModelSpec
from hexgen.scheduler.figures import figures_of, flops_of
from hexgen.scheduler.traffic import Traffic


def upper_bound_tokens_s(
    model: ModelSpec, dtype: DType, devices: Sequence[DeviceType], traffic: Traffic, max_sequences: int
) -> float:
    """Output tokens/s by the sum of the devices' FLOP/s, or of their memory bandwidth, whichever is less.

    A request costs its multiply-adds whoever does them; and each of its decode steps reads every weight at least
    once for each ``max_sequences`` sequences, and its own keys and values.
    """
    compute = sum(flops_of(d, dtype) * figures_of(d).compute_share for d in devices)
    stream = sum(d.bandwidth_bytes_s * figures_of(d).bandwidth_share for d in devices)
    q, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
    layer = model.hidden_size * (2 * q + 2 * kv + 3 * model.intermediate_size)
    head = model.vocab_size * model.hidden_size
    flops = 2 * model.layers * layer * (traffic.prompt + traffic.decodes) + 2 * head * traffic.output
    read = model.kv_bytes_per_token(dtype) * traffic.decode_load(1.0).kv_read
    read += (model.layers * layer + head) * DTYPE_BYTES[dtype] / max_sequences
    requests = compute / flops
    if traffic.decodes > 0:
        requests = min(requests, stream / (read * traffic.decodes))
    return requests * traffic.output
