"""``explain``: from a plan to what is to be said about it."""

from __future__ import annotations

from dataclasses import replace

from hexgen.plan import Plan
from hexgen.scheduler.explain.even import even_splits
from hexgen.scheduler.explain.facts import DeviceUse, Explanation
from hexgen.scheduler.explain.left_out import left_out
from hexgen.scheduler.explain.memory_use import memory_uses
from hexgen.scheduler.explain.quick import Replanner
from hexgen.scheduler.explain.state import OpenPlan, open_plan
from hexgen.scheduler.explain.time_use import time_uses
from hexgen.scheduler.explain.value import metric_of, value_of
from hexgen.scheduler.explain.way import bottleneck_of, link_uses
from hexgen.scheduler.explain.what_if import DEFAULT_BUDGET_S, what_if
from hexgen.scheduler.task import Objective, Task


def explain(
    plan: Plan, task: Task, objective: Objective = "throughput", *, what_if_s: float | None = DEFAULT_BUDGET_S
) -> Explanation:
    """Everything about a valid plan of ``task``'s cluster and model, run with the plan's own engine options.

    ``what_if_s``: seconds for pricing changes of the cluster (which of them are priced then depends on the
    machine's speed); None for none. Raises ``InfeasibleError`` where the plan does not fit.
    """
    task = replace(task, options=plan.engine, deadline=None)
    opened = open_plan(plan, task, objective)
    if plan.predicted is None:
        raise ValueError("the plan has no prediction")
    devices = _devices(opened)
    links = link_uses(opened)
    bottleneck = bottleneck_of(opened, plan.predicted.bottleneck)
    changes = None
    if what_if_s is not None:
        changes = what_if(Replanner(plan, task, objective), devices, links, bottleneck, what_if_s)
    return Explanation(
        objective=objective,
        metric=metric_of(objective),
        value=value_of(plan, objective),
        devices=devices,
        links=links,
        bottleneck=bottleneck,
        even=even_splits(plan, task, objective),
        left_out=left_out(plan, task, objective),
        what_if=changes,
    )


def _devices(opened: OpenPlan) -> tuple[DeviceUse, ...]:
    memory, time = memory_uses(opened), time_uses(opened)
    return tuple(
        DeviceUse(
            device=device,
            type=opened.devices[device].type.name,
            stage=stage.name,
            routes=tuple(number for number, _ in opened.places[stage.name]),
            layers=stage.layers,
            memory=memory[device],
            time=time[device],
        )
        for stage in opened.plan.stages
        for device in stage.devices
    )
