"""What no plan can exceed: every device busy all the time with nothing but the arithmetic itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from hexgen.cluster import DeviceType, Node
from hexgen.model import DTYPE_BYTES, DType, ModelSpec
from hexgen.scheduler.figures import figures_of, flops_of
from hexgen.scheduler.traffic import Traffic


def upper_bound_tokens_s(
    model: ModelSpec,
    dtype: DType,
    nodes: Sequence[Node],
    traffic: Traffic,
    max_sequences: int,
    budget_usd_h: float | None = None,
) -> float:
    """Output tokens/s by the sum of the devices' FLOP/s, or of their memory bandwidth, whichever is less.

    Under a budget, of those nodes and parts of nodes that have most for their price.

    A request costs its multiply-adds whoever does them; and each of its decode steps reads every weight at least
    once for each ``max_sequences`` sequences, and its own keys and values.
    """
    compute = _most(nodes, lambda d: flops_of(d, dtype) * figures_of(d).compute_share, budget_usd_h)
    stream = _most(nodes, lambda d: d.bandwidth_bytes_s * figures_of(d).bandwidth_share, budget_usd_h)
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


def _most(nodes: Sequence[Node], figure: Callable[[DeviceType], float], budget_usd_h: float | None) -> float:
    """Of the figure, within the budget: a knapsack that may take parts."""
    total, left = 0.0, math.inf if budget_usd_h is None else budget_usd_h
    each = [(node.price_usd_h or 0.0, node.count * figure(node.device)) for node in nodes]
    for price, worth in sorted(each, key=lambda item: item[1] / item[0] if item[0] else math.inf, reverse=True):
        share = 1.0 if price <= left else left / price
        total += share * worth
        left -= share * price
    return total
