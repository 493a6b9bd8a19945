"""Local search over partitions: move, swap, split and merge groups, split and merge pipelines."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from hexgen.scheduler.cost import GroupShape
from hexgen.scheduler.groups import Group
from hexgen.scheduler.solver import RouteSolver, Solution

_GAIN = 1e-9  # relative: smaller differences are rounding
_PATIENCE = 3  # rounds without a gain before giving up (each round draws other candidates)
_ROUND_MOVES = 400


@dataclass(frozen=True, slots=True)
class Partition:
    """Pipelines, and the groups that none of them uses. ``value``: larger is better, within one goal."""

    routes: tuple[Solution, ...]
    spare: tuple[Group, ...]
    value: float


@dataclass(slots=True)
class Budget:
    """How many more routes may be worked out (remembered ones are free), and until when."""

    solver: RouteSolver
    routes: int
    deadline: float | None  # of time.monotonic()

    def left(self) -> bool:
        if self.solver.solved >= self.routes:
            return False
        return self.deadline is None or time.monotonic() < self.deadline


@dataclass(frozen=True, slots=True)
class _Move:
    """Pipelines ``removed`` (indices) are replaced by those through ``added``; ``spare`` is what is left over."""

    removed: tuple[int, ...]
    added: tuple[tuple[Group, ...], ...]
    spare: tuple[Group, ...]


def make_partition(solver: RouteSolver, routes: Sequence[Solution], spare: Sequence[Group]) -> Partition:
    """For latency only the quickest pipeline counts: the others are spare."""
    if solver.goal == "latency" and len(routes) > 1:
        quickest = max(routes, key=lambda solution: solution.value)
        rest = [group for solution in routes if solution is not quickest for group in solution.groups]
        return Partition((quickest,), (*spare, *rest), quickest.value)
    return Partition(tuple(routes), tuple(spare), sum(solution.value for solution in routes))


def improve(solver: RouteSolver, start: Partition, rng: random.Random, budget: Budget) -> Partition:
    """The best partition that single moves reach; deterministic for a given ``rng`` and budget of routes."""
    best, dry = start, 0
    while dry < _PATIENCE and budget.left():
        gained = False
        for move in _moves(solver, best, rng):
            if not budget.left():
                break
            found = _apply(solver, best, move)
            if found is not None and found.value > best.value + _GAIN * abs(best.value):
                best, gained = found, True
                break
        dry = 0 if gained else dry + 1
    return best


def _apply(solver: RouteSolver, current: Partition, move: _Move) -> Partition | None:
    added: list[Solution] = []
    for groups in move.added:
        solution = solver.best(groups)
        if solution is None:
            return None
        added.append(solution)
    kept = [solution for i, solution in enumerate(current.routes) if i not in move.removed]
    return make_partition(solver, [*kept, *added], move.spare) if kept or added else None


def _moves(solver: RouteSolver, current: Partition, rng: random.Random) -> Iterator[_Move]:
    """Every kind of move in turn, in random order within a kind; equal groups of one pipeline count once."""
    kinds = [
        list(_sampled(kind, rng))
        for kind in (
            _use_spare(solver, current),
            _drop(solver, current),
            _resize(solver, current),
            _shift(solver, current),
            _swap(solver, current, rng),
            _merge_routes(current, rng),
            _split_routes(current, rng),
        )
    ]
    while any(kinds):
        for kind in kinds:
            if kind:
                yield kind.pop()


def _sampled(moves: Iterator[_Move], rng: random.Random) -> list[_Move]:
    found: list[_Move] = []
    for seen, move in enumerate(moves):
        if len(found) < _ROUND_MOVES:
            found.append(move)
        elif seen >= 20 * _ROUND_MOVES:
            break
        else:
            i = rng.randrange(seen + 1)
            if i < _ROUND_MOVES:
                found[i] = move
    rng.shuffle(found)
    return found


def _distinct(solver: RouteSolver, groups: Sequence[Group]) -> list[Group]:
    """One of each kind: same profile and same node."""
    return list({(solver.cost.profile(g.shape).id, g.place): g for g in reversed(groups)}.values())


def _without(groups: Sequence[Group], *gone: Group) -> tuple[Group, ...]:
    return tuple(group for group in groups if group not in gone)


def _use_spare(solver: RouteSolver, current: Partition) -> Iterator[_Move]:
    spare = current.spare
    for group in spare:
        rest = _without(spare, group)
        for i, route in enumerate(current.routes):
            yield _Move((i,), ((*route.groups, group),), rest)
            for other in route.groups:
                yield _Move((i,), ((*_without(route.groups, other), group),), (*rest, other))
        yield _Move((), ((group,),), rest)
    if len(spare) > 1:
        yield _Move((), (tuple(spare),), ())
    for x, y in _pairs(spare):
        if _joinable(solver, x, y):
            yield _Move((), ((_join(x, y),),), _without(spare, x, y))


def _drop(solver: RouteSolver, current: Partition) -> Iterator[_Move]:
    for i, route in enumerate(current.routes):
        if len(route.groups) > 1:
            for group in _distinct(solver, route.groups):
                yield _Move((i,), (_without(route.groups, group),), (*current.spare, group))


def _shift(solver: RouteSolver, current: Partition) -> Iterator[_Move]:
    for i, source in enumerate(current.routes):
        for group in _distinct(solver, source.groups):
            rest = _without(source.groups, group)
            for j, target in enumerate(current.routes):
                if i != j:
                    added = ((*target.groups, group),)
                    yield _Move((i, j), (rest, *added) if rest else added, current.spare)


def _swap(solver: RouteSolver, current: Partition, rng: random.Random) -> Iterator[_Move]:
    order = list(range(len(current.routes)))
    rng.shuffle(order)
    for n, i in enumerate(order):
        for j in order[n + 1 :]:
            a, b = current.routes[i].groups, current.routes[j].groups
            for x in _distinct(solver, a):
                for y in _distinct(solver, b):
                    if solver.cost.profile(x.shape).id != solver.cost.profile(y.shape).id or x.place != y.place:
                        yield _Move((i, j), ((*_without(a, x), y), (*_without(b, y), x)), current.spare)


def _merge_routes(current: Partition, rng: random.Random) -> Iterator[_Move]:
    order = list(range(len(current.routes)))
    rng.shuffle(order)
    for n, i in enumerate(order):
        for j in order[n + 1 :]:
            yield _Move((i, j), ((*current.routes[i].groups, *current.routes[j].groups),), current.spare)


def _split_routes(current: Partition, rng: random.Random) -> Iterator[_Move]:
    for i, route in enumerate(current.routes):
        groups = list(route.groups)
        for cut in range(1, len(groups)):
            yield _Move((i,), (tuple(groups[:cut]), tuple(groups[cut:])), current.spare)
        if len(groups) > 2:
            rng.shuffle(groups)
            half = len(groups) // 2
            yield _Move((i,), (tuple(groups[:half]), tuple(groups[half:])), current.spare)


def _resize(solver: RouteSolver, current: Partition) -> Iterator[_Move]:
    """Split a group in two, or join two of one node, within a pipeline; one half may go to the spare ones."""
    for i, route in enumerate(current.routes):
        for group in _distinct(solver, route.groups):
            if not _one_node(group):
                continue
            for width in range(1, group.width // 2 + 1):
                halves = (_cut(group, 0, width), _cut(group, width, group.width))
                rest = _without(route.groups, group)
                yield _Move((i,), ((*rest, *halves),), current.spare)
                yield _Move((i,), ((*rest, halves[1]),), (*current.spare, halves[0]))
        for x, y in _pairs(route.groups):
            if _joinable(solver, x, y):
                yield _Move((i,), ((*_without(route.groups, x, y), _join(x, y)),), current.spare)
        for x in route.groups:
            for y in current.spare:
                if _joinable(solver, x, y):
                    joined = (*_without(route.groups, x), _join(x, y))
                    yield _Move((i,), (joined,), _without(current.spare, y))


def _pairs(groups: Sequence[Group]) -> Iterator[tuple[Group, Group]]:
    for i, x in enumerate(groups):
        for y in groups[i + 1 :]:
            yield x, y


def _joinable(solver: RouteSolver, x: Group, y: Group) -> bool:
    narrow = x.width + y.width <= solver.cost.model.heads
    return x.place == y.place and narrow and _one_node(x) and _one_node(y)


def _one_node(group: Group) -> bool:
    return len({device.rsplit("/", 1)[0] for device in group.devices}) == 1


def _cut(group: Group, start: int, end: int) -> Group:
    shape = replace(group.shape, devices=group.shape.devices[start:end], shares=None)
    return Group(group.devices[start:end], shape, group.place)


def _join(x: Group, y: Group) -> Group:
    devices = tuple(sorted((*x.devices, *y.devices), key=lambda d: int(d.rsplit("/", 1)[1])))
    return Group(devices, GroupShape((*x.shape.devices, *y.shape.devices), x.shape.link), x.place)
