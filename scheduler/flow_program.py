"""The placement of largest flow by integer programming: how many groups of a kind hold which interval of layers.

Helix's program (ASPLOS'25, section 4) places every machine by itself; here equal nodes are one kind, so that they
cost no symmetry. Flow enters an interval at any of its layers, leaves at its end, and none is lost between. Links
are not in it: the placement is measured afterwards, with them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from hexgen.scheduler.flow_chains import NodeKind, node_kinds
from hexgen.scheduler.flow_graph import FlowSpace, Placed
from hexgen.scheduler.groups import Group, node_groups
from hexgen.scheduler.programs import pulp_or_none, solved
from hexgen.scheduler.times import end_index

_MOST_INTERVALS = 2500
_ENTER_ANYWHERE = 400  # intervals: with more, flow enters them only at their first layer

_Key = tuple[int, int, int, int]  # kind, width, first layer, end


def program_placement(space: FlowSpace, time_limit_s: float) -> list[Placed]:
    """The placement; nothing where the program is too large, or not solved in time."""
    kinds = node_kinds(space)
    capacity = _intervals(space, kinds)
    if not capacity or len(capacity) > _MOST_INTERVALS:
        return []
    pulp = pulp_or_none()
    if pulp is None:
        return []
    problem = pulp.LpProblem("intervals", pulp.LpMaximize)
    held = {key: pulp.LpVariable("x_" + "_".join(map(str, key)), 0, None, pulp.LpInteger) for key in capacity}
    into: dict[int, list[Any]] = defaultdict(list)
    out: dict[int, list[Any]] = defaultdict(list)
    anywhere = len(capacity) <= _ENTER_ANYWHERE
    for key, tokens_s in capacity.items():
        _, _, start, end = key
        flows = [
            pulp.LpVariable("y_" + "_".join(map(str, (*key, layer))), 0)
            for layer in range(start, end if anywhere else start + 1)
        ]
        for layer, flow in enumerate(flows, start=start):
            into[layer].append(flow)
        out[end] += flows
        problem += pulp.lpSum(flows) <= tokens_s * held[key]
    problem.setObjective(pulp.lpSum(into[0]))
    for layer in range(1, space.layers):
        problem += pulp.lpSum(into[layer]) == pulp.lpSum(out[layer])
    patterns = [_patterns(len(kind.widths)) for kind in kinds]
    cuts = [
        [pulp.LpVariable(f"p_{k}_{i}", 0, len(kind.places), pulp.LpInteger) for i in range(len(patterns[k]))]
        for k, kind in enumerate(kinds)
    ]
    for k, kind in enumerate(kinds):
        problem += pulp.lpSum(cuts[k]) <= len(kind.places)
        for width in range(1, len(kind.widths) + 1):
            there = pulp.lpSum(n.count(width) * cut for n, cut in zip(patterns[k], cuts[k], strict=True))
            problem += pulp.lpSum(x for key, x in held.items() if key[:2] == (k, width)) <= there
    if not solved(problem, timeLimit=time_limit_s):
        return []
    counts = {key: round(x.value() or 0) for key, x in held.items()}
    groups = _groups(space, kinds, [[round(cut.value() or 0) for cut in row] for row in cuts], patterns)
    return [
        Placed(groups[kind, width].pop(), start, end)
        for (kind, width, start, end), count in counts.items()
        for _ in range(count)
    ]


def _intervals(space: FlowSpace, kinds: Sequence[NodeKind]) -> dict[_Key, float]:
    """Tokens/s of a group of each kind and width on each interval that it can hold."""
    found: dict[_Key, float] = {}
    for k, kind in enumerate(kinds):
        for width in range(1, len(kind.widths) + 1):
            if not kind.widths[width - 1]:
                continue
            shape = node_groups(space.solver.topology, kind.places[0], [width])[0].shape
            for start in range(space.layers):
                for end in range(start + 1, min(space.layers, start + len(kind.widths[width - 1])) + 1):
                    rates = space.rates(shape, end_index(start == 0, end == space.layers))
                    if end - start <= len(rates):
                        found[k, width, start, end] = rates[end - start - 1]
                    if len(found) > _MOST_INTERVALS:
                        return found
    return found


def _patterns(devices: int, largest: int | None = None) -> list[tuple[int, ...]]:
    """The ways to cut a node into groups; every device is in one."""
    if devices == 0:
        return [()]
    return [
        (width, *rest)
        for width in range(min(devices, largest or devices), 0, -1)
        for rest in _patterns(devices - width, width)
    ]


def _groups(
    space: FlowSpace,
    kinds: Sequence[NodeKind],
    chosen: Sequence[Sequence[int]],
    patterns: Sequence[Sequence[tuple[int, ...]]],
) -> dict[tuple[int, int], list[Group]]:
    """The nodes of each kind cut as the program says: groups by kind and width."""
    groups: dict[tuple[int, int], list[Group]] = defaultdict(list)
    for k, kind in enumerate(kinds):
        places = list(kind.places)
        for pattern, count in zip(patterns[k], chosen[k], strict=True):
            for _ in range(count):
                for group in node_groups(space.solver.topology, places.pop(0), pattern):
                    groups[k, group.width].append(group)
    return groups
