"""A quick re-plan of a cluster that hardly differs from one that has a plan: local search from that plan."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from hexgen.cluster import Cluster, Node
from hexgen.errors import HexgenError
from hexgen.plan import Plan
from hexgen.scheduler.best import best_on_nodes, computing_alike, emit_plan, finish, goal_of, solver_for
from hexgen.scheduler.explain.seed import seed_of
from hexgen.scheduler.explain.state import node_of, nodes_of, pipelines
from hexgen.scheduler.explain.value import value_of
from hexgen.scheduler.improve import Budget, improve
from hexgen.scheduler.solver import Goal
from hexgen.scheduler.task import Objective, Task, total_price
from hexgen.workload import Slo

_ROUTES = 100  # worked out to improve one seed
_AFRESH_DEVICES = 12  # up to this many, regular partitions are tried afresh as well


@dataclass(frozen=True, slots=True)
class Replanner:
    """Prices changed clusters for one plan, always with the same effort, so that prices compare.

    Under a budget, and for the objective ``cost``, only the nodes that the plan uses count, and what is added to
    them: which others to take is another question than what the change brings.
    """

    plan: Plan
    task: Task
    objective: Objective
    deadline: float | None = None

    def value(self, cluster: Cluster, added: tuple[str, ...] = ()) -> float | None:
        """The best found on ``cluster``, in ``metric_of(objective)``; None where nothing fits."""
        found = self.best(cluster, added)
        return None if found is None else value_of(found, self.objective)

    def best(self, cluster: Cluster, added: tuple[str, ...] = ()) -> Plan | None:
        """The best plan found: the old one as it is, improved from there, or (small clusters) made afresh."""
        if self.chosen:
            kept = {*nodes_of([d for stage in self.plan.stages for d in stage.devices]), *added}
            nodes = tuple(node for node in cluster.nodes if node.name in kept)
            cluster = replace(
                cluster,
                nodes=nodes,
                node_links=tuple(e for e in cluster.node_links if kept.issuperset(e.nodes)),
                budget_usd_h=None,
            )
            if not nodes:
                return None
        task = replace(self.task, cluster=cluster, quick=True, deadline=self.deadline)
        found = [plan for plan in (self._as_it_is(task), *self._improved(task), self._afresh(task)) if plan]
        return max(found, key=lambda plan: value_of(plan, self.objective), default=None)

    @property
    def chosen(self) -> bool:
        """Whether nodes stay unused for their price."""
        budget = self.task.cluster.budget_usd_h
        return self.objective == "cost" or (budget is not None and total_price(self.task.cluster.nodes) > budget)

    def _goal(self) -> Goal:
        limited = self.task.workload.slo != Slo()
        return "slo" if self.objective == "cost" and limited else goal_of(self.objective)

    def _as_it_is(self, task: Task) -> Plan | None:
        there = {device.id for device in task.cluster.devices()}
        if any(device not in there for stage in self.plan.stages for device in stage.devices):
            return None
        try:
            return finish(task, replace(self.plan, cluster=task.cluster, predicted=None), self.objective)
        except HexgenError:
            return None

    def _improved(self, task: Task) -> list[Plan]:
        if not pipelines(self.plan):
            return []
        solver = solver_for(task, self._computing(task), self._goal())
        seed = seed_of(self.plan, solver)
        if seed is None:
            return []
        budget = Budget(solver, solver.solved + _ROUTES, self.deadline)
        better = improve(solver, seed, random.Random(self.task.seed), budget)
        return [finish(task, emit_plan(better.routes, task), self.objective)]

    def _computing(self, task: Task) -> tuple[Node, ...]:
        """Without the CPUs where the plan does without: one of them would turn everything to float32."""
        used = {node_of(device) for stage in self.plan.stages for device in stage.devices}
        before = {node.name: node for node in self.task.cluster.nodes}
        with_cpu = any(before[name].device.kind == "cpu" for name in used)
        options = computing_alike(task.cluster.nodes, task.options)
        return options[-1] if with_cpu else options[0]

    def _afresh(self, task: Task) -> Plan | None:
        if sum(node.count for node in task.cluster.nodes) > _AFRESH_DEVICES:
            return None
        found = best_on_nodes(task, task.cluster.nodes, self._goal())
        return None if found is None else found.emit(task, self.objective)
