"""How the engine should run a plan, where nobody said: sequences at once, and tokens of a step.

Both depend on the routes, which depend on both. So a quick plan is made with much of either, and the cost model
says what its routes gain:

- ``max_sequences``: what KV room holds, and a quarter more, for requests differ and short ones leave room. A lower
  limit would waste room; a higher one only costs memory for logits.
- ``token_budget``: of several, the smallest that serves (nearly) most. On a pipeline each step in flight waits for
  the longest, so the pace is that of large steps, not of mean ones (`hexgen.scheduler.traffic`): a budget near a
  mean step keeps steps alike. Below that, KV room stays unused, since no more sequences move than it can feed. One
  stage alone has nobody to wait for, and reads weights and keys less often for larger chunks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from hexgen.cluster import Node
from hexgen.errors import InfeasibleError
from hexgen.plan import EngineOptions, Plan
from hexgen.scheduler.best import best_on_nodes, emit_plan, goal_of
from hexgen.scheduler.deadline import passed
from hexgen.scheduler.evaluate import evaluate
from hexgen.scheduler.task import Objective, Task
from hexgen.workload import Slo

MOST_SEQUENCES = 1024
LEAST_SEQUENCES = 256
# From the batching policy's own floor for chunks of a pipeline: below it, a prompt that meets an idle route would
# read the weights many times over.
BUDGETS = (128, 160, 192, 224, 256, 320, 384, 448, 512, 640, 768, 1024, 1280, 1536, 2048)
_ROOM = 1.25  # sequences over those of mean lengths
_SEQUENCES_GRAIN = 64
_SAMPLE = 24  # devices
_NEARLY = 0.995


def chosen(task: Task, objective: Objective) -> Task:
    """The task with options that suit its cluster, from a quick plan; as it is where there is nothing to choose.

    CPU workers are busy with a few sequences; a published table's machines take what waits, whatever the budget;
    and one request alone, or limits on its times, ask for no more than the defaults.
    """
    limited = objective == "slo" or (objective == "cost" and task.workload.slo != Slo())
    if objective == "latency" or limited or task.cost_table is not None:
        return task
    nodes = [node for node in task.cluster.nodes if node.device.kind != "cpu"]
    if not nodes:
        return task
    if passed(task.deadline):
        return task  # no time to look
    wide = dataclasses.replace(task.options, max_sequences=MOST_SEQUENCES, token_budget=BUDGETS[-1])
    # A part of a large cluster says as much; where it holds no plan, neither need the larger buffers fit.
    for options, devices in ((wide, _SAMPLE), (wide, 4 * _SAMPLE), (task.options, 4 * _SAMPLE)):
        quick = dataclasses.replace(task, options=options, engine="heuristic", quick=True, progress=None)
        found = best_on_nodes(quick, _sample(nodes, devices), goal_of(objective))
        if found is None:
            continue
        routes = found.partition.routes
        most = _ROOM * max(route.division.steady.concurrency for route in routes)
        most = math.ceil(most / _SEQUENCES_GRAIN) * _SEQUENCES_GRAIN
        enough = dataclasses.replace(task.options, max_sequences=min(MOST_SEQUENCES, max(LEAST_SEQUENCES, most)))
        return dataclasses.replace(task, options=with_budget(emit_plan(routes, quick), task, enough))
    return task


def with_budget(plan: Plan, task: Task, options: EngineOptions) -> EngineOptions:
    """The options with the token budget under which the plan's routes, each by itself, serve most in sum."""
    served: dict[int, float] = {}
    for budget in BUDGETS:
        tried = dataclasses.replace(options, token_budget=budget)
        try:
            served[budget] = sum(_alone(plan, i, task, tried) for i in range(len(plan.routes)))
        except InfeasibleError:
            break  # buffers grow with the budget
    if not served:
        return options
    most = max(served.values())
    budget = min(budget for budget, tokens_s in served.items() if tokens_s >= _NEARLY * most)
    return dataclasses.replace(options, token_budget=budget)


def _alone(plan: Plan, number: int, task: Task, options: EngineOptions) -> float:
    """Tokens/s of one route: its weight beside the others' says nothing of another budget."""
    route = plan.routes[number]
    stages = tuple(plan.stage(hop.stage) for hop in route.path)
    lone = dataclasses.replace(plan, stages=stages, routes=(route,), engine=options)
    saturating = dataclasses.replace(task.workload, rate="max")
    return evaluate(lone, task.cluster, task.model, saturating).tokens_s


def _sample(nodes: Sequence[Node], devices: int) -> tuple[Node, ...]:
    """Every so many-th node, about ``devices`` in all: how many routes there are hardly matters to their steps."""
    return tuple(nodes[:: max(1, sum(node.count for node in nodes) // devices)])
