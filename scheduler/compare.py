"""Simple and published ways to place the model, through the same evaluator: what the planner's plan is measured
against, and why each falls short."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
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
    ways: tuple[Callable[[], Baseline], ...] = (
        lambda: single_node(task, objective),
        lambda: homogeneous(task, goal, seconds),
        lambda: equal_layers(task, objective, whole_nodes=False),
        *(() if one_each else (lambda: equal_layers(task, objective, whole_nodes=True),)),
        lambda: symmetric(task, objective),
        lambda: petals(task, objective, seconds),
        lambda: swarm(task, objective, seconds),
        lambda: hexgen_genetic(task, goal, seconds),
        lambda: helix(task, objective, seconds),
    )
    return tuple(_explained(task, way()) for way in ways)


def _explained(task: Task, found: Baseline) -> Baseline:
    return dataclasses.replace(found, shortfall=shortfall(task, found.plan)) if found.plan else found
