"""More from a plan that is good already: local search and packing in turn, from the best plan and shaken ones.

Local search stops where no single move helps. Packing leaps from there, as it may choose from every pipeline that
was ever worked out. Where neither helps, a few pipelines of the best plan are taken apart and dealt out anew at
random, and local search goes on from that: worse plans, too, have pipelines that packing can use (an iterated
local search; Lourenco, Martin and Stutzle, Handbook of Metaheuristics, 2003).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from hexgen.scheduler.columns import Effort, SolverError, pack
from hexgen.scheduler.deadline import part_until, passed
from hexgen.scheduler.groups import Group, even_widths, node_groups
from hexgen.scheduler.improve import Budget, Partition, improve, make_partition
from hexgen.scheduler.solver import RouteSolver, Solution

_GAIN = 1e-6  # relative: less is rounding
_ROUTES = 300  # that local search may work out in one go
_SHAKEN_ROUTES = 100  # the same, from a shaken plan
_SHAKES = 4  # between two packings
_TAKEN = (2, 2, 3)  # pipelines that are taken apart
_PATIENCE = 3  # times without a gain, before the time is better spent on a proof
_FOR_PACKING = 0.2  # of the time that is left, for one packing
_PACK_ONLY = Effort(rounds=0, looks=0, work=0.0, columns=500)


def polished(solver: RouteSolver, best: Partition, seed: int, until: float | None) -> Partition:
    """``best`` or better, by ``until`` (of `time.monotonic`); None: as long as it gains."""
    rng = random.Random(seed)
    dry = 0
    while dry < _PATIENCE and not passed(until):
        before = best.value
        best = _packed(solver, best, until)
        best = improve(solver, best, rng, Budget(solver, solver.solved + _ROUTES, until))
        if best.value > before * (1 + _GAIN):
            dry = 0
            continue
        for _ in range(_SHAKES):
            start = _shaken(solver, best, rng)
            if start is None or passed(until):
                break
            found = improve(solver, start, rng, Budget(solver, solver.solved + _SHAKEN_ROUTES, until))
            if found.value > best.value:
                best = found
        dry = 0 if best.value > before * (1 + _GAIN) else dry + 1
    return best


def _packed(solver: RouteSolver, best: Partition, until: float | None) -> Partition:
    try:
        found = pack(solver, replace(_PACK_ONLY, deadline=part_until(until, _FOR_PACKING))).partition
    except SolverError:  # no answer in so short a time, or no solver, which the proof's packing will say
        return best
    return best if found is None or found.value <= best.value else found


def _shaken(solver: RouteSolver, current: Partition, rng: random.Random) -> Partition | None:
    """The plan with a few pipelines made anew from their devices, in other widths and other numbers."""
    if not current.routes:
        return None
    taken = set(rng.sample(range(len(current.routes)), min(rng.choice(_TAKEN), len(current.routes))))
    groups = _recut(solver, [g for i in sorted(taken) for g in current.routes[i].groups], rng)
    rng.shuffle(groups)
    number = max(1, len(taken) + rng.choice((-1, 0, 0, 1)))
    if rng.random() < 0.5:  # neighbours together
        groups.sort(key=lambda group: (solver.topology.areas[group.place], group.place))
    made: list[Solution] = []
    spare = list(current.spare)
    for part in _cuts(groups, number, rng):
        found = solver.best(part)
        if found is None:
            spare.extend(part)
        else:
            made.append(found)
    kept = [route for i, route in enumerate(current.routes) if i not in taken]
    return make_partition(solver, [*kept, *made], spare) if kept or made else None


def _recut(solver: RouteSolver, groups: Sequence[Group], rng: random.Random) -> list[Group]:
    """A node whose devices are all here may be cut otherwise; groups across nodes stay as they are."""
    here: dict[int, list[Group]] = {}
    for group in groups:
        here.setdefault(group.place, []).append(group)
    cut: list[Group] = []
    for place, members in here.items():
        node = solver.topology.nodes[place]
        whole = sum(group.width for group in members) == node.count
        own = all(device.rsplit("/", 1)[0] == node.name for group in members for device in group.devices)
        if whole and own and rng.random() < 0.5:
            width = rng.randint(1, min(node.count, solver.cost.model.heads))
            cut.extend(node_groups(solver.topology, place, even_widths(node.count, width)))
        else:
            cut.extend(members)
    return cut


def _cuts(groups: Sequence[Group], number: int, rng: random.Random) -> list[list[Group]]:
    """Runs of the groups, about alike in devices."""
    total = sum(group.width for group in groups)
    parts: list[list[Group]] = [[] for _ in range(number)]
    filled = 0
    for group in groups:
        parts[min(number - 1, filled * number // total)].append(group)
        filled += group.width
    return [part for part in parts if part]
