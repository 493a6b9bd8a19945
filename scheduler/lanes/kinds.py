"""Equal machines of one place, and the ways to lay them out: how many one after another, how many in parallel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hexgen.scheduler.cost import StageProfile
from hexgen.scheduler.groups import Group, Topology, node_groups
from hexgen.scheduler.solver import RouteSolver

MOST_LANES = 32  # more machines in parallel make more routes than a plan is worth
_MOST_SERIES = 32


@dataclass(frozen=True, slots=True)
class Kind:
    """Machines with the same figures in the same area: a node as one stage where it has figures as such."""

    groups: tuple[Group, ...]
    profile: StageProfile
    area: str
    most_layers: int


@dataclass(frozen=True, slots=True)
class Range:
    """A range of layers: each of ``lanes`` machines of a kind (by index) holds all ``layers`` of it."""

    kind: int
    layers: int
    lanes: int


Shape = tuple[Range, ...]  # in the order of layers


def kinds_of(solver: RouteSolver) -> list[Kind]:
    """The machines that can hold at least one layer, by kind, in the order of the cluster."""
    topology, layers = solver.topology, solver.cost.model.layers
    found: dict[tuple[int, str], list[Group]] = {}
    profiles: dict[int, StageProfile] = {}
    for place, node in enumerate(topology.nodes):
        for width in dict.fromkeys((min(node.count, solver.cost.model.heads), 1)):
            if width < 1:
                continue
            groups = node_groups(topology, place, [width] * (node.count // width))
            profile = solver.cost.profile(groups[0].shape)
            if profile.max_layers(solver.traffic.page_size, False, False) > 0:
                profiles[profile.id] = profile
                found.setdefault((profile.id, _area(topology, place)), []).extend(groups)
                break
    return [
        Kind(tuple(groups), profiles[number], area, min(layers, most))
        for (number, area), groups in found.items()
        if (most := profiles[number].max_layers(solver.traffic.peak_tokens, False, False)) > 0
    ]


def _area(topology: Topology, place: int) -> str:
    return topology.areas[place]


def layouts(kind: int, machines: int, most_layers: int, layers: int) -> list[Shape]:
    """Ways to use ``machines`` equal ones: ``series`` ranges of as equal lanes, and layers to match, as can be.

    Where machines do not divide, some ranges have one lane more, and these may hold more layers; where layers do
    not divide, some ranges hold one more.
    """
    found: dict[Shape, None] = {}
    for series in range(1, min(machines, _MOST_SERIES, layers) + 1):
        lanes, more = divmod(machines, series)
        if lanes + (more > 0) > MOST_LANES:
            continue
        for least in range(1, most_layers + 1):
            # Time on a machine grows with layers / lanes: ranges of more lanes may take so many.
            highest = min(most_layers, -(-least * (lanes + 1) // lanes)) if more else least
            for heavy in range(least, highest + 1):
                for extra in range(series - more if least < most_layers else 1):
                    shape = (
                        (Range(kind, heavy, lanes + 1),) * more
                        + (Range(kind, least + 1, lanes),) * extra
                        + (Range(kind, least, lanes),) * (series - more - extra)
                    )
                    if sum(part.layers for part in shape) <= layers:
                        found[shape] = None
    return list(found)


def orders(kinds: Sequence[Kind], topology: Topology, most: int) -> list[tuple[int, ...]]:
    """Orders of the kinds worth trying: area after area, fewest slow crossings first; within one, fast to slow."""
    areas = list(dict.fromkeys(kind.area for kind in kinds))
    # Kinds by themselves (their nodes have links of their own) are areas of one kind.
    inside = {
        area: sorted(
            (i for i, kind in enumerate(kinds) if kind.area == area),
            key=lambda i: (-_speed(kinds[i]), i),
        )
        for area in areas
    }
    found: list[tuple[int, ...]] = []
    for path in _area_orders(areas, kinds, topology)[:most]:
        found.append(tuple(i for area in path for i in inside[area]))
    reverse = tuple(reversed(found[0]))
    return list(dict.fromkeys([*found, reverse]))


def _speed(kind: Kind) -> float:
    return sum(device.bandwidth_bytes_s for device in kind.profile.shape.devices)


def _area_orders(areas: list[str], kinds: Sequence[Kind], topology: Topology) -> list[tuple[str, ...]]:
    """Cheapest ways through all areas first, from each of them greedily to the nearest next."""
    place = {kind.area: kind.groups[0].place for kind in reversed(kinds)}

    def delay(a: str, b: str) -> float:
        link = topology.link(place[a], place[b])
        return link.latency_s + 1e4 / link.bandwidth_bytes_s  # a token's hidden state, or about

    found: list[tuple[float, tuple[str, ...]]] = []
    for first in areas:
        for second in [area for area in areas if area != first] or [first]:
            path = list(dict.fromkeys([first, second]))
            while len(path) < len(areas):
                path.append(min((a for a in areas if a not in path), key=lambda a: delay(path[-1], a)))
            around = zip(path, [*path[1:], path[0]], strict=True)
            found.append((sum(delay(a, b) for a, b in around if a != b), tuple(path)))
    return [path for _, path in sorted(found)]
