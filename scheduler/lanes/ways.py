"""A shape as something that can be priced and planned: its ways, its KV room, its plan."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise

from hexgen.plan import Hop, Plan, Route, Stage
from hexgen.scheduler.figures import KV_FILL
from hexgen.scheduler.groups import Group
from hexgen.scheduler.lanes.kinds import Kind, Shape
from hexgen.scheduler.lanes.model import Stop, Way
from hexgen.scheduler.solver import RouteSolver
from hexgen.scheduler.task import Task

MOST_ROUTES = 64


@dataclass(frozen=True, slots=True)
class Space:
    """What shapes are over."""

    solver: RouteSolver
    kinds: tuple[Kind, ...]


def machines_of(space: Space, shape: Shape) -> list[tuple[Group, ...]]:
    """Which machines hold each range: in the cluster's order, none twice."""
    taken = [0] * len(space.kinds)
    found: list[tuple[Group, ...]] = []
    for part in shape:
        start = taken[part.kind]
        found.append(space.kinds[part.kind].groups[start : start + part.lanes])
        taken[part.kind] = start + part.lanes
    return found


def routes_of(shape: Shape) -> list[tuple[Fraction, tuple[int, ...]]]:
    """Weights and lanes of the fewest routes that load all lanes of each range equally.

    Requests are points of [0, 1), and a range of ``p`` lanes cuts it into ``p`` equal parts, one each: between two
    cuts of any range all requests go the same way.
    """
    cuts = sorted({Fraction(i, part.lanes) for part in shape for i in range(part.lanes)} | {Fraction(1)})
    return [(end - start, tuple(int(start * part.lanes) for part in shape)) for start, end in pairwise(cuts)]


def concurrency(space: Space, shape: Shape) -> float:
    """Requests at once: the range with the least room for keys and values, and each route's own limit."""
    traffic = space.solver.traffic
    last = len(shape) - 1
    rooms = [
        part.lanes * space.kinds[part.kind].profile.kv_tokens(part.layers, i == 0, i == last)
        for i, part in enumerate(shape)
    ]
    held = KV_FILL * min(rooms) / traffic.resident_tokens
    return min(held, float(traffic.max_sequences * len(routes_of(shape))))


def ways_of(space: Space, shape: Shape) -> list[Way]:
    """The shape's routes for `hexgen.scheduler.lanes.model`; one stands for all that meet the same."""
    solver, last = space.solver, len(shape) - 1
    machines = machines_of(space, shape)
    routes = routes_of(shape)
    crossing: dict[tuple[int, int, int], Fraction] = {}
    for weight, lanes in routes:
        for i in range(last):
            key = (i, lanes[i], lanes[i + 1])
            crossing[key] = crossing.get(key, Fraction(0)) + weight
    stops = tuple(
        Stop(space.kinds[part.kind].profile, part.layers, i == 0, i == last, 1 / part.lanes)
        for i, part in enumerate(shape)
    )
    alike: dict[Way, Fraction] = {}
    for weight, lanes in routes:
        places = [group[lane].place for group, lane in zip(machines, lanes, strict=True)]
        edges = tuple(
            solver.cost.edge(
                stops[i].profile, stops[i + 1].profile, solver.topology.link(places[i], places[i + 1])
            )
            for i in range(last)
        )
        back = None
        if last:
            home = solver.topology.link(places[-1], places[0])
            back = solver.cost.token_edge(stops[-1].profile, stops[0].profile, home)
        shares = tuple(float(crossing[i, lanes[i], lanes[i + 1]]) for i in range(last))
        way = Way(1.0, stops, edges, shares, back)
        alike[way] = alike.get(way, Fraction(0)) + weight
    return [replace(way, weight=float(weight)) for way, weight in alike.items()]


def plan_of(space: Space, shape: Shape, task: Task) -> Plan:
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
        for weight, lanes in routes_of(shape)
    )
    return Plan(task.model.name, task.cluster, tuple(stages), routes, task.options)


def passable(space: Space, shape: Shape) -> bool:
    """Few enough routes, and each over links that exist."""
    routes = routes_of(shape)
    machines = machines_of(space, shape)
    return len(routes) <= MOST_ROUTES and all(
        space.solver.topology.passable([group[lane].place for group, lane in zip(machines, lanes, strict=True)])
        for _, lanes in routes
    )
