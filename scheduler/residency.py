"""KV room of routes where a cost table says how much fits: each stage's tokens x layers, shared out by weight."""

from __future__ import annotations

from collections.abc import Mapping

from hexgen.errors import InfeasibleError
from hexgen.model import ModelSpec
from hexgen.plan import Plan
from hexgen.scheduler.cost import StageProfile


def tabled_kv_tokens(plan: Plan, profiles: Mapping[str, StageProfile], model: ModelSpec) -> tuple[int, ...]:
    """Tokens of KV cache of each route, in whole pages. Raises `InfeasibleError` where a stage holds no KV so.

    Progressive filling, as in `hexgen.memory`: rooms grow in proportion to weight until a stage on the path is
    full or the route has all it can use; the others go on.
    """
    page = plan.engine.page_size
    limit = plan.engine.max_context or model.max_context
    most = plan.engine.max_sequences * -(-limit // page) * page
    caps = [float(min(most, route.kv_tokens or most)) for route in plan.routes]
    used = [{hop.stage: hop.layers[1] - hop.layers[0] for hop in route.path} for route in plan.routes]
    left = _rooms(plan, profiles)
    tokens = [0.0] * len(plan.routes)
    growing = set(range(len(plan.routes)))
    while growing:
        slopes = {
            stage: sum(plan.routes[n].weight * used[n].get(stage, 0) for n in growing)
            for stage in left
            if any(stage in used[n] for n in growing)
        }
        stop = {
            n: min(
                (caps[n] - tokens[n]) / plan.routes[n].weight, *(left[stage] / slopes[stage] for stage in used[n])
            )
            for n in growing
        }
        level = max(0.0, min(stop.values()))
        for n in growing:
            tokens[n] += level * plan.routes[n].weight
        for stage, slope in slopes.items():
            left[stage] -= level * slope
        growing = {n for n in growing if stop[n] > level * (1 + 1e-9)}
    return tuple(int(room + 1e-6) // page * page for room in tokens)


def _rooms(plan: Plan, profiles: Mapping[str, StageProfile]) -> dict[str, float]:
    """Tokens x layers of KV of each stage with all its layers."""
    rooms: dict[str, float] = {}
    for stage in plan.stages:
        layers = stage.layers[1] - stage.layers[0]
        embeds = any(route.path[0].stage == stage.name for route in plan.routes)
        samples = any(route.path[-1].stage == stage.name for route in plan.routes)
        tokens = profiles[stage.name].kv_tokens(layers, embeds, samples)
        if tokens == 0:
            raise InfeasibleError(
                f"the cost table has no room for keys and values beside {layers} layers on "
                f"{profiles[stage.name].shape.devices[0].name} x {stage.width}",
                where=f"stage {stage.name}",
                remedy="give the stage fewer layers, or as many devices as the table knows",
            )
        rooms[stage.name] = float(tokens * layers)
    return rooms
