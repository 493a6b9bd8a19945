"""Which devices form which stages, and which stages form which pipelines: a fast search over partitions.

Starts are built in a few regular ways (one width for all nodes; pipelines within regions or across; groups dealt
so that pipelines resemble each other, or so that each is of one kind), then the best are improved by moving,
swapping, splitting and merging groups until nothing helps or the budget is spent. The budget counts routes solved,
not seconds, so the same input and seed give the same plan; a time limit only ever cuts it short.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence

from hexgen.scheduler.deadline import passed
from hexgen.scheduler.groups import Group, Topology, even_widths, islands, node_groups, spanning_groups
from hexgen.scheduler.improve import Budget, Partition, improve, make_partition
from hexgen.scheduler.solver import RouteSolver, Solution
from hexgen.scheduler.tight import tight_starts

_START_ROUTES = 600  # worked out before no further kinds of starts are tried
_DEEPEST = 24  # groups of a pipeline on average, where fewer would do
_DRY_COUNTS = 3  # numbers of pipelines in a row that bring nothing, before larger ones are left out
_IMPROVED_STARTS = 3
_KEPT_OF_ONE = 3
_SAME = 1e-9  # relative: partitions this near in value are taken for the same
_WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 16)


def search(solver: RouteSolver, seed: int, deadline: float | None, routes: int) -> Partition | None:
    """The best partition found; None where no start fits. ``routes``: how many may be worked out to improve it."""
    found = candidates(solver, seed, deadline, routes)
    return found[0] if found else None


def candidates(solver: RouteSolver, seed: int, deadline: float | None, routes: int) -> list[Partition]:
    """Distinct partitions, best first: regular starts, the most promising of them improved."""
    # Stable: ties keep the order in which they were built.
    starts = sorted((p for p in _starts(solver, deadline) if p.routes), key=lambda p: -p.value)
    if not starts:
        starts = sorted(tight_starts(solver), key=lambda p: -p.value)
    distinct: list[Partition] = []
    for start in starts:
        if all(abs(start.value - other.value) > _SAME * abs(other.value) for other in distinct):
            distinct.append(start)
    chosen = distinct[:_IMPROVED_STARTS]
    spent = solver.solved
    improved = [
        improve(
            solver, start, random.Random(seed), Budget(solver, spent + routes * (i + 1) // len(chosen), deadline)
        )
        for i, start in enumerate(chosen)
    ]
    return sorted([*improved, *distinct[_IMPROVED_STARTS:]], key=lambda p: -p.value)


# ---- starts ---------------------------------------------------------------------------------------------------


def _starts(solver: RouteSolver, deadline: float | None) -> Iterator[Partition]:
    """Every grouping within every kind of domain, the kinds in turn; on large clusters the later ones are cut."""
    groupings = list(regular_groupings(solver.topology, solver.cost.model.heads))
    found = False
    for domains_of in (_by_region, _all_together, _by_node):
        for groups in groupings:
            if found and (passed(deadline) or solver.solved >= _START_ROUTES):
                return
            domains = domains_of(solver.topology, groups)
            for start in _build(solver, domains, deadline) if domains else ():
                found = True
                yield start


def regular_groupings(topology: Topology, heads: int) -> Iterator[list[Group]]:
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
    yield from _island_groupings(topology, heads)


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


def _all_together(topology: Topology, groups: Sequence[Group]) -> list[list[Group]]:
    return [list(groups)]


def _by_region(topology: Topology, groups: Sequence[Group]) -> list[list[Group]]:
    """Pipelines within each region; nothing where there is only one, which is the same as all together."""
    domains: dict[str | None, list[Group]] = {}
    for group in groups:
        domains.setdefault(topology.nodes[group.place].region, []).append(group)
    return list(domains.values()) if len(domains) > 1 else []


def _by_node(topology: Topology, groups: Sequence[Group]) -> list[list[Group]]:
    domains: dict[int, list[Group]] = {}
    for group in groups:
        domains.setdefault(group.place, []).append(group)
    return list(domains.values()) if len(domains) > 1 else []


def _build(solver: RouteSolver, domains: Sequence[Sequence[Group]], deadline: float | None) -> list[Partition]:
    """Regular partitions: the best few of one domain; of several, the best of each together."""
    if len(domains) == 1:
        return _dealt_partitions(solver, domains[0], deadline)[:_KEPT_OF_ONE]
    routes: list[Solution] = []
    spare: list[Group] = []
    for domain in domains:
        best = _dealt_partitions(solver, domain, deadline)
        if best:
            routes.extend(best[0].routes)
            spare.extend(best[0].spare)
        else:
            spare.extend(domain)
    leftover = _dealt_partitions(solver, spare, deadline) if spare and solver.goal != "latency" else []
    if leftover:
        routes.extend(leftover[0].routes)
        spare = list(leftover[0].spare)
    return [make_partition(solver, routes, spare)] if routes else []


def _dealt_partitions(solver: RouteSolver, groups: Sequence[Group], deadline: float | None) -> list[Partition]:
    """The best partition for each number of pipelines, best first; the numbers end where they stop paying."""
    found: list[Partition] = []
    top, dry = -math.inf, 0
    for count in _counts(solver, groups):
        best = best_dealt(solver, groups, count)
        if best is not None:
            found.append(best)
        dry = 0 if best is not None and best.value > top else dry + 1
        top = max(top, best.value) if best is not None else top
        if found and (passed(deadline) or dry > _DRY_COUNTS):
            break
    return sorted(found, key=lambda p: -p.value)


def best_dealt(solver: RouteSolver, groups: Sequence[Group], count: int) -> Partition | None:
    """The best regular partition into ``count`` pipelines."""
    best: Partition | None = None
    for used in (*_dealt_alike(solver, groups, count), *_dealt_by_kind(solver, groups, count)):
        solutions = [solver.best(members) for members in used]
        routes = [solution for solution in solutions if solution is not None]
        if not routes:
            continue
        chosen = {group for solution in routes for group in solution.groups}
        trial = make_partition(solver, routes, [group for group in groups if group not in chosen])
        if best is None or trial.value > best.value:
            best = trial
    return best


def _counts(solver: RouteSolver, groups: Sequence[Group]) -> list[int]:
    """How many pipelines to try: no more than the memory could hold, nor so few that they get needlessly deep."""
    layers = solver.cost.model.layers
    tokens = solver.traffic.peak_tokens
    room = sum(solver.cost.profile(group.shape).max_layers(tokens, False, False) for group in groups)
    most = min(len(groups), room // layers)
    counts: list[int] = []
    count = 1 if solver.goal == "latency" else min(most, math.ceil(len(groups) / _DEEPEST))
    while 1 <= count <= most:
        counts.append(count)
        count += max(1, count // 4)
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
