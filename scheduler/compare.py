"""Simple and published ways to place the model, through the same evaluator: what the planner's plan is measured
against, and why each falls short."""

from __future__ import annotations

import dataclasses
from typing import cast

from hexgen.scheduler.baselines.contract import Baseline
from hexgen.scheduler.baselines.equal import equal_layers
from hexgen.scheduler.baselines.genetic_search import hexgen_genetic
from hexgen.scheduler.baselines.helix import helix
from hexgen.scheduler.baselines.homogeneous import homogeneous
from hexgen.scheduler.baselines.petals import petals
from hexgen.scheduler.baselines.shortfall import shortfall
from hexgen.scheduler.baselines.single import single_node
from hexgen.scheduler.baselines.swarm import swarm
from hexgen.scheduler.baselines.symmetric import symmetric
from hexgen.scheduler.task import Objective, Task

__all__ = ["Baseline", "baselines"]

SECONDS = 10.0  # for each of those that search


def baselines(task: Task, objective: str, seconds: float = SECONDS) -> tuple[Baseline, ...]:
    """Each with its plan, or why there is none; ``shortfall`` says what keeps it from serving more.

    ``seconds``: what each of the searching ones may take; their ``note`` says where that cut them short.
    """
    goal = cast(Objective, objective)
    one_each = all(node.count <= 1 for node in task.cluster.nodes)  # a node is a device: not to be shown twice
    greedy = (petals(task, objective, seconds), swarm(task, objective, seconds))
    found = (
        single_node(task, objective),
        homogeneous(task, goal, seconds),
        equal_layers(task, objective, whole_nodes=False),
        *(() if one_each else (equal_layers(task, objective, whole_nodes=True),)),
        symmetric(task, objective),
        *greedy,
        hexgen_genetic(task, goal, seconds),
        helix(task, objective, seconds, greedy),
    )
    return tuple(_explained(task, one) for one in found)


def _explained(task: Task, found: Baseline) -> Baseline:
    return dataclasses.replace(found, shortfall=shortfall(task, found.plan)) if found.plan else found
