"""How loaded the links between stages are, and what bounds the plan."""

from __future__ import annotations

from hexgen.model import DTYPE_BYTES
from hexgen.scheduler.explain.facts import Bottleneck, LinkUse
from hexgen.scheduler.explain.state import OpenPlan, node_of, nodes_of, steps_a_request


def link_uses(opened: OpenPlan) -> tuple[LinkUse, ...]:
    """Ways between nodes that routes take, the most loaded first; both directions are separate ways."""
    row_bytes = _row_bytes(opened)
    found: dict[tuple[str, str], tuple[float, float, dict[tuple[str, str], None]]] = {}
    for route, open_route, rate in zip(opened.plan.routes, opened.routes, opened.rates, strict=True):
        state = open_route.full
        steps_s = rate * steps_a_request(open_route)
        for index, seconds in enumerate(state.link_busy_s):
            pair = route.path[index].stage, route.path[index + 1].stage
            ends = node_of(opened.stages[pair[0]].devices[0]), node_of(opened.stages[pair[1]].devices[0])
            bytes_s, load, edges = found.get(ends, (0.0, 0.0, {}))
            edges[pair] = None
            sent = steps_s * state.mix.mean_tokens * row_bytes
            found[ends] = bytes_s + sent, load + steps_s * seconds, edges
    uses = [
        LinkUse(
            sender=a,
            receiver=b,
            bandwidth_bytes_s=opened.cluster.link(a, b).bandwidth_bytes_s,
            latency_s=opened.cluster.link(a, b).latency_s,
            bytes_s=bytes_s,
            load=load,
            edges=tuple(edges),
        )
        for (a, b), (bytes_s, load, edges) in found.items()
    ]
    return tuple(sorted(uses, key=lambda use: -use.load))


def bottleneck_of(opened: OpenPlan, text: str) -> Bottleneck:
    """``text``: as the prediction words it."""
    number = max(range(len(opened.routes)), key=lambda i: (opened.rates[i], -i))
    state = opened.routes[number].full
    names = [hop.stage for hop in opened.plan.routes[number].path]
    stages: tuple[str, ...]
    if state.limit == "link":
        stages = (names[state.index], names[state.index + 1])
    elif state.limit == "stage":
        stages = (names[state.index],)
    else:
        stages = tuple(names)
    devices = [device for name in stages for device in opened.stages[name].devices]
    return Bottleneck(
        route=number,
        kind=state.limit,
        stages=stages,
        nodes=nodes_of(devices),
        kv_bound=state.concurrency < opened.traffic.max_sequences,
        requests=round(state.concurrency),
        text=text,
    )


def _row_bytes(opened: OpenPlan) -> int:
    """Of one token's hidden state."""
    return opened.model.hidden_size * DTYPE_BYTES[opened.memory.dtype]
