"""A shape as something that can be priced and planned: its ways, its KV room, its plan.

Requests are dealt out to the machines of a range by fixed routes. Few routes would send whoever is behind a long
prompt behind it again at every range; dealt out anew, most part from it. Routes cost room, though: each has keys
and values of its own (`hexgen.memory`), and a request that no single route can hold is refused. So ranges are
dealt anew as often as routes stay roomy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise, product

from hexgen.cluster import Link
from hexgen.plan import Hop, Plan, Route, Stage
from hexgen.scheduler.cost import EdgeCost
from hexgen.scheduler.figures import KV_FILL
from hexgen.scheduler.groups import Group
from hexgen.scheduler.lanes.kinds import Kind, Shape
from hexgen.scheduler.lanes.model import Stop, Way
from hexgen.scheduler.pipeline import concurrency_for
from hexgen.scheduler.solver import RouteSolver
from hexgen.scheduler.task import Task

MOST_ROUTES = 256
_LONGEST_HELD = 2  # sequences of the longest context, by every route of a plan that deals anew
Pieces = tuple[tuple[Fraction, tuple[int, ...]], ...]


@dataclass(frozen=True, slots=True)
class Space:
    """What shapes are over."""

    solver: RouteSolver
    kinds: tuple[Kind, ...]
    links: dict[tuple[int, int], Link | None] = field(default_factory=dict, compare=False)  # once asked for

    @property
    def merges(self) -> bool:
        """Whether a machine's batches take in what comes by any route: else each route more is a batch more."""
        table = self.solver.cost.table
        return table is None or table.holds_kv

    def link(self, a: int, b: int) -> Link | None:
        """The link that any two machines of these kinds have; None where they have several sorts."""
        if (a, b) not in self.links:
            topology = self.solver.topology
            found = {
                topology.link(one.place, other.place)
                for one in self.kinds[a].groups
                for other in self.kinds[b].groups
                if one is not other
            }
            self.links[a, b] = found.pop() if len(found) == 1 else None
        return self.links[a, b]


def machines_of(space: Space, shape: Shape) -> list[tuple[Group, ...]]:
    """Which machines hold each range: in the cluster's order, none twice."""
    taken = [0] * len(space.kinds)
    found: list[tuple[Group, ...]] = []
    for part in shape:
        start = taken[part.kind]
        found.append(space.kinds[part.kind].groups[start : start + part.lanes])
        taken[part.kind] = start + part.lanes
    return found


# ---- routes ----------------------------------------------------------------------------------------------------


def routes_of(shape: Shape, deals: int = 1) -> Pieces:
    """Weights and lanes of the fewest routes that load all lanes of each range equally.

    Requests are points of a cube with ``deals`` sides, and ranges of several lanes take turns at them: a range of
    ``p`` lanes cuts its side into ``p`` equal parts, one each. Between two cuts of each side all requests go the
    same way. Ranges of unlike sides are independent: with two sides, neighbours are.
    """
    return _routes(tuple(part.lanes for part in shape), deals)


@lru_cache(maxsize=4096)
def _routes(lanes: tuple[int, ...], deals: int) -> Pieces:
    sides = _sides(lanes, deals)
    pieces: list[list[tuple[Fraction, Fraction]]] = []  # of each side: how wide, and where it starts
    for cuts in _cuts(lanes, deals):
        pieces.append([(end - start, start) for start, end in zip(cuts, [*cuts[1:], Fraction(1)], strict=True)])
    return tuple(
        (
            math.prod((width for width, _ in box), start=Fraction(1)),
            tuple(int(box[side][1] * p) for side, p in zip(sides, lanes, strict=True)),
        )
        for box in product(*pieces)
    )


def _sides(lanes: Sequence[int], deals: int) -> list[int]:
    """The side of each range. One lane cuts nothing, whatever its side."""
    found: list[int] = []
    turn = 0
    for p in lanes:
        found.append(turn % deals)
        turn += p > 1
    return found


def _cuts(lanes: Sequence[int], deals: int) -> list[list[Fraction]]:
    """Where each side is cut, from 0 on."""
    found: list[set[Fraction]] = [{Fraction(0)} for _ in range(deals)]
    for side, p in zip(_sides(lanes, deals), lanes, strict=True):
        found[side] |= {Fraction(i, p) for i in range(p)}
    return [sorted(cuts) for cuts in found]


@lru_cache(maxsize=4096)
def _extent(lanes: tuple[int, ...], deals: int) -> tuple[int, Fraction]:
    """How many routes, and the least weight of one."""
    number, least = 1, Fraction(1)
    for cuts in _cuts(lanes, deals):
        number *= len(cuts)
        least *= min(end - start for start, end in zip(cuts, [*cuts[1:], Fraction(1)], strict=True))
    return number, least


def most_deals(space: Space, shape: Shape) -> int:
    """The most sides that leave few enough routes, each roomy enough for long requests; 1 at least."""
    if not space.merges:
        return 1
    lanes = tuple(part.lanes for part in shape)
    model, engine = space.solver.cost.model, space.solver.cost.engine
    longest = min(engine.max_context or model.max_context, model.max_context)
    room = _room(space, shape)
    best = 1
    for deals in range(2, sum(p > 1 for p in lanes) + 1):
        number, least = _extent(lanes, deals)
        if number > MOST_ROUTES:
            break
        if least * room >= _LONGEST_HELD * longest:
            best = deals
    return best


