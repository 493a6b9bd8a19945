"""One route as arithmetic: what it serves at a given concurrency, and how it answers one request alone.

A route of `d` stages keeps at most `d` steps in flight (the engine's own rule). With `B` sequences on it each step
carries `B/d` of them, and a step follows the last one after

    cycle = max(busiest stage, busiest link, round trip / d)

because a sequence can only decode once its token has come back. Everything else follows from Little's law.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hexgen.scheduler.cost import EdgeCost, StageProfile
from hexgen.scheduler.figures import KV_FILL
from hexgen.scheduler.times import end_index
from hexgen.scheduler.traffic import Mix, Traffic, alone_mix, mix_of


@dataclass(frozen=True, slots=True)
class Part:
    """A stage's place on a route."""

    profile: StageProfile
    layers: int  # that the route uses
    embeds: bool
    samples: bool


@dataclass(frozen=True, slots=True)
class Steady:
    """A route under load. ``limit``: ``stage``, ``link`` (with ``index``) or ``round trip``."""

    concurrency: float
    requests_s: float
    tokens_s: float  # output tokens
    ttft_s: float
    tpot_s: float
    latency_s: float
    cycle_s: float
    busy_s: tuple[float, ...]  # of each stage, a cycle
    link_busy_s: tuple[float, ...]
    limit: str
    index: int
    mix: Mix


@dataclass(frozen=True, slots=True)
class Alone:
    """One request on an idle route."""

    ttft_s: float
    tpot_s: float
    latency_s: float
    tokens_s: float


def concurrency_for(kv_tokens: int, traffic: Traffic) -> int:
    """Sequences that fit in a route's KV room at once, on average over their lives; 0 where not even one does."""
    if kv_tokens < traffic.peak_tokens:
        return 0
    return max(1, min(traffic.max_sequences, int(KV_FILL * kv_tokens / traffic.resident_tokens)))


def steady(
    parts: tuple[Part, ...],
    edges: tuple[EdgeCost, ...],
    back: EdgeCost | None,
    traffic: Traffic,
    concurrency: float,
    stretch: Sequence[float] | None = None,
) -> Steady:
    """The route with ``concurrency`` sequences on it. ``back``: the tokens' way home, None for one stage.

    ``stretch``: by what factor each stage is slowed by the other routes that share it.
    """
    mix = mix_of(traffic, concurrency, len(parts))
    times = [part.profile.times(mix) for part in parts]
    ends = [end_index(part.embeds, part.samples) for part in parts]
    busy = tuple(time.busy_s(part.layers, end) for part, time, end in zip(parts, times, ends, strict=True))
    if stretch is not None:
        busy = tuple(seconds * factor for seconds, factor in zip(busy, stretch, strict=True))
    tokens = mix.mean_tokens
    link_busy = tuple(tokens * edge.token_s for edge in edges)
    travel = sum(edge.delay_s for edge in edges) + sum(link_busy) + (back.delay_s if back else 0.0)
    round_trip = (sum(busy) + travel) / mix.steps_in_flight
    cycle, limit, index = max(busy), "stage", busy.index(max(busy))
    if link_busy and max(link_busy) > cycle:
        cycle, limit, index = max(link_busy), "link", link_busy.index(max(link_busy))
    # A lone sequence always waits for its own round trip: that may be the stages' doing, not the links'.
    if round_trip > cycle * (1 + 1e-9):
        cycle = round_trip
        if sum(busy) < travel:
            limit, index = "round trip", 0
    tpot = mix.steps_in_flight * cycle
    requests = mix.running / (mix.cycles * tpot)
    full = [time.mixed_s(part.layers, end) for part, time, end in zip(parts, times, ends, strict=True)]
    if stretch is not None:
        full = [seconds * factor for seconds, factor in zip(full, stretch, strict=True)]
    # Beside decodes a prompt comes in the policy's chunks, one step after the other.
    steps = max(float(traffic.chunks), traffic.prompt / traffic.chunk(len(parts)))
    ttft = sum(full) + travel + (steps - 1) * max(full) + cycle / 2
    return Steady(
        concurrency=concurrency,
        requests_s=requests,
        tokens_s=requests * traffic.output,
        ttft_s=ttft,
        tpot_s=tpot,
        latency_s=ttft + traffic.decodes * tpot,
        cycle_s=cycle,
        busy_s=busy,
        link_busy_s=link_busy,
        limit=limit,
        index=index,
        mix=mix,
    )


def alone(parts: tuple[Part, ...], edges: tuple[EdgeCost, ...], back: EdgeCost | None, traffic: Traffic) -> Alone:
    """One request of mean lengths with nobody else on the route."""
    mix = alone_mix(traffic)
    times = [(part.profile.times(mix), end_index(part.embeds, part.samples), part.layers) for part in parts]
    chunk = mix.mixed.tokens
    stages = [time.mixed_s(layers, end) for time, end, layers in times]
    delays = sum(edge.delay_s for edge in edges) + (back.delay_s if back else 0.0)
    ttft = sum(stages) + delays + sum(chunk * edge.token_s for edge in edges)
    ttft += (traffic.prompt / chunk - 1) * max(*stages, *(chunk * edge.token_s for edge in edges), 0.0)
    tpot = sum(time.busy_s(layers, end) for time, end, layers in times)
    tpot += delays + sum(edge.token_s for edge in edges)
    latency = ttft + traffic.decodes * tpot
    return Alone(ttft, tpot, latency, traffic.output / latency)


def at_rate(
    parts: tuple[Part, ...],
    edges: tuple[EdgeCost, ...],
    back: EdgeCost | None,
    traffic: Traffic,
    most: int,
    requests_s: float,
    stretch: Sequence[float] | None = None,
) -> Steady:
    """The route serving ``requests_s``, or as near to it as ``most`` sequences at once can."""
    full = steady(parts, edges, back, traffic, float(most), stretch)
    if full.requests_s <= requests_s:
        return full
    low, high = 0.0, float(most)
    for _ in range(40):
        middle = (low + high) / 2
        if steady(parts, edges, back, traffic, middle, stretch).requests_s < requests_s:
            low = middle
        else:
            high = middle
    return steady(parts, edges, back, traffic, high, stretch)


def keeps_limits(state: Steady, traffic: Traffic) -> bool:
    slo = traffic.slo
    return (
        (slo.ttft_s is None or state.ttft_s <= slo.ttft_s)
        and (slo.tpot_s is None or state.tpot_s <= slo.tpot_s)
        and (slo.latency_s is None or state.latency_s <= slo.latency_s)
    )


def most_within_limits(
    parts: tuple[Part, ...], edges: tuple[EdgeCost, ...], back: EdgeCost | None, traffic: Traffic, most: int
) -> int:
    """The most sequences at once, up to ``most``, that keep ``traffic.slo`` on average; 0 where none does."""
    if keeps_limits(steady(parts, edges, back, traffic, float(most)), traffic):
        return most
    low, high = 0, most  # low keeps them (or is none at all), high does not
    while high - low > 1:
        middle = (low + high) // 2
        if keeps_limits(steady(parts, edges, back, traffic, float(middle)), traffic):
            low = middle
        else:
            high = middle
    return low
