"""Every plan of a small cluster: all groups, all orders, all divisions of layers, all partitions into pipelines.

The best pipeline of each set of devices comes from enumeration, the best partition from dynamic programming over
sets (for throughput the pipelines' rates add up). Equal devices of a node are interchangeable and counted once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, product

from hexgen.errors import SpecError
from hexgen.scheduler.cost import GroupShape
from hexgen.scheduler.groups import Group, Topology, islands, spanning_groups
from hexgen.scheduler.improve import Partition, make_partition
from hexgen.scheduler.solver import RouteSolver, Solution

MAX_DEVICES = 6
Counts = tuple[int, ...]  # devices of each node


def exact(solver: RouteSolver) -> Partition | None:
    """The best partition there is, within the space of the heuristic: groups inside nodes or islands."""
    topology = solver.topology
    total = tuple(node.count for node in topology.nodes)
    if sum(total) > MAX_DEVICES:
        raise SpecError(
            f"{sum(total)} devices are too many for the exact engine, which enumerates up to {MAX_DEVICES}",
            where="--engine exact",
            remedy="use --engine auto",
        )
    pipelines = {counts: _best_pipeline(solver, counts) for counts in product(*(range(n + 1) for n in total))}
    best: dict[Counts, tuple[float, tuple[Counts, ...]]] = {tuple(0 for _ in total): (0.0, ())}
    if solver.goal == "latency":
        solutions = [solution for solution in pipelines.values() if solution is not None]
        if not solutions:
            return None
        quickest = max(solutions, key=lambda solution: (solution.value, -solution.width))
        return make_partition(solver, [quickest], [])
    for counts in product(*(range(n + 1) for n in total)):
        if not any(counts):
            continue
        # Leaving devices out is never worse than forcing them in: start from the best of any smaller set.
        candidates = [best[_minus(counts, i)] for i, n in enumerate(counts) if n > 0]
        for used in product(*(range(n + 1) for n in counts)):
            solution = pipelines[used]
            if solution is not None:
                rest = tuple(a - b for a, b in zip(counts, used, strict=True))
                value, chosen = best[rest]
                candidates.append((value + solution.value, (*chosen, used)))
        best[counts] = max(candidates, key=lambda found: found[0])
    chosen = best[total][1]
    if not chosen:
        return None
    return make_partition(solver, _placed(solver, chosen, pipelines), [])


def _minus(counts: Counts, i: int) -> Counts:
    return tuple(n - (j == i) for j, n in enumerate(counts))


def _best_pipeline(solver: RouteSolver, counts: Counts) -> Solution | None:
    best: Solution | None = None
    for groups in _groupings(solver.topology, counts, solver.cost.model.heads):
        found = solver.best(groups)
        if found is not None and (best is None or found.value > best.value):
            best = found
    return best


def _groupings(topology: Topology, counts: Counts, heads: int) -> Iterator[list[Group]]:
    """All ways to make groups of exactly these devices."""
    yield from _within_nodes(topology, counts, [0] * len(counts), heads)
    for island in islands(topology):
        inside = [place for place in island if counts[place] > 0]
        for n in range(2, len(inside) + 1):
            for places in combinations(inside, n):
                for taken in product(*(range(1, counts[place] + 1) for place in places)):
                    members = [(p, i) for p, number in zip(places, taken, strict=True) for i in range(number)]
                    offsets = [0] * len(counts)
                    for place, number in zip(places, taken, strict=True):
                        offsets[place] = number
                    for group in spanning_groups(topology, members, heads):
                        for rest in _within_nodes(topology, counts, offsets, heads):
                            yield [group, *rest]


def _within_nodes(topology: Topology, counts: Counts, offsets: Sequence[int], heads: int) -> Iterator[list[Group]]:
    options: list[list[list[Group]]] = []
    for place, (count, offset) in enumerate(zip(counts, offsets, strict=True)):
        node = topology.nodes[place]
        ways: list[list[Group]] = []
        for widths in _partitions(count - offset, heads):
            start, groups = offset, []
            for width in widths:
                devices = tuple(f"{node.name}/{i}" for i in range(start, start + width))
                groups.append(Group(devices, GroupShape((node.device,) * width, node.link), place))
                start += width
            ways.append(groups)
        options.append(ways)
    for chosen in product(*options):
        yield [group for groups in chosen for group in groups]


def _partitions(n: int, largest: int) -> Iterator[list[int]]:
    """The ways to write ``n`` as a sum of positive numbers up to ``largest``, largest first."""
    if n == 0:
        yield []
    for first in range(min(n, largest), 0, -1):
        for rest in _partitions(n - first, first):
            yield [first, *rest]


def _placed(
    solver: RouteSolver, chosen: Sequence[Counts], pipelines: dict[Counts, Solution | None]
) -> list[Solution]:
    """Solutions were found with each node's first devices; give every pipeline its own."""
    offsets = [0] * len(solver.topology.nodes)
    placed: list[Solution] = []
    for counts in chosen:
        solution = pipelines[counts]
        if solution is None:
            continue
        groups = tuple(_moved(group, solver.topology, offsets) for group in solution.groups)
        placed.append(Solution(groups, solution.division, solution.value))
        offsets = [offset + n for offset, n in zip(offsets, counts, strict=True)]
    return placed


def _moved(group: Group, topology: Topology, offsets: Sequence[int]) -> Group:
    devices: list[str] = []
    for device in group.devices:
        name, number = device.rsplit("/", 1)
        devices.append(f"{name}/{int(number) + offsets[topology.index[name]]}")
    return Group(tuple(devices), group.shape, group.place)
