"""What the routes of a plan carry together: a stage that several of them share gives each a part of its time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hexgen.plan import Plan
from hexgen.scheduler.cost import EdgeCost
from hexgen.scheduler.pipeline import Alone, Part, Steady, steady
from hexgen.scheduler.traffic import Traffic

_MOST_STRETCH = 1e6
_HALVINGS = 30


@dataclass(frozen=True, slots=True)
class RouteState:
    """One route of a plan, ready to be asked."""

    parts: tuple[Part, ...]
    edges: tuple[EdgeCost, ...]
    back: EdgeCost | None
    most: int  # sequences at once
    full: Steady  # at that concurrency
    alone: Alone


@dataclass(frozen=True, slots=True)
class StageLoad:
    """Seconds that a stage works in a second."""

    prefill: float
    decode: float


def sustained(plan: Plan, states: Sequence[RouteState], traffic: Traffic) -> list[float]:
    """Requests/s of each route when the plan serves all it can, shared out in proportion to the routes' weights.

    Bound by each route's own pace, by every stage's time, and, where stages are shared, by each route's pace when
    the others slow it down.
    """
    weights = [route.weight for route in plan.routes]
    total = sum(weights)
    shares = [weight / total for weight in weights]
    limit = min(state.full.requests_s / share for state, share in zip(states, shares, strict=True))
    for load in _seconds(plan, states, shares).values():
        if load > 0:
            limit = min(limit, 1 / load)
    if shared(plan) and not _keeps_pace(plan, states, traffic, [limit * share for share in shares]):
        low, high = 0.0, limit
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            if _keeps_pace(plan, states, traffic, [middle * share for share in shares]):
                low = middle
            else:
                high = middle
        limit = low
    return [limit * share for share in shares]


def stretches(plan: Plan, states: Sequence[RouteState], rates: Sequence[float]) -> list[tuple[float, ...] | None]:
    """By what factor the other routes slow each stage of a route: it has what they leave. None: not at all."""
    if not shared(plan):
        return [None] * len(states)
    loads = _seconds(plan, states, rates)
    out: list[tuple[float, ...] | None] = []
    for route, state, rate in zip(plan.routes, states, rates, strict=True):
        own = rate * _steps_a_request(state)
        others = [loads[hop.stage] - own * busy for hop, busy in zip(route.path, state.full.busy_s, strict=True)]
        out.append(tuple(1 / max(1 - load, 1 / _MOST_STRETCH) for load in others))
    return out


def stage_loads(plan: Plan, states: Sequence[RouteState], rates: Sequence[float]) -> dict[str, StageLoad]:
    """How busy each stage is with prompts and with decodes, when the routes carry these requests/s.

    A step's decodes cost what a step without prompt would; prompts cost what they add to it.
    """
    whole = _seconds(plan, states, rates)
    decode = {stage.name: 0.0 for stage in plan.stages}
    for route, state, rate in zip(plan.routes, states, rates, strict=True):
        steps = rate * _steps_a_request(state)
        plain = state.full.mix.plain
        for hop, part in zip(route.path, state.parts, strict=True):
            if plain.tokens > 0:
                decode[hop.stage] += steps * part.profile.step_s(part.layers, plain, part.embeds, part.samples)
    return {name: StageLoad(max(0.0, seconds - decode[name]), decode[name]) for name, seconds in whole.items()}


def _seconds(plan: Plan, states: Sequence[RouteState], rates: Sequence[float]) -> dict[str, float]:
    """Seconds that each stage works in a second, when the routes carry these requests/s."""
    seconds = {stage.name: 0.0 for stage in plan.stages}
    for route, state, rate in zip(plan.routes, states, rates, strict=True):
        steps = rate * _steps_a_request(state)
        for hop, busy in zip(route.path, state.full.busy_s, strict=True):
            seconds[hop.stage] += steps * busy
    return seconds


def _steps_a_request(state: RouteState) -> float:
    return 1 / (state.full.requests_s * state.full.cycle_s)


def shared(plan: Plan) -> bool:
    """Whether some stage is on several routes, or more than once on one."""
    hops = [hop.stage for route in plan.routes for hop in route.path]
    return len(set(hops)) < len(hops)


def _keeps_pace(plan: Plan, states: Sequence[RouteState], traffic: Traffic, rates: Sequence[float]) -> bool:
    return all(
        rate <= steady(s.parts, s.edges, s.back, traffic, float(s.most), slowed).requests_s * (1 + 1e-9)
        for s, rate, slowed in zip(states, rates, stretches(plan, states, rates), strict=True)
    )
