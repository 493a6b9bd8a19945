"""How many layers each stage of a fixed order gets: exact, for any stage times that do not fall with layers.

For a given concurrency the longest stage is minimised by giving each next layer to whoever would finish it first;
where round trips bound the route instead, layers move to the fastest stages as far as a threshold on the longest
stage allows, and the best threshold is searched (`division` does both). Concurrency decides how much KV each
layer needs, hence how many layers fit: every concurrency that could be best is tried. Brute force over all
divisions agrees (see the tests).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from hexgen.scheduler.cost import EdgeCost, StageProfile
from hexgen.scheduler.division import LinearSeconds, Seconds, TabledSeconds
from hexgen.scheduler.figures import KV_FILL
from hexgen.scheduler.pipeline import (
    Alone,
    Part,
    Steady,
    alone,
    concurrency_for,
    keeps_limits,
    most_within_limits,
    steady,
)
from hexgen.scheduler.times import MixTimes, end_index
from hexgen.scheduler.traffic import StepLoad, Traffic, mix_of

# How many concurrencies (or thresholds) are tried where memory binds: to rank orders, to decide, to be exact.
QUICK, NORMAL, EXHAUSTIVE = 1, 10, 64
_RATIO = 0.85  # between concurrencies, where not all are tried
_TO_ONE = 24  # from this many on, they reach down to one sequence


@dataclass(frozen=True, slots=True)
class Chain:
    """Stages in order, and what joins them; ``back`` carries sampled tokens from the last to the first."""

    profiles: tuple[StageProfile, ...]
    edges: tuple[EdgeCost, ...]
    back: EdgeCost | None

    def parts(self, layers: Sequence[int]) -> tuple[Part, ...]:
        last = len(self.profiles) - 1
        return tuple(
            Part(profile, n, i == 0, i == last)
            for i, (profile, n) in enumerate(zip(self.profiles, layers, strict=True))
        )


@dataclass(frozen=True, slots=True)
class Division:
    """Layers of each stage, the KV room they leave, and what the route then does."""

    layers: tuple[int, ...]
    kv_tokens: int
    steady: Steady  # at the concurrency that counts for the goal
    alone: Alone


def measure(chain: Chain, layers: Sequence[int], traffic: Traffic, least: float = 0.0) -> Division | None:
    """The route with these layers at its full concurrency; None where not one mean request fits, or where it
    serves less than ``least`` tokens/s.
    """
    parts = chain.parts(layers)
    kv_tokens = min(part.profile.kv_tokens(part.layers, part.embeds, part.samples) for part in parts)
    concurrency = concurrency_for(kv_tokens, traffic)
    if concurrency < 1:
        return None
    full = steady(parts, chain.edges, chain.back, traffic, float(concurrency))
    if full.tokens_s < least:
        return None
    return Division(tuple(layers), kv_tokens, full, alone(parts, chain.edges, chain.back, traffic))


def divide_for_throughput(
    chain: Chain, layers: int, traffic: Traffic, effort: int = NORMAL, patience: int | None = None
) -> Division | None:
    """The division that serves most tokens a second; ``traffic.slo`` is not looked at.

    ``patience``: after so many concurrencies in a row that gained nothing, lower ones are not tried.
    """
    best: Division | None = None
    dry = 0
    for concurrency in _concurrencies(chain, layers, traffic, effort):
        caps = _caps(chain, traffic, concurrency)
        division = _shortest_cycle(chain, layers, traffic, concurrency, caps)
        found = measure(chain, division, traffic, 0.0 if best is None else best.steady.tokens_s)
        dry += 1
        if found is not None and (best is None or _better(found, best)):
            best, dry = found, 0
        if best is not None and dry == patience:
            break
        if not any(n == cap for n, cap in zip(division, caps, strict=True)):
            break  # memory bounds nobody here: fewer sequences would only serve less
    return best


def divide_within_limits(chain: Chain, layers: int, traffic: Traffic, effort: int = NORMAL) -> Division | None:
    """As for throughput, at the largest concurrency whose mean TTFT, TPOT and latency are within the limits."""
    best: Division | None = None
    known: set[tuple[int, ...]] = set()  # many concurrencies lead to the same division
    for concurrency in _concurrencies(chain, layers, traffic, max(effort, _TO_ONE)):
        division = _shortest_cycle(chain, layers, traffic, concurrency, _caps(chain, traffic, concurrency))
        if division in known:
            continue
        known.add(division)
        found = within_limits(chain, division, traffic, None if best is None else best.steady)
        if found is not None and (best is None or _better(found, best)):
            best = found
    return best


def within_limits(
    chain: Chain, layers: Sequence[int], traffic: Traffic, beaten: Steady | None = None
) -> Division | None:
    """The route with these layers at the largest concurrency that keeps ``traffic.slo``; None where none does.

    Nor where it cannot serve more than ``beaten``: it serves no more with as many sequences, and fewer would have
    to keep the limits.
    """
    full = measure(chain, layers, traffic)
    if full is None or keeps_limits(full.steady, traffic):
        return full
    parts = chain.parts(layers)
    if beaten is not None and beaten.concurrency <= full.steady.concurrency:
        same = steady(parts, chain.edges, chain.back, traffic, beaten.concurrency)
        if same.tokens_s <= beaten.tokens_s and not keeps_limits(same, traffic):
            return None
    most = most_within_limits(parts, chain.edges, chain.back, traffic, int(full.steady.concurrency))
    if most == 0:
        return None
    state = steady(parts, chain.edges, chain.back, traffic, float(most))
    return Division(full.layers, full.kv_tokens, state, full.alone)


def divide_for_latency(chain: Chain, layers: int, traffic: Traffic, effort: int = NORMAL) -> Division | None:
    """The division that answers one request soonest."""
    caps = _caps(chain, traffic, 1)
    if not _fits(caps, layers):
        return None
    caps = [min(cap, layers) for cap in caps]
    chunk = min(traffic.prompt, float(traffic.token_budget))
    lone = traffic.of_mean_lengths
    prompt, decode = lone.prefill_load(chunk), lone.decode_load(1.0)
    prefill = _seconds_alone(chain, caps, [(1.0, prompt)])
    whole = _seconds_alone(chain, caps, [(1.0, prompt), (lone.decodes, decode)])
    best = measure(chain, whole.cheapest(layers, caps), traffic)
    if traffic.prompt > chunk:  # several chunks: the longest stage spaces them
        floor = prefill.longest(prefill.shortest_max(layers, caps))
        thresholds = prefill.thresholds(caps, floor, math.inf)
        step = 1 if effort >= EXHAUSTIVE else max(1, len(thresholds) // effort)
        for threshold in thresholds[::step]:
            division = whole.cheapest(layers, prefill.capped(caps, threshold))
            found = measure(chain, division, traffic)
            if found is not None and (best is None or found.alone.latency_s < best.alone.latency_s):
                best = found
    return best


# ---- what fits --------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1 << 12)
def tokens_for(concurrency: int, traffic: Traffic) -> int:
    """The KV room that `concurrency_for` turns into ``concurrency``."""
    needed = max(traffic.peak_tokens, concurrency * traffic.resident_tokens / KV_FILL if concurrency > 1 else 0.0)
    tokens = math.ceil(needed / traffic.page_size) * traffic.page_size
    return tokens if concurrency_for(tokens, traffic) >= concurrency else tokens + traffic.page_size


def _caps(chain: Chain, traffic: Traffic, concurrency: int) -> list[int]:
    tokens = tokens_for(concurrency, traffic)
    last = len(chain.profiles) - 1
    return [profile.max_layers(tokens, i == 0, i == last) for i, profile in enumerate(chain.profiles)]


def _fits(caps: Sequence[int], layers: int) -> bool:
    return len(caps) <= layers <= sum(caps) and min(caps) >= 1


def _concurrencies(chain: Chain, layers: int, traffic: Traffic, effort: int) -> list[int]:
    """From the most sequences that could ever fit, downwards."""
    low, high = 0, traffic.max_sequences + 1  # low fits (or is none), high does not
    while high - low > 1:
        middle = (low + high) // 2
        if _fits(_caps(chain, traffic, middle), layers):
            low = middle
        else:
            high = middle
    if low == 0:
        return []
    if low <= effort and effort >= EXHAUSTIVE:
        return list(range(low, 0, -1))
    ratio = min(_RATIO, (1 / low) ** (1 / effort)) if effort >= _TO_ONE else _RATIO
    return list(dict.fromkeys(max(1, round(low * ratio**i)) for i in range(effort + (effort >= _TO_ONE))))


# ---- times ----------------------------------------------------------------------------------------------------


def _shortest_cycle(
    chain: Chain, layers: int, traffic: Traffic, concurrency: int, caps: Sequence[int]
) -> tuple[int, ...]:
    mix = mix_of(traffic, float(concurrency), len(chain.profiles))
    times = [profile.times(mix) for profile in chain.profiles]
    last = len(times) - 1
    seconds: Seconds
    linear = [time for time in times if isinstance(time, MixTimes)]
    if len(linear) == len(times):
        fixed = [time.fixed_s[end_index(i == 0, i == last)] for i, time in enumerate(linear)]
        seconds = LinearSeconds(fixed, [time.layer_s for time in linear])
    else:
        seconds = TabledSeconds(
            [
                [time.busy_s(n, end_index(i == 0, i == last)) for n in range(min(cap, layers) + 1)]
                for i, (time, cap) in enumerate(zip(times, caps, strict=True))
            ]
        )
        caps = [min(cap, layers) for cap in caps]
    division = seconds.shortest_max(layers, caps)
    tokens = mix.mean_tokens
    link = max((tokens * edge.token_s for edge in chain.edges), default=0.0)
    travel = sum(edge.delay_s + tokens * edge.token_s for edge in chain.edges)
    travel += chain.back.delay_s if chain.back else 0.0

    def round_trip(division: Sequence[int]) -> float:
        return (seconds.total(division) + travel) / mix.steps_in_flight

    floor = seconds.longest(division)
    ceiling = round_trip(division)
    if ceiling <= max(floor, link) * (1 + 1e-12):
        return division
    # Longest stage up, round trip down: the best is where they cross.
    thresholds = seconds.thresholds(caps, floor, ceiling)
    low, high = 0, len(thresholds) - 1
    while low < high:
        middle = (low + high) // 2
        trial = seconds.cheapest(layers, seconds.capped(caps, thresholds[middle]))
        if round_trip(trial) <= max(thresholds[middle], link):
            high = middle
        else:
            low = middle + 1
    trials = [division] + [
        seconds.cheapest(layers, seconds.capped(caps, thresholds[i])) for i in (low - 1, low) if i >= 0
    ]
    return min(trials, key=lambda d: (max(seconds.longest(d), link, round_trip(d)), d))


def _seconds_alone(chain: Chain, caps: Sequence[int], loads: Sequence[tuple[float, StepLoad]]) -> Seconds:
    """Seconds of so many steps of each load, one after another."""
    last = len(chain.profiles) - 1
    if all(profile.linear for profile in chain.profiles):
        fixed = [
            sum(times * profile.fixed_s(load, i == 0, i == last) for times, load in loads)
            for i, profile in enumerate(chain.profiles)
        ]
        slopes = [sum(times * profile.layer_s(load) for times, load in loads) for profile in chain.profiles]
        return LinearSeconds(fixed, slopes)
    return TabledSeconds(
        [
            [0.0]
            + [
                sum(times * profile.step_s(n, load, i == 0, i == last) for times, load in loads)
                for n in range(1, cap + 1)
            ]
            for i, (profile, cap) in enumerate(zip(chain.profiles, caps, strict=True))
        ]
    )


def _better(found: Division, best: Division) -> bool:
    return (found.steady.tokens_s, -found.alone.latency_s) > (best.steady.tokens_s, -best.alone.latency_s)
