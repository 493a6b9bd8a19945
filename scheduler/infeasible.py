"""Why nothing fits, in bytes, and the smallest changes that would help."""

from __future__ import annotations

from collections.abc import Sequence

from hexgen.cluster import Cluster, DeviceType, Link
from hexgen.errors import InfeasibleError
from hexgen.memory import plan_dtype, usable_bytes
from hexgen.model import DTYPE_BYTES, ModelSpec
from hexgen.plan import EngineOptions
from hexgen.scheduler.changes import Asked, smallest_changes
from hexgen.scheduler.cost import CostModel, GroupShape
from hexgen.scheduler.groups import Topology
from hexgen.scheduler.tables.source import CostTable
from hexgen.scheduler.traffic import Traffic
from hexgen.units import format_bytes

_SOME_LINK = Link(1e9, 0.0)  # of a group of one device: never used
_NODES_NAMED = 6


def infeasible(
    cluster: Cluster,
    model: ModelSpec,
    options: EngineOptions,
    traffic: Traffic,
    *,
    cost_table: CostTable | None = None,
    unreachable: Sequence[str] = (),
) -> InfeasibleError:
    """The error for a cluster that cannot hold the model with room for one mean request.

    ``unreachable``: nodes that were left out before, because no link leads to them.
    """
    devices = [node.device for node in cluster.nodes for _ in range(node.count)]
    dtype = plan_dtype(options, model, devices)
    cost = CostModel(model, dtype, options, cost_table)
    weights = model.parameters * DTYPE_BYTES[dtype]
    kv = model.kv_bytes_per_token(dtype) * traffic.peak_tokens
    usable = sum(max(0, usable_bytes(device)) for device in devices)
    text = (
        f"{model.name} does not fit: weights {format_bytes(weights)} in {dtype} and KV for one request of "
        f"{traffic.peak_tokens} tokens {format_bytes(kv)}, and {len(devices)} "
        f"{'device offers' if len(devices) == 1 else 'devices offer'} {format_bytes(usable)} usable"
    )
    if weights + kv > usable:
        text += f": {format_bytes(weights + kv - usable)} are missing"
    else:
        held = sum(_layers_alone(cost, device, traffic) for device in devices)
        text += f", which hold {held} of {model.layers} layers once activations and whole layers are counted"
        if held >= model.layers and not Topology(cluster).passable(range(len(cluster.nodes))):
            text += ", but links without bandwidth keep them apart"
    ways = [change.text for change in smallest_changes(Asked(cluster, model, options, traffic, cost_table))]
    if unreachable:
        named = _named(unreachable)
        text += f"; no link leads to {named}, whose memory is not counted"
        ways.insert(0, f"give the links to {named} a bandwidth, so that they count too")
        if len(ways) == 1:
            ways.append("use devices with more memory")
    ways = ways or [_larger_devices(cluster, cost, traffic)]
    return InfeasibleError(text, where=f"cluster {cluster.name}", remedy=", or ".join(ways))


def _named(nodes: Sequence[str]) -> str:
    more = f" and {len(nodes) - _NODES_NAMED} more" if len(nodes) > _NODES_NAMED else ""
    return ", ".join(nodes[:_NODES_NAMED]) + more


def _layers_alone(cost: CostModel, device: DeviceType, traffic: Traffic) -> int:
    profile = cost.profile(GroupShape((device,), _SOME_LINK))
    return profile.max_layers(traffic.peak_tokens, False, False)


def _larger_devices(cluster: Cluster, cost: CostModel, traffic: Traffic) -> str:
    """No number of these devices helps."""
    largest = max((node.device for node in cluster.nodes), key=usable_bytes)
    need = cost.profile(GroupShape((largest,), _SOME_LINK)).missing_bytes(1, traffic.peak_tokens, False, False)
    if need > 0:
        return (
            f"no device alone holds one layer; the largest lacks {format_bytes(need)}: use devices with more "
            "memory, or a smaller token_budget or max_sequences"
        )
    return "no number of these devices is enough: use devices with more memory, or a smaller model"
