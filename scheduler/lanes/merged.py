"""A plan's own routes as ways of machines that merge what waits at them, for any plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from hexgen.plan import Plan
from hexgen.scheduler.lanes.model import Pace, Stop, Way, pace, served
from hexgen.scheduler.sharing import RouteState, StageLoad
from hexgen.scheduler.tables.published import PublishedProfile
from hexgen.scheduler.traffic import Traffic

_DIGITS = 9  # of shares: sums of the same weights in another order are the same


def ways_of_plan(plan: Plan, states: Sequence[RouteState]) -> list[Way]:
    """The routes with what the others send over the same stages and links."""
    total = sum(route.weight for route in plan.routes)
    meets: dict[str, float] = {}
    crosses: dict[tuple[str, str], float] = {}
    for route in plan.routes:
        share = route.weight / total
        for hop in route.path:
            meets[hop.stage] = meets.get(hop.stage, 0.0) + share
        for a, b in pairwise(route.path):
            crosses[a.stage, b.stage] = crosses.get((a.stage, b.stage), 0.0) + share
    return [
        Way(
            route.weight / total,
            tuple(
                Stop(
                    part.profile,
                    part.layers,
                    part.embeds,
                    part.samples,
                    min(1.0, round(meets[hop.stage], _DIGITS)),
                )
                for hop, part in zip(route.path, state.parts, strict=True)
            ),
            state.edges,
            tuple(round(crosses[a.stage, b.stage], _DIGITS) for a, b in pairwise(route.path)),
            state.back,
        )
        for route, state in zip(plan.routes, states, strict=True)
    ]


def _alike(ways: Sequence[Way]) -> list[Way]:
    """One for all that meet the same."""
    found: dict[Way, float] = {}
    for way in ways:
        same = replace(way, weight=1.0)
        found[same] = found.get(same, 0.0) + way.weight
    return [replace(way, weight=weight) for way, weight in found.items()]


def merged(
    ways: Sequence[Way], states: Sequence[RouteState], traffic: Traffic, limited: bool
) -> tuple[float, Pace]:
    """Requests/s that the plan serves at most, and how it runs: at the workload's rate, or asked for all it can.

    Asked for more than its slowest stage lets through, its KV room fills up, and who has room waits at that stage
    (Little's law), unless limits keep the room from being filled.
    """
    ways = _alike(ways)
    most = float(sum(state.most for state in states))
    full = served(ways, traffic, most, limited)
    if full.requests_s <= 0:  # not even one request alone keeps the limits: that one is told
        full = pace(ways, traffic, 1 / pace(ways, traffic, 0.0).latency_s)
    if traffic.rate is not None and traffic.rate < full.requests_s:
        return full.requests_s, pace(ways, traffic, traffic.rate)
    if limited or traffic.decodes <= 0:
        return full.requests_s, full
    latency = max(full.latency_s, most / full.requests_s)
    trip = (latency - full.ttft_s) / traffic.decodes
    return full.requests_s, replace(full, trip_s=trip, latency_s=latency, in_flight=most)


def merged_loads(
    plan: Plan, states: Sequence[RouteState], traffic: Traffic, rates: Sequence[float]
) -> dict[str, StageLoad]:
    """What share of its published rate each stage uses, when the routes carry these requests/s."""
    prefill = {stage.name: 0.0 for stage in plan.stages}
    decode = dict(prefill)
    for route, state, rate in zip(plan.routes, states, rates, strict=True):
        for hop, part in zip(route.path, state.parts, strict=True):
            if isinstance(part.profile, PublishedProfile):
                limit = part.profile.rate_tokens_s(part.layers)
                prefill[hop.stage] += rate * traffic.prompt / limit
                decode[hop.stage] += rate * traffic.decodes / limit
    return {name: StageLoad(prefill[name], decode[name]) for name in prefill}
