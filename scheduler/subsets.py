"""Which nodes to use at all: the cheapest that carry the rate, or the best within a budget.

Greedy over kinds of equal nodes: from each kind alone and from everything, nodes are left out as long as what
remains still does what is asked. Every set of nodes is judged by the same search and evaluator as any plan.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from hexgen.cluster import Node
from hexgen.errors import InfeasibleError
from hexgen.plan import Plan
from hexgen.scheduler.best import Found, best_on_nodes, goal_of, why_nothing
from hexgen.scheduler.solver import Goal
from hexgen.scheduler.task import Objective, Task, total_price

Nodes = tuple[Node, ...]


def plan_within_price(task: Task, objective: Objective) -> Plan:
    """``cost``: the cheapest nodes that carry the workload's rate within its limits (without a rate: the cheapest
    tokens). Other objectives: the best plan whose nodes cost at most the cluster's budget."""
    goal = _goal(task, objective)
    chooser = _Chooser(task, goal)
    if chooser.value(task.cluster.nodes) is None:
        raise why_nothing(task, objective)
    chosen = _cheapest(task, chooser) if objective == "cost" else _within_budget(task, chooser)
    found = best_on_nodes(task, chosen, goal)
    if found is None or (objective == "cost" and not _carries(task, found.partition.value)):
        found = chooser.found(chosen)  # the longer search never loses what the quick one had
    if found is None:
        raise InfeasibleError("no set of nodes serves the model", where=f"cluster {task.cluster.name}")
    return found.emit(task, objective)


class _Chooser:
    """What a set of nodes serves, by a quick search; remembered by how many nodes of each kind it has."""

    def __init__(self, task: Task, goal: Goal) -> None:
        self.task = dataclasses.replace(task, quick=True)
        self.goal = goal
        self._kinds: dict[object, int] = {}
        self._memory: dict[tuple[int, ...], Found | None] = {}

    def kind(self, node: Node) -> int:
        """Nodes that differ in nothing but their name are of one kind."""
        linked = {name for entry in self.task.cluster.node_links for name in entry.nodes}
        same = (
            node.device,
            node.count,
            node.link,
            node.region,
            node.price_usd_h,
            node.name in linked and node.name,
        )
        return self._kinds.setdefault(same, len(self._kinds))

    def found(self, nodes: Sequence[Node]) -> Found | None:
        key = tuple(sorted(self.kind(node) for node in nodes))
        if key not in self._memory:
            self._memory[key] = best_on_nodes(self.task, nodes, self.goal) if nodes else None
        return self._memory[key]

    def value(self, nodes: Sequence[Node]) -> float | None:
        found = self.found(nodes)
        return None if found is None else found.partition.value

    def by_kind(self, nodes: Sequence[Node]) -> list[Nodes]:
        kinds: dict[int, list[Node]] = {}
        for node in nodes:
            kinds.setdefault(self.kind(node), []).append(node)
        return [tuple(members) for _, members in sorted(kinds.items())]


def _goal(task: Task, objective: Objective) -> Goal:
    slo = task.workload.slo
    limited = slo.ttft_s is not None or slo.tpot_s is not None or slo.latency_s is not None
    return "slo" if objective == "cost" and limited else goal_of(objective)


def _carries(task: Task, tokens_s: float) -> bool:
    rate = task.workload.rate
    return rate == "max" or tokens_s >= float(rate) * task.workload.output_tokens.mean * (1 - 1e-9)


def _cheapest(task: Task, chooser: _Chooser) -> Nodes:
    """The set of nodes with the lowest price that carries the rate; without a rate, the lowest price a token."""
    everything = task.cluster.nodes
    kinds = chooser.by_kind(everything)
    starts = [everything, *kinds, *(a + b for i, a in enumerate(kinds) for b in kinds[i + 1 :])]

    def enough(nodes: Nodes) -> bool:
        value = chooser.value(nodes)
        return value is not None and _carries(task, value)

    if task.workload.rate == "max":

        def price_a_token(nodes: Nodes) -> float:
            return total_price(nodes) / (chooser.value(nodes) or 1e-12)

        finals = [_shrunk(chooser, start, price_a_token) for start in starts if enough(start)]
        chosen = min(finals, key=lambda nodes: (price_a_token(nodes), len(nodes)))
    else:
        finals = [_thinned(chooser, start, enough) for start in starts if enough(start)]
        if not finals:
            best = chooser.value(everything) or 0.0
            raise InfeasibleError(
                f"the whole cluster serves {best / task.workload.output_tokens.mean:.3g} requests/s within the "
                f"limits, and the workload asks for {task.workload.rate:g}",
                where=f"cluster {task.cluster.name}",
                remedy="lower the rate, relax the limits, or add nodes",
            )
        chosen = min(finals, key=lambda nodes: (total_price(nodes), len(nodes)))
    budget = task.cluster.budget_usd_h
    if budget is not None and total_price(chosen) > budget:
        raise InfeasibleError(
            f"the cheapest nodes found cost {total_price(chosen):.2f} USD/h, and the budget is {budget:.2f}",
            where=f"cluster {task.cluster.name}",
            remedy="raise the budget, or lower the rate",
        )
    return chosen


def _thinned(chooser: _Chooser, nodes: Nodes, enough: Callable[[Nodes], bool]) -> Nodes:
    """Leave out nodes, the dearest that can be spared first, many of a kind at once where possible."""
    while True:
        options: list[tuple[float, int, Nodes]] = []
        for members in chooser.by_kind(nodes):
            count = len(members)
            while count >= 1:
                rest = tuple(node for node in nodes if node not in members[-count:])
                if rest and enough(rest):
                    options.append((total_price(members[-count:]), count, rest))
                    break
                count //= 2
        if not options:
            return nodes
        nodes = max(options, key=lambda option: option[:2])[2]


def _shrunk(chooser: _Chooser, nodes: Nodes, figure: Callable[[Nodes], float]) -> Nodes:
    """Leave out nodes one at a time while the figure falls."""
    while True:
        rests = [tuple(n for n in nodes if n is not members[-1]) for members in chooser.by_kind(nodes)]
        rests = [rest for rest in rests if rest and chooser.value(rest) is not None]
        best = min(rests, key=figure, default=nodes)
        if figure(best) >= figure(nodes):
            return nodes
        nodes = best


def _within_budget(task: Task, chooser: _Chooser) -> Nodes:
    """Leave out what serves least for its price until the budget holds; then take back what still fits."""
    budget = task.cluster.budget_usd_h or 0.0
    nodes = task.cluster.nodes
    while total_price(nodes) > budget:
        options: list[tuple[float, Nodes]] = []
        for members in chooser.by_kind(nodes):
            if members[-1].price_usd_h:
                rest = tuple(node for node in nodes if node is not members[-1])
                value = chooser.value(rest)
                if value is not None:
                    before = chooser.value(nodes) or 0.0
                    options.append(((before - value) / members[-1].price_usd_h, rest))
        if not options:
            raise InfeasibleError(
                f"nodes that hold {task.model.name} cost more than the budget of {budget:.2f} USD/h",
                where=f"cluster {task.cluster.name}",
                remedy=f"raise the budget; all nodes together cost {total_price(task.cluster.nodes):.2f} USD/h",
            )
        nodes = min(options, key=lambda option: option[0])[1]
    for members in chooser.by_kind([node for node in task.cluster.nodes if node not in nodes]):
        for node in members:
            if total_price(nodes) + (node.price_usd_h or 0.0) <= budget:
                nodes = tuple(n for n in task.cluster.nodes if n in nodes or n is node)
    return nodes
