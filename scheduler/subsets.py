"""Which nodes to use at all: the cheapest that carry the rate, or the best within a budget.

Greedy over kinds of equal nodes: from each kind alone and from everything, nodes are left out as long as what
remains still does what is asked. Every set of nodes is judged by the same search and evaluator as any plan.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from hexgen.cluster import Node
from hexgen.errors import InfeasibleError
from hexgen.plan import Plan
from hexgen.scheduler.best import Found, best_on_nodes, goal_of, why_nothing
from hexgen.scheduler.deadline import passed
from hexgen.scheduler.solver import Goal
from hexgen.scheduler.task import Objective, Task, total_price

Nodes = tuple[Node, ...]

_MOST_PAIRED = 8  # kinds of nodes, of which within a budget each two are tried by themselves
_ROUNDING = 1e-9  # relative, of sums of prices


def plan_within_price(task: Task, objective: Objective) -> Plan:
    """``cost``: the cheapest nodes that carry the workload's rate within its limits (without a rate: the cheapest
    tokens). Other objectives: the best plan whose nodes cost at most the cluster's budget."""
    goal = _goal(task, objective)
    chooser = _Chooser(task, goal)
    if chooser.value(task.cluster.nodes) is None:
        raise why_nothing(task, objective)
    chosen = _cheapest(task, chooser) if objective == "cost" else _within_budget(task, chooser)
    both = [found for found in (best_on_nodes(task, chosen, goal), chooser.found(chosen)) if found is not None]
    if not both:
        raise InfeasibleError("no set of nodes serves the model", where=f"cluster {task.cluster.name}")
    found = max(both, key=lambda found: found.partition.value)
    # A proof over these nodes says nothing of others.
    return Found(found.partition).emit(task, objective)


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
    starts = _starts(chooser, everything)

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
    """The best of several: from everything, from each kind alone and from each two, cut down to the budget."""
    budget = task.cluster.budget_usd_h or 0.0
    finals: list[Nodes] = []
    paired = len(chooser.by_kind(task.cluster.nodes)) <= _MOST_PAIRED
    for start in _starts(chooser, task.cluster.nodes, paired=paired):
        if finals and passed(task.deadline):
            break
        cut = _cut_down(chooser, start, budget)
        if cut is not None:
            finals.append(_filled_up(task, chooser, cut, budget))
    if not finals:
        raise InfeasibleError(
            f"nodes that hold {task.model.name} cost more than the budget of {budget:.2f} USD/h",
            where=f"cluster {task.cluster.name}",
            remedy=f"raise the budget; all nodes together cost {total_price(task.cluster.nodes):.2f} USD/h",
        )
    return max(finals, key=lambda nodes: (_value(chooser, nodes), -total_price(nodes)))


def _starts(chooser: _Chooser, nodes: Nodes, *, paired: bool = True) -> list[Nodes]:
    """Everything, each kind alone, and each two."""
    kinds = chooser.by_kind(nodes)
    pairs = [a + b for i, a in enumerate(kinds) for b in kinds[i + 1 :]] if paired else []
    return [nodes, *kinds, *pairs]


def _value(chooser: _Chooser, nodes: Nodes) -> float:
    value = chooser.value(nodes)
    return -math.inf if value is None else value


def _cut_down(chooser: _Chooser, nodes: Nodes, budget: float) -> Nodes | None:
    """Leave out what serves least for its price until the budget holds; None where the model then fits nowhere."""
    if chooser.value(nodes) is None:
        return None
    while total_price(nodes) > budget * (1 + _ROUNDING):
        options: list[tuple[float, Nodes]] = []
        for members in chooser.by_kind(nodes):
            price = members[-1].price_usd_h
            rest = tuple(node for node in nodes if node is not members[-1])
            if price and chooser.value(rest) is not None:
                options.append(((_value(chooser, nodes) - _value(chooser, rest)) / price, rest))
        if not options:
            return None
        nodes = min(options, key=lambda option: option[0])[1]
    return nodes


def _filled_up(task: Task, chooser: _Chooser, nodes: Nodes, budget: float) -> Nodes:
    """With what else the budget allows."""
    for members in chooser.by_kind([node for node in task.cluster.nodes if node not in nodes]):
        for node in members:
            if total_price(nodes) + (node.price_usd_h or 0.0) <= budget * (1 + _ROUNDING):
                nodes = tuple(n for n in task.cluster.nodes if n in nodes or n is node)
    return nodes
