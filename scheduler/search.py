"""Which devices form which stages, and which stages form which pipelines: a fast search over partitions.

Starts are built in a few regular ways (one width for all nodes; pipelines within regions or across; groups dealt so
that pipelines resemble each other, or so that each is of one kind), then the best are improved by moving, swapping,
splitting and merging groups until nothing helps or the budget is spent. The budget counts routes solved, not seconds,
so the same input and seed give the same plan; a time limit only ever cuts it short.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence

from hexgen.scheduler.groups import Group, Topology, even_widths, islands, node_groups, spanning_groups
from hexgen.scheduler.improve import Budget, Partition, improve, make_partition
from hexgen.scheduler.solver import RouteSolver, Solution

_ALL_COUNTS = 8  # pipelines: every number up to this is tried, then every half as many again
_IMPROVED_STARTS = 3
_WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 16)


def search(solver: RouteSolver, seed: int, deadline: float | None, routes: int) -> Partition | None:
    """The best partition found; None where no start fits."""
    starts = sorted(
        (p for p in _starts(solver, deadline) if p.routes), key=lambda p: -p.value
    )  # stable: ties keep the order in which they were built
    if not starts:
        return None
    best = starts[0]
    distinct: list[Partition] = []
    for start in starts:
        if all(abs(start.value - other.value) > 1e-9 * abs(other.value) for other in distinct):
            distinct.append(start)
    chosen = distinct[:_IMPROVED_STARTS]
    spent = solver.solved
    for i, start in enumerate(chosen):
        share = spent + routes * (i + 1) // len(chosen)
        improved = improve(solver, start, random.Random(seed), Budget(solver, share, deadline))
        if improved.value > best.value:
            best = improved
    return best


# ---- starts ---------------------------------------------------------------------------------------------------


def _starts(solver: RouteSolver, deadline: float | None) -> Iterator[Partition]:
    topology = solver.topology
    found = False
    for groups in _groupings(topology, solver.cost.model.heads):
        for domains in _domains(topology, groups):
            if found and deadline is not None and time.monotonic() >= deadline:
                return
            start = _build(solver, domains)
            if start is not None:
                found = True
                yield start


def _groupings(topology: Topology, heads: int) -> Iterator[list[Group]]:
    """All devices cut into groups, by one rule for all nodes."""
    counts = [node.count for node in topology.nodes]
    largest = min(max(counts), heads)
    for width in sorted({min(w, largest) for w in (*_WIDTHS, largest)}, reverse=True):
        if width <= largest:
            yield [
                group
                for place, count in enumerate(counts)
                for group in node_groups(topology, place, even_widths(count, min(width, count)))
            ]
    for island_groups in _island_groupings(topology, heads):
        yield island_groups


def _island_groupings(topology: Topology, heads: int) -> Iterator[list[Group]]:
    found = islands(topology)
    if not found:
        return
    inside = {place for island in found for place in island}
    rest = [
        group
        for place, node in enumerate(topology.nodes)
        if place not in inside
        for group in node_groups(topology, place, even_widths(node.count, min(node.count, heads)))
    ]
    spans = [
        spanning_groups(topology, [(p, i) for p in island for i in range(topology.nodes[p].count)], heads)
        for island in found
    ]
    if all(spans):
        for variant in range(max(len(options) for options in spans)):
            yield rest + [options[min(variant, len(options) - 1)] for options in spans]


def _domains(topology: Topology, groups: Sequence[Group]) -> Iterator[list[list[Group]]]:
    """Within which sets of groups pipelines are formed: all together, or each region by itself."""
    yield [list(groups)]
    by_area: dict[str, list[Group]] = {}
    for group in groups:
        node = topology.nodes[group.place]
        by_area.setdefault(node.region or "", []).append(group)
    if len(by_area) > 1:
        yield list(by_area.values())
    by_node: dict[int, list[Group]] = {}
    for group in groups:
        by_node.setdefault(group.place, []).append(group)
    if 1 < len(by_node):
        yield list(by_node.values())


def _build(solver: RouteSolver, domains: Sequence[Sequence[Group]]) -> Partition | None:
    """The best regular partition of each domain; what a domain cannot use alone is spare."""
    routes: list[Solution] = []
    spare: list[Group] = []
    for domain in domains:
        best = _best_dealt(solver, domain)
        if best is None:
            spare.extend(domain)
        else:
            routes.extend(best.routes)
            spare.extend(best.spare)
    leftover = _best_dealt(solver, spare) if spare and len(domains) > 1 else None
    if leftover is not None and solver.goal != "latency":
        routes.extend(leftover.routes)
        spare = list(leftover.spare)
    return make_partition(solver, routes, spare) if routes else None


def _best_dealt(solver: RouteSolver, groups: Sequence[Group]) -> Partition | None:
    best: Partition | None = None
    for count in _counts(solver, groups):
        for dealt in (_dealt_alike(solver, groups, count), _dealt_by_kind(solver, groups, count)):
            for used in dealt:
                solutions = [solver.best(members) for members in used]
                routes = [solution for solution in solutions if solution is not None]
                chosen = {group for solution in routes for group in solution.groups}
                found = make_partition(solver, routes, [group for group in groups if group not in chosen])
                if routes and (best is None or found.value > best.value):
                    best = found
    return best


def _counts(solver: RouteSolver, groups: Sequence[Group]) -> list[int]:
    """How many pipelines to try: no more than the memory could hold, nor fewer than the layers force."""
    layers = solver.cost.model.layers
    tokens = solver.traffic.peak_tokens
    room = sum(solver.cost.profile(group.shape).max_layers(tokens, False, False) for group in groups)
    most = min(len(groups), room // layers)
    counts: list[int] = []
    count = 1
    while count <= most:
        counts.append(count)
        count = count + 1 if count < _ALL_COUNTS else count + count // 2
    if most >= 1 and most not in counts:
        counts.append(most)
    return counts


def _speed(solver: RouteSolver, group: Group) -> float:
    """Layers a second of a plain decode step: how groups are ranked."""
    return 1 / solver.cost.profile(group.shape).layer_s(solver.traffic.decode_load(8.0))


def _dealt_alike(solver: RouteSolver, groups: Sequence[Group], count: int) -> Iterator[list[list[Group]]]:
    """Pipelines that resemble each other: groups from fast to slow, each to whoever holds fewest layers yet."""
    yield _dealt(solver, sorted(groups, key=lambda g: (-_speed(solver, g), g.place, g.devices)), count)


def _dealt(solver: RouteSolver, ordered: Sequence[Group], count: int) -> list[list[Group]]:
    dealt: list[list[Group]] = [[] for _ in range(count)]
    speed = [0.0] * count
    limit = solver.cost.model.layers
    for group in ordered:
        i = min(range(count), key=lambda i: (len(dealt[i]) >= limit, speed[i], i))
        if len(dealt[i]) < limit:
            dealt[i].append(group)
            speed[i] += _speed(solver, group)
    return dealt


def _dealt_by_kind(solver: RouteSolver, groups: Sequence[Group], count: int) -> Iterator[list[list[Group]]]:
    """Pipelines of one kind each as far as possible: neighbours in speed (or in place) together until they fit."""
    if count == 1:
        # One pipeline need not use everything: the fastest that suffice, and twice that.
        ordered = sorted(groups, key=lambda g: (-_speed(solver, g), g.place, g.devices))
        need = _enough(solver, ordered)
        for n in sorted({need, min(len(ordered), need + 1), min(len(ordered), 2 * need)}):
            if 0 < n < len(ordered):
                yield [ordered[:n]]
        return
    tokens = solver.traffic.peak_tokens
    for key in (_by_speed, _by_place):
        ordered = sorted(groups, key=lambda g: key(solver, g))
        rooms = [solver.cost.profile(g.shape).max_layers(tokens, False, False) for g in ordered]
        target = sum(rooms) / count
        dealt: list[list[Group]] = [[] for _ in range(count)]
        filled = 0.0
        for group, room in zip(ordered, rooms, strict=True):
            dealt[min(count - 1, int((filled + room / 2) / target)) if target else 0].append(group)
            filled += room
        yield [members for members in dealt if members]


def _by_speed(solver: RouteSolver, group: Group) -> tuple[float, int, tuple[str, ...]]:
    return -_speed(solver, group), group.place, group.devices


def _by_place(solver: RouteSolver, group: Group) -> tuple[float, int, tuple[str, ...]]:
    return 0.0, group.place, group.devices


def _enough(solver: RouteSolver, ordered: Sequence[Group]) -> int:
    """How many of the first groups hold the model with room for one request."""
    left, tokens = solver.cost.model.layers, solver.traffic.peak_tokens
    for n, group in enumerate(ordered, start=1):
        left -= solver.cost.profile(group.shape).max_layers(tokens, n == 1, False)
        if left <= 0:
            return n
    return len(ordered)
