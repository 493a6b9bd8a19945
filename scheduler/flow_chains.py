"""Placements for flow as chains: how many, at which rate each, and who is in which.

At a rate R a device is good for the most layers that it still does at R tokens/s. Each chain of rate R needs as
many such layers as the model has; so a small integer program over (kind of node, rate) says how many nodes work at
which rate, and it stays small however many nodes there are. Who joins which chain is then dealt out and improved,
with the exact division of layers over a chain as the judge.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from hexgen.scheduler.cost import GroupShape
from hexgen.scheduler.division import TabledSeconds
from hexgen.scheduler.flow_bound import Rates
from hexgen.scheduler.flow_graph import FlowSpace, Placed
from hexgen.scheduler.groups import Group, node_groups
from hexgen.scheduler.programs import pulp_or_none, solved
from hexgen.scheduler.times import end_index

_MOST_LEVELS = 40  # rates that the integer program chooses from
_MOST_CHAINS = 512
_MOST_KINDS = 32
_UNIFORM = 3  # numbers of chains of one rate that are worked out
_PROGRAM_GAP = 1e-3  # relative: reached in moments, and what is left is less than dealing out loses
_PROGRAM_S = 10.0
_EXCHANGES = 1500  # chains worked out while groups are exchanged


@dataclass(frozen=True, slots=True)
class FlowChain:
    """Stages in order and the tokens/s that all of them, and the links between them, let through."""

    groups: tuple[Group, ...]
    layers: tuple[int, ...]
    tokens_s: float


@dataclass(frozen=True, slots=True, eq=False)
class NodeKind:
    """Equal nodes. ``widths[w-1]``: the rates of a group of ``w`` of their devices."""

    places: tuple[int, ...]
    widths: tuple[Rates, ...]
    _cuts: dict[float, tuple[int, tuple[int, ...]]] = field(default_factory=dict)

    def cut(self, tokens_s: float) -> tuple[int, tuple[int, ...]]:
        """The most layers that one node does at this rate, and the groups for it; remembered."""
        found = self._cuts.get(tokens_s)
        if found is None:
            found = self._cuts[tokens_s] = self._cut(tokens_s)
        return found

    def _cut(self, tokens_s: float) -> tuple[int, tuple[int, ...]]:
        best: list[tuple[int, tuple[int, ...]]] = [(0, ())]
        for devices in range(1, len(self.widths) + 1):
            best.append(
                max(
                    (best[devices - w][0] + _layers_at(self.widths[w - 1], tokens_s), (*best[devices - w][1], w))
                    for w in range(1, devices + 1)
                )
            )
        return best[-1]


def _layers_at(rates: Rates, tokens_s: float) -> int:
    """The most layers that are done at ``tokens_s`` or faster."""
    return bisect_left(rates, True, key=lambda rate: rate < tokens_s)


def chain_placements(space: FlowSpace) -> Iterator[list[FlowChain]]:
    """Sets of chains, each with every device that helps it."""
    kinds = node_kinds(space)
    levels = sorted({rate for kind in kinds for rates in kind.widths for rate in rates})
    uniform: list[tuple[float, int, float]] = []
    for chains in range(1, _MOST_CHAINS + 1):
        level = _highest(kinds, levels, chains * space.layers)
        if level is None:
            break
        uniform.append((chains * level, chains, level))
    if not uniform:
        return
    every = {kind: len(kind.places) for kind in kinds}
    choices: list[_Chosen] = [[(level, n, every)] for _, n, level in sorted(uniform, reverse=True)[:_UNIFORM]]
    chosen = _by_program(space, kinds, _some(levels, [level for _, _, level in uniform]))
    if chosen:
        choices.append(chosen)
    dealt = [_dealt(space, choice) for choice in choices]
    solved_chains = [_solved(space, members) for members in dealt]
    carried = [sum(chain.tokens_s for chain in chains) for chains in solved_chains]
    yield from solved_chains
    yield _exchanged(space, dealt[carried.index(max(carried))])


def node_kinds(space: FlowSpace) -> list[NodeKind]:
    """Equal nodes of one area; where there are many areas, of all of them, area by area."""
    topology = space.solver.topology
    found: dict[object, list[int]] = {}
    for place in sorted(range(len(topology.nodes)), key=lambda place: (topology.areas[place], place)):
        node = topology.nodes[place]
        if node.count:
            key = (node.device, node.count, node.link, topology.areas[place])
            found.setdefault(key, []).append(place)
    if len(found) > _MOST_KINDS:
        merged: dict[object, list[int]] = {}
        for members in found.values():
            node = topology.nodes[members[0]]
            merged.setdefault((node.device, node.count, node.link), []).extend(members)
        found = merged
    return [_kind_of(space, members) for members in found.values()]


def _kind_of(space: FlowSpace, places: Sequence[int]) -> NodeKind:
    node, heads = space.solver.topology.nodes[places[0]], space.solver.cost.model.heads
    return NodeKind(
        tuple(places),
        tuple(
            space.rates(GroupShape((node.device,) * width, node.link), 0) if width <= heads else ()
            for width in range(1, node.count + 1)
        ),
    )


def _highest(kinds: Sequence[NodeKind], levels: Sequence[float], layers: int) -> float | None:
    """The highest rate at which all nodes together do so many layers."""
    low, high = -1, len(levels)  # at low they do (or it is none), at high they do not
    while high - low > 1:
        middle = (low + high) // 2
        if sum(kind.cut(levels[middle])[0] * len(kind.places) for kind in kinds) >= layers:
            low = middle
        else:
            high = middle
    return levels[low] if low >= 0 else None


def _some(levels: Sequence[float], wanted: Sequence[float]) -> list[float]:
    """The rates of chains alike, and others spread over all that there are."""
    step = max(1, len(levels) // (_MOST_LEVELS // 2))
    first = list(dict.fromkeys(wanted))[: _MOST_LEVELS // 2]
    return sorted({*first, *levels[::step]})


_Chosen = list[tuple[float, int, dict[NodeKind, int]]]  # rate, chains, nodes of each kind


def _by_program(space: FlowSpace, kinds: Sequence[NodeKind], levels: Sequence[float]) -> _Chosen:
    """maximise sum(rate x chains), so that at each rate its nodes do the layers of its chains."""
    pulp = pulp_or_none()
    if pulp is None:
        return []
    problem = pulp.LpProblem("chains", pulp.LpMaximize)
    chains = [pulp.LpVariable(f"z_{r}", 0, _MOST_CHAINS, pulp.LpInteger) for r in range(len(levels))]
    nodes = {
        (k, r): pulp.LpVariable(f"x_{k}_{r}", 0, len(kind.places), pulp.LpInteger)
        for k, kind in enumerate(kinds)
        for r in range(len(levels))
    }
    problem += pulp.lpSum(level * z for level, z in zip(levels, chains, strict=True))
    for r, level in enumerate(levels):
        done = pulp.lpSum(kind.cut(level)[0] * nodes[k, r] for k, kind in enumerate(kinds))
        problem += done >= space.layers * chains[r]
    for k, kind in enumerate(kinds):
        problem += pulp.lpSum(nodes[k, r] for r in range(len(levels))) <= len(kind.places)
    if not solved(problem, timeLimit=_PROGRAM_S, gapRel=_PROGRAM_GAP):
        return []
    chosen: _Chosen = []
    for r, level in enumerate(levels):
        count = round(chains[r].value() or 0)
        if count:
            chosen.append((level, count, {k: round(nodes[i, r].value() or 0) for i, k in enumerate(kinds)}))
    return chosen


# ---- who is in which chain ------------------------------------------------------------------------------------


def _dealt(space: FlowSpace, chosen: _Chosen) -> list[list[Group]]:
    topology = space.solver.topology
    free = {kind: list(kind.places) for _, _, used in chosen for kind in used}
    members: list[list[Group]] = []
    for level, count, used in chosen:
        groups = [
            (group, _layers_at(kind.widths[group.width - 1], level))
            for kind, number in used.items()
            for place in [free[kind].pop(0) for _ in range(number)]
            for group in node_groups(topology, place, kind.cut(level)[1])
        ]
        groups = [(group, layers) for group, layers in groups if layers > 0]
        options = [_one_after_another(space, groups, count), _largest_first(groups, count)]
        carried = [sum(chain.tokens_s for chain in _solved(space, option)) for option in options]
        members += options[carried.index(max(carried))]
    return members


def _one_after_another(space: FlowSpace, groups: Sequence[tuple[Group, int]], count: int) -> list[list[Group]]:
    """Area by area, a chain is filled before the next one begins."""
    areas = space.solver.topology.areas
    chains: list[list[Group]] = [[] for _ in range(count)]
    held, now = 0, 0
    for group, layers in sorted(groups, key=lambda g: (areas[g[0].place], -g[1], g[0].place)):
        chains[now].append(group)
        held += layers
        if held >= space.layers and now < count - 1:
            held, now = 0, now + 1
    return chains


def _largest_first(groups: Sequence[tuple[Group, int]], count: int) -> list[list[Group]]:
    """Each next largest to the chain that has least."""
    chains: list[list[Group]] = [[] for _ in range(count)]
    held = [0] * count
    for group, layers in sorted(groups, key=lambda g: (-g[1], g[0].place, g[0].devices)):
        least = min(range(count), key=lambda c: (held[c], c))
        chains[least].append(group)
        held[least] += layers
    return chains


def _solved(space: FlowSpace, members: Sequence[Sequence[Group]]) -> list[FlowChain]:
    return [chain for groups in members if (chain := solve_chain(space, groups)) is not None]


def solve_chain(space: FlowSpace, groups: Sequence[Group]) -> FlowChain | None:
    """The fastest division of the layers over these groups, area by area; None where they do not hold them."""
    if not 0 < len(groups) <= space.layers:
        return None
    areas = space.solver.topology.areas
    ordered = sorted(groups, key=lambda g: (areas[g.place], -len(space.rates(g.shape, 0)), g.place, g.devices))
    last = len(ordered) - 1
    rates = [space.rates(group.shape, end_index(i == 0, i == last)) for i, group in enumerate(ordered)]
    caps = [len(row) for row in rates]
    if min(caps) < 1 or sum(caps) < space.layers:
        return None
    seconds = TabledSeconds([[0.0, *(1 / rate for rate in row)] for row in rates])
    layers = seconds.shortest_max(space.layers, caps)
    slowest = min(row[n - 1] for row, n in zip(rates, layers, strict=True))
    links = [space.link_tokens_s(a, b) for a, b in pairwise(ordered)]
    return FlowChain(tuple(ordered), layers, min([slowest, *links]))


def _exchanged(space: FlowSpace, members: list[list[Group]]) -> list[FlowChain]:
    """Groups move to, or change places with those of, other chains as long as that helps."""
    found = [solve_chain(space, groups) for groups in members]
    left = _EXCHANGES

    def rate(chain: FlowChain | None) -> float:
        return chain.tokens_s if chain is not None else 0.0

    improved = len(members) > 1
    while improved and left > 0:
        improved = False
        for a in range(len(members)):
            for b in range(len(members)):
                for one, other in _trials(members[a], members[b]) if a != b else ():
                    if left <= 0:
                        break
                    left -= 1
                    first, second = solve_chain(space, one), solve_chain(space, other)
                    if rate(first) + rate(second) > (rate(found[a]) + rate(found[b])) * (1 + 1e-9):
                        members[a], members[b], found[a], found[b] = one, other, first, second
                        improved = True
                        break
    return [chain for chain in found if chain is not None]


def _trials(a: list[Group], b: list[Group]) -> Iterator[tuple[list[Group], list[Group]]]:
    """One group from ``a`` to ``b``; then one of each kind of ``a`` for one of each other kind of ``b``."""
    ours = {group.shape: i for i, group in enumerate(a)}
    theirs = {group.shape: i for i, group in enumerate(b)}
    for i in ours.values():
        yield a[:i] + a[i + 1 :], [*b, a[i]]
    for shape, i in ours.items():
        for other, j in theirs.items():
            if shape != other:
                yield [*a[:i], b[j], *a[i + 1 :]], [*b[:j], a[i], *b[j + 1 :]]


def placed_of(chains: Sequence[FlowChain]) -> list[Placed]:
    placed: list[Placed] = []
    for chain in chains:
        start = 0
        for group, layers in zip(chain.groups, chain.layers, strict=True):
            placed.append(Placed(group, start, start + layers))
            start += layers
    return placed
