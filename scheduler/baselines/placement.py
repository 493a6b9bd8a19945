"""Machines that each hold one range of layers, shared by many routes: what Petals, Swarm and Helix place.

A machine is one device, or a node with tensor parallelism over it. Rates count prompt and output tokens alike, as
Helix does (ASPLOS'25, section 4.2): a machine's by how many layers it holds, a link's by the bytes of one token.
Requests then go as the maximum flow goes (`flow_graph`), also through parts of a range ("partial inference").
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from hexgen.plan import Hop, Plan, Route, Stage
from hexgen.scheduler import flow_graph
from hexgen.scheduler.baselines.contract import MOST_ROUTES
from hexgen.scheduler.best import computing_alike, solver_for
from hexgen.scheduler.flow_graph import Flow, FlowSpace, Placed
from hexgen.scheduler.groups import Group, even_widths, node_groups
from hexgen.scheduler.solver import RouteSolver
from hexgen.scheduler.tables.published import PublishedProfile
from hexgen.scheduler.task import Task
from hexgen.scheduler.times import end_index

Range = tuple[int, int]  # half-open layers; (0, 0): unused
# How much of what a machine could hold its layers take; the rest is for keys and values. Half is Helix's rule
# (its artifact: "at most half of the VRAM for parameters").
FILLS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
_ROUTES = (MOST_ROUTES, 32, 16, 8, 4, 2, 1)  # how many of the flow's paths are tried as routes


@dataclass(slots=True)
class Machines:
    """The machines of one solver's nodes; answers by index."""

    solver: RouteSolver
    groups: Sequence[Group]
    fill: float
    space: FlowSpace = field(init=False)

    def __post_init__(self) -> None:
        self.space = FlowSpace(self.solver)

    @property
    def layers(self) -> int:
        return self.solver.cost.model.layers

    def most_layers(self, i: int, embeds: bool, samples: bool) -> int:
        """How many layers machine ``i`` takes, with room for one request beside them."""
        profile = self.solver.cost.profile(self.groups[i].shape)
        servable = profile.max_layers(self.solver.traffic.peak_tokens, embeds, samples)
        if isinstance(profile, PublishedProfile) or self.fill >= 1:  # a published table has that rule in it
            return min(servable, self.layers)
        whole = profile.max_layers(self.solver.traffic.page_size, False, False)
        return min(servable, int(whole * self.fill), self.layers)

    def tokens_s(self, i: int, layers: int, embeds: bool = False, samples: bool = False) -> float:
        """Prompt and output tokens/s of machine ``i`` with ``layers`` layers, never short of work."""
        rates = self.space.rates(self.groups[i].shape, end_index(embeds, samples))
        return rates[layers - 1] if 1 <= layers <= len(rates) else 0.0

    def link_tokens_s(self, i: int, j: int) -> float:
        """Tokens/s that fit through the link from machine ``i`` to ``j``."""
        return self.space.link_tokens_s(self.groups[i], self.groups[j])

    def windows(self, i: int) -> list[Range]:
        """Every range that machine ``i`` could hold, as long as its memory allows at that place."""
        first = min(self.layers, self.most_layers(i, True, False))
        middle = min(self.layers, self.most_layers(i, False, False))
        last = min(self.layers, self.most_layers(i, False, True))
        if self.most_layers(i, True, True) >= self.layers:
            return [(0, self.layers)]
        found = [(0, min(first, self.layers - 1))] if first else []
        if middle:
            found += [(start, start + middle) for start in range(1, self.layers - middle)]
        if last:
            found.append((max(1, self.layers - last), self.layers))
        return [(start, end) for start, end in found if start < end]


def machines_of(task: Task, fill: float) -> Iterator[Machines]:
    """Whole nodes as machines, then single devices where that differs."""
    for nodes in computing_alike(task.cluster.nodes, task.options):
        solver = solver_for(task, nodes, "throughput")
        heads = task.model.heads
        whole: list[Group] = []
        single: list[Group] = []
        for place, node in enumerate(solver.topology.nodes):
            whole.extend(node_groups(solver.topology, place, even_widths(node.count, min(node.count, heads))))
            single.extend(node_groups(solver.topology, place, [1] * node.count))
        yield Machines(solver, whole, fill)
        if len(single) > len(whole):
            yield Machines(solver, single, fill)


def max_flow(machines: Machines, ranges: Sequence[Range]) -> Flow:
    """Tokens/s through the machines with these layers; its paths name machines by index."""
    used = [i for i, (start, end) in enumerate(ranges) if start < end]
    flow = flow_graph.max_flow(machines.space, [Placed(machines.groups[i], *ranges[i]) for i in used])
    return Flow(flow.tokens_s, tuple((amount, tuple(used[n] for n in path)) for amount, path in flow.paths))


def plans_of(task: Task, machines: Machines, ranges: Sequence[Range]) -> Iterator[Plan]:
    """The placement as drafts of plans: all the flow's paths as routes (up to a limit), and the widest few.

    Routes that share a stage take turns on it, each reading its weights, and share its room for keys and values:
    fewer routes than carry the largest flow often serve more. Nothing where nothing flows.
    """
    paths = max_flow(machines, ranges).paths
    for count in sorted({min(count, len(paths)) for count in _ROUTES} - {0}, reverse=True):
        yield _plan(task, machines, ranges, sorted(paths, key=lambda path: -path[0])[:count])


def _plan(
    task: Task, machines: Machines, ranges: Sequence[Range], paths: Sequence[tuple[float, Sequence[int]]]
) -> Plan:
    total = sum(amount for amount, _ in paths)
    used = sorted({i for _, path in paths for i in path})
    names = {i: f"s{n}" for n, i in enumerate(used)}
    stages = tuple(
        Stage(names[i], ranges[i], machines.groups[i].devices, machines.groups[i].shape.shares) for i in used
    )
    routes: list[Route] = []
    for amount, path in paths:
        hops: list[Hop] = []
        start = 0
        for i in path:
            hops.append(Hop(names[i], (start, ranges[i][1])))
            start = ranges[i][1]
        routes.append(Route(tuple(hops), max(1e-6, round(amount / total, 6))))
    return Plan(task.model.name, task.cluster, stages, tuple(routes), task.options)