@lru_cache(maxsize=4096)
def _crossings(lanes: tuple[int, ...], deals: int) -> tuple[dict[tuple[int, int], Fraction], ...]:
    """What share of all requests goes from each lane of a range to each of the next."""
    found: tuple[dict[tuple[int, int], Fraction], ...] = tuple({} for _ in lanes[1:])
    for weight, path in _routes(lanes, deals):
        for i, shares in enumerate(found):
            key = (path[i], path[i + 1])
            shares[key] = shares.get(key, Fraction(0)) + weight
    return found


# ---- figures ---------------------------------------------------------------------------------------------------


def _room(space: Space, shape: Shape) -> int:
    """Tokens of keys and values that fit at once: the range with the least."""
    last = len(shape) - 1
    return min(
        part.lanes * space.kinds[part.kind].profile.kv_tokens(part.layers, i == 0, i == last)
        for i, part in enumerate(shape)
    )


def concurrency(space: Space, shape: Shape, deals: int = 1) -> float:
    """Requests at once: the range with the least room for keys and values, and each route's own limit.

    Every route has its share of the room, in whole pages and whole requests, as the evaluator counts them.
    """
    traffic = space.solver.traffic
    room = _room(space, shape)
    held = KV_FILL * room / traffic.resident_tokens
    page = traffic.page_size
    at_once: dict[Fraction, int] = {}
    total = 0
    for weight, _ in routes_of(shape, deals):
        if weight not in at_once:
            at_once[weight] = max(1, concurrency_for(int(weight * room) // page * page, traffic))
        total += at_once[weight]
    return min(held, float(total))


def ways_of(space: Space, shape: Shape, deals: int = 1) -> list[Way]:
    """The shape's routes for `hexgen.scheduler.lanes.model`; one stands for all that meet the same."""
    solver, last = space.solver, len(shape) - 1
    crossing = _crossings(tuple(part.lanes for part in shape), deals)
    stops = tuple(
        Stop(space.kinds[part.kind].profile, part.layers, i == 0, i == last, 1 / part.lanes)
        for i, part in enumerate(shape)
    )
    machines = machines_of(space, shape)

    def edge(i: int, link: Link) -> EdgeCost:
        return solver.cost.edge(stops[i].profile, stops[i + 1].profile, link)

    routes = routes_of(shape, deals)
    steps = [*pairwise(shape), *([(shape[-1], shape[0])] if last else [])]
    even = all(len(set(shares.values())) == 1 for shares in crossing)
    if even and all(space.link(a.kind, b.kind) is not None for a, b in steps):  # all routes meet the same
        routes = ((Fraction(1), (0,) * len(shape)),)
    alike: dict[Way, Fraction] = {}
    for weight, lanes in routes:
        places = [group[lane].place for group, lane in zip(machines, lanes, strict=True)]
        edges = tuple(edge(i, solver.topology.link(places[i], places[i + 1])) for i in range(last))
        back = None
        if last:
            home = solver.topology.link(places[-1], places[0])
            back = solver.cost.token_edge(stops[-1].profile, stops[0].profile, home)
        shares = tuple(float(crossing[i][lanes[i], lanes[i + 1]]) for i in range(last))
        way = Way(1.0, stops, edges, shares, back)
        alike[way] = alike.get(way, Fraction(0)) + weight
    return [replace(way, weight=float(weight)) for way, weight in alike.items()]


def plan_of(space: Space, shape: Shape, task: Task, deals: int = 1) -> Plan:
    """The shape as a plan without prediction: stages s0, s1, ... by layers, then lanes."""
    names: list[list[str]] = []
    stages: list[Stage] = []
    spans: list[tuple[int, int]] = []
    start = 0
    for part, machines in zip(shape, machines_of(space, shape), strict=True):
        spans.append((start, start + part.layers))
        names.append([f"s{len(stages) + i}" for i in range(part.lanes)])
        stages += [
            Stage(name, spans[-1], group.devices, group.shape.shares)
            for name, group in zip(names[-1], machines, strict=True)
        ]
        start += part.layers
    routes = tuple(
        Route(
            tuple(Hop(names[i][lane], spans[i]) for i, lane in enumerate(lanes)),
            1.0 if weight == 1 else round(float(weight), 6),
        )
        for weight, lanes in routes_of(shape, deals)
    )
    return Plan(task.model.name, task.cluster, tuple(stages), routes, task.options)


def passable(space: Space, shape: Shape, deals: int = 1) -> bool:
    """Few enough routes, and each over links that exist."""
    if _extent(tuple(part.lanes for part in shape), deals)[0] > MOST_ROUTES:
        return False
    machines = machines_of(space, shape)
    return all(
        space.solver.topology.passable([group[lane].place for group, lane in zip(machines, lanes, strict=True)])
        for _, lanes in routes_of(shape, deals)
    )
