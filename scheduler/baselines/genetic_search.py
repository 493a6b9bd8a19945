"""HexGen's genetic search (`hexgen.scheduler.genetic`) as a baseline, within a budget of seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator

from hexgen.plan import Plan
from hexgen.scheduler.baselines.contract import Baseline, best_plan
from hexgen.scheduler.best import computing_alike, emit_plan, goal_of, solver_for
from hexgen.scheduler.deadline import passed
from hexgen.scheduler.genetic import genetic
from hexgen.scheduler.task import Objective, Task

SECONDS = 30.0


def hexgen_genetic(task: Task, objective: Objective, seconds: float | None = SECONDS) -> Baseline:
    """``seconds`` None: all generations, however long they take."""
    deadline = None if seconds is None else time.monotonic() + seconds
    plans = list(_plans(task, objective, deadline))
    note = f"cut after {seconds:.0f} s" if passed(deadline) else ""
    return best_plan(task, objective, "HexGen", "no group that it comes across holds the model", plans, note)


def _plans(task: Task, objective: Objective, deadline: float | None) -> Iterator[Plan]:
    for nodes in computing_alike(task.cluster.nodes, task.options):
        found = genetic(solver_for(task, nodes, goal_of(objective)), task.seed, deadline)
        if found is not None:
            yield emit_plan(found.routes, task)
