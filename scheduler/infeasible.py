"""Why nothing fits, in bytes, and the smallest change that would help."""

from __future__ import annotations

import math

from hexgen.cluster import Cluster, DeviceType, Link
from hexgen.errors import InfeasibleError
from hexgen.memory import plan_dtype, usable_bytes
from hexgen.model import DTYPE_BYTES, ModelSpec
from hexgen.plan import EngineOptions
from hexgen.scheduler.cost import CostModel, GroupShape
from hexgen.scheduler.traffic import Traffic
from hexgen.units import format_bytes

_SOME_LINK = Link(1e9, 0.0)  # of a group of one device: never used


def infeasible(cluster: Cluster, model: ModelSpec, options: EngineOptions, traffic: Traffic) -> InfeasibleError:
    """The error for a cluster that cannot hold the model with room for one mean request."""
    devices = [node.device for node in cluster.nodes for _ in range(node.count)]
    dtype = plan_dtype(options, model, devices)
    cost = CostModel(model, dtype, options)
    weights = model.parameters * DTYPE_BYTES[dtype]
    kv = model.kv_bytes_per_token(dtype) * traffic.peak_tokens
    usable = sum(usable_bytes(device) for device in devices)
    held = sum(_layers_alone(cost, device, traffic) for device in devices)
    text = (
        f"{model.name} does not fit: weights {format_bytes(weights)} in {dtype} and KV for one request of "
        f"{traffic.peak_tokens} tokens {format_bytes(kv)}, and {len(devices)} devices offer "
        f"{format_bytes(usable)} usable"
    )
    if weights + kv > usable:
        text += f": {format_bytes(weights + kv - usable)} are missing"
    else:
        text += f", which hold {held} of {model.layers} layers once activations and whole layers are counted"
    return InfeasibleError(
        text, where=f"cluster {cluster.name}", remedy=_remedy(cluster, model, cost, traffic, held)
    )


def _layers_alone(cost: CostModel, device: DeviceType, traffic: Traffic) -> int:
    profile = cost.profile(GroupShape((device,), _SOME_LINK))
    return profile.max_layers(traffic.peak_tokens, False, False)


def _remedy(cluster: Cluster, model: ModelSpec, cost: CostModel, traffic: Traffic, held: int) -> str:
    """More devices of the type here that takes fewest of them."""
    types = sorted({node.device for node in cluster.nodes}, key=lambda device: (device.name, device.memory_bytes))
    missing = max(1, model.layers - held)
    best: tuple[int, str] | None = None
    for device in types:
        layers = _layers_alone(cost, device, traffic)
        if layers > 0 and (best is None or math.ceil(missing / layers) < best[0]):
            best = (math.ceil(missing / layers), f"{device.name} ({format_bytes(device.memory_bytes)})")
    if best is not None:
        count, name = best
        return f"add {count} more {'device' if count == 1 else 'devices'} of type {name}"
    profile = cost.profile(GroupShape((max(types, key=usable_bytes),), _SOME_LINK))
    need = profile.missing_bytes(1, traffic.peak_tokens, False, False)
    return (
        f"no device alone holds one layer; the largest lacks {format_bytes(need)}: use devices with more memory, "
        "or a smaller token_budget or max_sequences"
    )
