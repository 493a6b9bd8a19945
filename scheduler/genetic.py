"""HexGen's search (Jiang et al., ICML'24, section 4): a genetic algorithm over partitions of the devices.

From the paper and its published optimizer: an individual says how many devices of each machine every pipeline
group has; the start is k-means over the machines by how well they are joined; mutations merge two groups, split
one (in half, or at a random share), or swap devices between two; there is no crossover; ten children a generation,
three survivors by tournaments of three, 300 generations; a group whose memory cannot hold the model is no valid
mutation; tensor parallelism stays inside a machine, with equal parts.
Ours: fitness is this planner's own objective, asked of the same evaluator as every other search (the paper
simulates the share of requests within a deadline); so the widths of a group's machines are not chosen by the
paper's dynamic programming over an additive latency, but by trying them, and layers and order come from
`RouteSolver`; the best individual is never lost; machines that are joined alike are dealt to centres at random,
where k-means itself would not part them. None of the planner's other starts or moves is used.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np

from hexgen.scheduler.cost import GroupShape
from hexgen.scheduler.deadline import passed
from hexgen.scheduler.groups import Group, Topology, even_widths
from hexgen.scheduler.improve import Partition, make_partition
from hexgen.scheduler.solver import RouteSolver, Solution

Counts = tuple[int, ...]  # devices of each node that one pipeline has
Genome = tuple[Counts, ...]  # of all pipelines: together every device once

POPULATION, GENERATIONS, CHILDREN, SURVIVORS, TOURNAMENT = 100, 300, 10, 3, 3
_WIDTHS = (8, 6, 4, 3, 2, 1)  # the optimizer's own
_ALL_WIDTHS = 32  # choices of widths of one group: more are searched one kind of machine after the other
_ATTEMPTS = 20  # to draw a valid mutation
_KMEANS_ROUNDS = 20
_MESSAGE_BYTES = 1e6  # how near two machines are: seconds of a message of this size


def genetic(
    solver: RouteSolver,
    seed: int,
    deadline: float | None,
    *,
    population: int = POPULATION,
    generations: int = GENERATIONS,
) -> Partition | None:
    """The best partition that the search comes across; None where no group holds the model.

    Deterministic by ``seed`` unless ``deadline`` (of ``time.monotonic()``) ends it early, which is checked
    between individuals once one has been found that serves at all.
    """
    rng = random.Random(seed)
    breeder = _Breeder(solver)
    best: tuple[float, Genome] | None = None

    def late() -> bool:
        return best is not None and passed(deadline)

    parents: list[tuple[float, Genome]] = []
    for genome in breeder.starts(rng, population):
        if late():
            break
        parents.append((breeder.fitness(genome), genome))
        if parents[-1][0] > -math.inf and (best is None or parents[-1][0] > best[0]):
            best = parents[-1]
    for _ in range(generations):
        if late() or not parents:
            break
        children: list[tuple[float, Genome]] = []
        for _ in range(CHILDREN):
            genome = breeder.mutated(rng.choice(parents)[1], rng)
            children.append((breeder.fitness(genome), genome))
            if children[-1][0] > -math.inf and (best is None or children[-1][0] > best[0]):
                best = children[-1]
            if late():
                break
        pool = [*parents, *children]
        parents = [max(rng.choices(pool, k=TOURNAMENT)) for _ in range(SURVIVORS)]
        parents = [best, *parents[1:]] if best is not None else parents
    return breeder.partition(best[1]) if best is not None else None


@dataclass(slots=True)
class _Breeder:
    """Makes, mutates and judges individuals over one solver's topology."""

    solver: RouteSolver
    kinds: tuple[int, ...] = field(init=False)  # of each node: equal ones are interchangeable
    rooms: tuple[int, ...] = field(init=False)  # layers that one device of each node holds
    _judged: dict[object, tuple[float, tuple[int, ...]]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        topology, cost = self.solver.topology, self.solver.cost
        numbers: dict[object, int] = {}
        self.kinds = tuple(
            numbers.setdefault((node.device, node.link, area), len(numbers))
            for node, area in zip(topology.nodes, topology.areas, strict=True)
        )
        tokens = self.solver.traffic.peak_tokens
        self.rooms = tuple(
            cost.profile(GroupShape((node.device,), node.link)).max_layers(tokens, False, False)
            for node in topology.nodes
        )

    # ---- starts ------------------------------------------------------------------------------------------------

    def starts(self, rng: random.Random, number: int) -> Iterator[Genome]:
        """Whole machines clustered into 1, then random numbers of groups, at most as many as memory could hold."""
        nodes = self.solver.topology.nodes
        room = sum(room * node.count for room, node in zip(self.rooms, nodes, strict=True))
        most = max(1, min(len(nodes), room // self.solver.cost.model.layers))
        least = max(1, math.ceil(sum(node.count for node in nodes) / (8 * self.solver.cost.model.layers)))
        for i in range(number):
            labels = k_means(self.solver.topology, least if i == 0 else rng.randint(min(least, most), most), rng)
            groups = [
                tuple(node.count if label == mine else 0 for node, label in zip(nodes, labels, strict=True))
                for mine in sorted(set(labels))
            ]
            yield _tidy(groups)

    # ---- fitness -----------------------------------------------------------------------------------------------

    def fitness(self, genome: Genome) -> float:
        """The objective's value; a group that cannot hold the model serves nothing."""
        values = [self._judge(counts)[0] for counts in genome]
        served = [value for value in values if value > -math.inf]
        if not served:
            return -math.inf
        return max(served) if self.solver.goal == "latency" else sum(served)

    def partition(self, genome: Genome) -> Partition:
        """The individual with its real devices."""
        taken = [0] * len(self.kinds)
        routes: list[Solution] = []
        spare: list[Group] = []
        for counts in genome:
            groups = self._groups(counts, self._judge(counts)[1], taken)
            taken = [t + n for t, n in zip(taken, counts, strict=True)]
            found = self.solver.best(groups)
            if found is None:
                spare.extend(groups)
            else:
                routes.append(found)
        return make_partition(self.solver, routes, spare)

    def _judge(self, counts: Counts) -> tuple[float, tuple[int, ...]]:
        """The best value of one group, and the width of each kind of part that gives it; remembered by kind."""
        parts = self._parts(counts)
        key = tuple(sorted((self.kinds[place], n) for place, n in enumerate(counts) if n))
        found = self._judged.get(key)
        if found is None:
            found = self._judged[key] = self._best_widths(counts, parts)
        return found

    def _parts(self, counts: Counts) -> list[tuple[int, int]]:
        """The kinds of parts of machines in a group: (kind of machine, devices), in a fixed order."""
        return sorted({(self.kinds[place], n) for place, n in enumerate(counts) if n})

    def _best_widths(self, counts: Counts, parts: Sequence[tuple[int, int]]) -> tuple[float, tuple[int, ...]]:
        heads = self.solver.cost.model.heads
        options = [[w for w in _WIDTHS if w <= min(n, heads)] for _, n in parts]
        untaken = [0] * len(counts)

        def value(widths: tuple[int, ...]) -> float:
            found = self.solver.best(self._groups(counts, widths, untaken))
            return -math.inf if found is None else found.value

        if math.prod(len(choices) for choices in options) <= _ALL_WIDTHS:
            return max((value(widths), widths) for widths in product(*options))
        widths = tuple(choices[0] for choices in options)
        best, before = value(widths), -math.inf
        while best > before:
            before = best
            for i, choices in enumerate(options):
                trials = [(*widths[:i], w, *widths[i + 1 :]) for w in choices if w != widths[i]]
                better, trial = max(((value(t), t) for t in trials), default=(-math.inf, widths))
                if better > best:
                    best, widths = better, trial
        return best, widths

    def _groups(self, counts: Counts, widths: tuple[int, ...], taken: Sequence[int]) -> list[Group]:
        """The stages of a group; ``taken``: how many devices of each node other groups already have."""
        width_of = dict(zip(self._parts(counts), widths, strict=True))
        groups: list[Group] = []
        for place, n in enumerate(counts):
            node, start = self.solver.topology.nodes[place], taken[place]
            for width in even_widths(n, width_of[self.kinds[place], n]) if n else ():
                devices = tuple(f"{node.name}/{i}" for i in range(start, start + width))
                groups.append(Group(devices, GroupShape((node.device,) * width, node.link), place))
                start += width
        return groups

    # ---- mutation ----------------------------------------------------------------------------------------------

    def mutated(self, genome: Genome, rng: random.Random) -> Genome:
        """One merge, split or swap that leaves no more groups without memory than before; else unchanged."""
        poor = self._poor(genome)
        for _ in range(_ATTEMPTS):
            mutate = rng.choice((self._merged, self._split, self._swapped))
            child = _tidy(mutate(list(genome), rng))
            if child != genome and self._poor(child) <= poor:
                return child
        return genome

    def _poor(self, genome: Genome) -> int:
        layers = self.solver.cost.model.layers
        return sum(sum(n * room for n, room in zip(c, self.rooms, strict=True)) < layers for c in genome)

    def _merged(self, groups: list[Counts], rng: random.Random) -> list[Counts]:
        if len(groups) < 2:
            return groups
        i, j = rng.sample(range(len(groups)), 2)
        merged = tuple(a + b for a, b in zip(groups[i], groups[j], strict=True))
        return [merged, *(counts for k, counts in enumerate(groups) if k not in (i, j))]

    def _split(self, groups: list[Counts], rng: random.Random) -> list[Counts]:
        """The same share of each kind of machine goes to the new group, machine by machine."""
        old = list(groups.pop(rng.randrange(len(groups))))
        share = 0.5 if rng.random() < 0.5 else rng.uniform(0.1, 0.9)
        new = [0] * len(old)
        for kind in sorted(set(self.kinds)):
            places = [place for place, n in enumerate(old) if n and self.kinds[place] == kind]
            left = int(share * sum(old[place] for place in places))
            for place in places:
                new[place] = min(old[place], left)
                left -= new[place]
        return [*groups, tuple(new), tuple(a - b for a, b in zip(old, new, strict=True))]

    def _swapped(self, groups: list[Counts], rng: random.Random) -> list[Counts]:
        """One device, or a machine's part, goes over; as often as not another comes back."""
        if len(groups) < 2:
            return groups
        i, j = rng.sample(range(len(groups)), 2)
        a, b = list(groups[i]), list(groups[j])
        whole = rng.random() < 0.5
        there = rng.choice([place for place, n in enumerate(a) if n])
        back = rng.choice([place for place, n in enumerate(b) if n]) if rng.random() < 0.5 else None
        moves = [(a, b, there, a[there] if whole else 1)]
        if back is not None:
            moves.append((b, a, back, b[back] if whole else 1))
        for source, target, place, n in moves:
            source[place] -= n
            target[place] += n
        groups[i], groups[j] = tuple(a), tuple(b)
        return groups


def _tidy(groups: Sequence[Counts]) -> Genome:
    """In one order, without empty groups: equal individuals are equal tuples."""
    return tuple(sorted((counts for counts in groups if any(counts)), reverse=True))


def k_means(topology: Topology, k: int, rng: random.Random) -> list[int]:
    """A cluster (0 to k - 1, not all need occur) for each node: Lloyd's algorithm over rows of the matrix of
    message times. Nodes of one area have equal rows; among centres at equal distance one is drawn."""
    areas = list(dict.fromkeys(topology.areas))
    members = [[place for place, area in enumerate(topology.areas) if area == name] for name in areas]
    rows = np.zeros((len(areas), len(areas)))
    for i, mine in enumerate(members):
        for j, theirs in enumerate(members):
            other = theirs[0] if i != j else mine[min(1, len(mine) - 1)]
            link = topology.link(mine[0], other)
            rows[i, j] = 0.0 if other == mine[0] else link.latency_s + _MESSAGE_BYTES / link.bandwidth_bytes_s
    index = {name: i for i, name in enumerate(areas)}
    points = rows[[index[area] for area in topology.areas]]
    firsts = rng.sample(range(len(areas)), len(areas))  # distinct rows first, as far as there are any
    centres = rows[[firsts[i % len(firsts)] for i in range(k)]]
    labels: list[int] = []
    for _ in range(_KMEANS_ROUNDS):
        distances = ((points[:, None, :] - centres[None, :, :]) ** 2).sum(axis=2)
        labels = [_nearest(row, rng) for row in distances]
        moved = centres.copy()
        for cluster in range(k):
            mine_rows = points[[i for i, label in enumerate(labels) if label == cluster]]
            if len(mine_rows):
                moved[cluster] = mine_rows.mean(axis=0)
        if np.allclose(moved, centres):
            break
        centres = moved
    return labels


def _nearest(distances: np.ndarray[tuple[int], np.dtype[np.float64]], rng: random.Random) -> int:
    least = float(distances.min())
    return rng.choice([i for i, d in enumerate(distances) if d <= least * (1 + 1e-9) + 1e-18])
