"""What dividing evenly would waste: the same stages in the same order, with equal layers, or with equal shares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from hexgen.errors import HexgenError
from hexgen.memory import plan_dtype
from hexgen.plan import Hop, Plan, Route
from hexgen.scheduler.best import finish
from hexgen.scheduler.explain.facts import EvenSplit
from hexgen.scheduler.explain.state import pipelines
from hexgen.scheduler.explain.value import value_of
from hexgen.scheduler.task import Objective, Task

LAYERS, SHARES, BOTH = "equal layers", "equal shares", "equal layers and shares"


def even_splits(plan: Plan, task: Task, objective: Objective) -> tuple[EvenSplit, ...]:
    """One entry for each way in which the plan is not even already."""
    if not pipelines(plan):
        return (EvenSplit(LAYERS, None, None, "the routes share stages: there is no one even split"),)
    layers, shares = _uneven_layers(plan), any(stage.shares is not None for stage in plan.stages)
    found: list[EvenSplit] = []
    if layers:
        found.append(_priced(LAYERS, plan, task, objective, even_layers))
    if shares:
        found.append(_priced(SHARES, plan, task, objective, equal_shares))
    if layers and shares:
        found.append(_priced(BOTH, plan, task, objective, lambda one: equal_shares(even_layers(one))))
    return tuple(found)


def even_layers(plan: Plan) -> Plan:
    """Every pipeline's layers divided as equally as they go, the first stages one more each where they do not."""
    stages = {stage.name: stage for stage in plan.stages}
    routes: list[Route] = []
    for route in plan.routes:
        depth, total = len(route.path), route.path[-1].layers[1]
        start, path = 0, []
        for i, hop in enumerate(route.path):
            end = start + total // depth + (i < total % depth)
            stages[hop.stage] = replace(stages[hop.stage], layers=(start, end))
            path.append(Hop(hop.stage, (start, end)))
            start = end
        routes.append(replace(route, path=tuple(path)))
    return replace(plan, stages=tuple(stages[stage.name] for stage in plan.stages), routes=tuple(routes))


def equal_shares(plan: Plan) -> Plan:
    return replace(plan, stages=tuple(replace(stage, shares=None) for stage in plan.stages))


def _uneven_layers(plan: Plan) -> bool:
    sizes = [[hop.layers[1] - hop.layers[0] for hop in route.path] for route in plan.routes]
    return any(max(found) - min(found) > 1 for found in sizes)


def _priced(name: str, plan: Plan, task: Task, objective: Objective, change: Callable[[Plan], Plan]) -> EvenSplit:
    """Every pipeline priced by itself, so that each carries what it can, whatever its weight was."""
    if plan.predicted is None:
        return EvenSplit(name, None, None, "the plan has no prediction")
    types = [task.cluster.device(device).type for stage in plan.stages for device in stage.devices]
    engine = replace(plan.engine, dtype=plan_dtype(plan.engine, task.model, types))
    changed = change(plan)
    stages = {stage.name: stage for stage in changed.stages}
    tokens_s, single_tokens_s = 0.0, 0.0
    for route in changed.routes:
        alone = replace(
            changed,
            stages=tuple(stages[hop.stage] for hop in route.path),
            routes=(replace(route, weight=1.0),),
            engine=engine,
            predicted=None,
        )
        try:
            predicted = finish(task, alone, objective).predicted
        except HexgenError as error:
            where = f"{error.where}: " if error.where else ""
            return EvenSplit(name, None, None, f"does not fit ({where}{error.message})")
        if predicted is not None:
            tokens_s += predicted.tokens_s
            single_tokens_s = max(single_tokens_s, predicted.single_tokens_s)
    figure, own = (
        (single_tokens_s, plan.predicted.single_tokens_s)
        if objective == "latency"
        else (tokens_s, plan.predicted.tokens_s)
    )
    # The same devices at the same price: tokens a dollar fall as tokens do.
    return EvenSplit(name, value_of(plan, objective) * figure / own, 1 - figure / own)
