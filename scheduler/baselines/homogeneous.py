"""The best homogeneous subset: all devices of one type, placed by this planner's own search, the others idle."""

from __future__ import annotations

import dataclasses
import time

from hexgen.plan import Plan
from hexgen.scheduler.baselines.contract import Baseline, best_plan, by_type
from hexgen.scheduler.best import best_on_nodes, emit_plan, goal_of
from hexgen.scheduler.task import Objective, Task


def homogeneous(task: Task, objective: Objective, seconds: float) -> Baseline:
    """``seconds`` for all types together; the search of a type that runs out of them gives what it has."""
    kinds = by_type(task.cluster.nodes)
    drafts: list[Plan] = []
    goal = goal_of(objective)
    left = seconds / max(1, len(kinds))
    for nodes in kinds:
        cut = dataclasses.replace(task, engine="heuristic", deadline=time.monotonic() + left, time_limited=False)
        found = best_on_nodes(cut, nodes, goal)
        if found is not None:
            drafts.append(emit_plan(found.partition.routes, task))
    names = ", ".join(dict.fromkeys(nodes[0].device.name for nodes in kinds))
    return best_plan(task, objective, "best homogeneous subset", f"no type alone holds the model: {names}", drafts)
