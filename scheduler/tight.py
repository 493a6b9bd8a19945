"""A first plan where memory is so scarce that no regular start fits: one pipeline, the roomiest groups first.

Widths are chosen for each kind of node by itself; of every such grouping the groups that hold most layers are
taken, one more at a time, until the model fits. The search then improves on what is found here.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice, product

from hexgen.scheduler.groups import Group, even_widths, node_groups
from hexgen.scheduler.improve import Partition, make_partition
from hexgen.scheduler.solver import RouteSolver

_MOST_GROUPINGS = 200
_ALL_WIDTHS = 8  # devices of a node: up to this many, every width is tried
_MOST_STAGES = 64


def tight_starts(solver: RouteSolver) -> Iterator[Partition]:
    """The first pipeline that fits of each grouping, for as many groupings as are affordable."""
    for groups in islice(_groupings(solver), _MOST_GROUPINGS):
        ordered = sorted(groups, key=lambda g: (-_room(solver, g), g.place, g.devices))
        most = min(len(ordered), solver.cost.model.layers, _MOST_STAGES)
        for n in range(_least(solver, ordered), most + 1):
            solution = solver.best(ordered[:n])
            if solution is not None:
                yield make_partition(solver, [solution], ordered[n:])
                break


def _groupings(solver: RouteSolver) -> Iterator[list[Group]]:
    """Nodes of one type and size are cut alike, each kind at every width (uneven rests make a smaller group)."""
    topology, heads = solver.topology, solver.cost.model.heads
    kinds = list(dict.fromkeys((node.device, node.count) for node in topology.nodes))
    widths = [_widths(count, heads) for _, count in kinds]
    for chosen in product(*widths):
        width_of = dict(zip(kinds, chosen, strict=True))
        groups: list[Group] = []
        for place, node in enumerate(topology.nodes):
            width = width_of[node.device, node.count]
            groups.extend(node_groups(topology, place, even_widths(node.count, width)))
        yield groups


def _widths(count: int, heads: int) -> list[int]:
    largest = min(count, heads)
    if largest <= _ALL_WIDTHS:
        return list(range(largest, 0, -1))
    return sorted({largest, largest // 2, 8, 4, 2, 1}, reverse=True)


def _room(solver: RouteSolver, group: Group) -> int:
    return solver.cost.profile(group.shape).max_layers(solver.traffic.peak_tokens, False, False)


def _least(solver: RouteSolver, ordered: list[Group]) -> int:
    """Fewer groups than this cannot hold the layers, even without embedding and head."""
    held = 0
    for n, group in enumerate(ordered, start=1):
        held += _room(solver, group)
        if held >= solver.cost.model.layers:
            return n
    return len(ordered) + 1
