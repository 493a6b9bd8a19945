"""What machines that merge all that waits at them serve: the closed loop of requests, KV room and sweeps.

A machine works off one batch after another: whatever has arrived meanwhile, prompts and decodes of any route, is
the next batch (continuous batching per stage, as in Helix's runtime, ASPLOS'25, section 5). With ``x`` requests a
second, a stage that meets the share ``s`` of them sees ``x s`` prompts and ``x s (output - 1)`` decodes a second.

- A batch of ``b`` decodes takes ``d(b)``; a prompt in it adds ``P``. Prompts keep the machine busy for the share
  ``r = x s P``; the mean batch lasts ``S = d(b) / (1 - r)`` and gathers ``b = decodes/s x S``.
- Decodes come in bunches, one after another over a link: the first starts a batch by itself, and the others wait
  all of it out, ``d``, where the machine is busy: about ``l d / (1 + l d)`` of the time at ``l`` decodes/s.
- A prompt is slower by ``P`` at every stage, and decodes cannot pass it: whoever comes up behind one travels on
  with it. On one series a decode is behind a prompt after stages that cost prompts ``D`` in all if one set out
  within ``D`` before it, with chance ``1 - exp(-E)``, ``E = x D``. Where a way goes from a lane with share ``s``
  of the requests to one with share ``s' < s``, prompts ahead go along with chance ``s' / s``; so along a way
  ``E_j = E_i min(1, s_j / s_i) + x s_j P_j``, and stage ``j`` costs a decode ``P_j (1 - exp(-E))`` more, with the
  ``E`` of its middle. Parallel lanes thus spare decodes most of the prompts.
- Little's law closes the loop: with ``N`` requests at once, ``N = x (ttft + (output - 1) trip(x))``, and ``x`` is
  at most what the slowest stage or link lets through.

Queues are taken as independent, and lengths as their means; figures of a simulator differ by tens of percent, the
order of plans much less.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hexgen.scheduler.cost import EdgeCost, StageProfile
from hexgen.scheduler.tables.published import PublishedProfile
from hexgen.scheduler.times import end_index
from hexgen.scheduler.traffic import StepLoad, Traffic, mix_of

_PRECISION, _ROUNDS = 1e-5, 40  # of the largest rate
_SETTLING = 4  # rounds of the fixed point of batch and step
# Delays behind prompts grow with the square of their lengths, and these vary: mean square over square of mean, for
# the conversations that Helix and others replay about 1.5.
SPREAD = 1.5
# Of the roofline's pace that a prompt of some hundred tokens reaches, by the per-layer measurements of Helix's
# artifact (benchmarks/data/helix_profiles_llama2_70b.json): cards of 70 W do not hold their peak. For published
# tables only, which say nothing of single prompts.
_PROMPT_SHARE = {"A100": 1.4, "L4": 0.65, "T4": 0.65}
_FULL = 0.98  # of a machine's time that prompts may take


@dataclass(frozen=True, slots=True)
class Stop:
    """A stage on a way: the layers it works on, and the share of all requests that it meets."""

    profile: StageProfile
    layers: int
    embeds: bool
    samples: bool
    share: float


@dataclass(frozen=True, slots=True)
class Way:
    """A route: its stops, and the links between them."""

    weight: float  # share of all requests
    stops: tuple[Stop, ...]
    edges: tuple[EdgeCost, ...]
    edge_shares: tuple[float, ...]  # of all requests that cross each edge
    back: EdgeCost | None


@dataclass(frozen=True, slots=True)
class Pace:
    """All ways together at ``requests_s``; means over requests, but ``quiet_s`` is a trip that meets no prompt."""

    requests_s: float
    ttft_s: float
    trip_s: float  # of one decode, the mean
    quiet_s: float  # near the median
    latency_s: float
    in_flight: float


@dataclass(frozen=True, slots=True)
class StopTimes:
    """A stop under load, seconds."""

    prompt_s: float  # that a prompt is slower by than a decode: what it adds to a batch, and waiting for others
    decode_s: float  # a batch of decodes
    wait_s: float  # for batches of decodes under way
    ahead: float  # what the stage adds to E: prompts that are in it on average


def step_s(stop: Stop, load: StepLoad) -> float:
    """A batch's seconds. A published table knows rates of full machines only: a single batch is the roofline's."""
    if isinstance(stop.profile, PublishedProfile):
        fixed = StageProfile.fixed_s(stop.profile, load, stop.embeds, stop.samples)
        return fixed + stop.layers * StageProfile.layer_s(stop.profile, load)
    return stop.profile.step_s(stop.layers, load, stop.embeds, stop.samples)


def _prompt_s(stop: Stop, plain: StepLoad, decode_s: float, traffic: Traffic) -> float:
    """What one prompt adds to a batch of ``plain`` decodes that takes ``decode_s``."""
    prompt = traffic.prefill_load(traffic.prompt)
    if isinstance(stop.profile, PublishedProfile):
        share = _PROMPT_SHARE.get(stop.profile.shape.devices[0].name.partition("-")[0], 1.0)
        return stop.layers * StageProfile.layer_s(stop.profile, prompt) / share
    return max(0.0, step_s(stop, plain.plus(prompt)) - decode_s)


def stop_limit(stop: Stop, traffic: Traffic) -> float:
    """Requests/s of the whole plan that the stop lets through."""
    if isinstance(stop.profile, PublishedProfile):
        rate = stop.profile.rate_tokens_s(stop.layers)
    else:
        mix = mix_of(traffic, float(traffic.max_sequences), 1)
        rate = stop.profile.flow_tokens_s(stop.layers, mix, end_index(stop.embeds, stop.samples))
    return rate / (traffic.prompt + traffic.decodes) / stop.share


def stop_times(stop: Stop, traffic: Traffic, requests_s: float) -> StopTimes:
    """The stop when the plan carries ``requests_s``; infinite where prompts alone fill it."""
    arriving = requests_s * stop.share
    decodes = arriving * traffic.decodes
    batch = 1.0
    prompt = decode = math.inf
    taken = 0.0
    for _ in range(_SETTLING):
        plain = traffic.decode_load(batch)
        decode = step_s(stop, plain)
        prompt = _prompt_s(stop, plain, decode, traffic)
        taken = arriving * prompt
        if taken >= _FULL:
            return StopTimes(math.inf, math.inf, math.inf, 1.0)
        batch = min(float(traffic.token_budget), max(1.0, decodes * decode / (1 - taken)))
    busy = decodes * decode / (1 + decodes * decode)
    prompt += _queue_s(taken, prompt)
    return StopTimes(prompt, decode, busy * decode, arriving * prompt)


def way_times(
    way: Way, traffic: Traffic, requests_s: float, known: dict[Stop, StopTimes] | None = None
) -> tuple[float, float, float]:
    """TTFT, mean trip and quiet trip of one way when the plan carries ``requests_s``; seconds.

    ``known``: stops at this rate, of other ways; those of this one are added.
    """
    ttft = trip = quiet = ahead = 0.0
    before = 1.0
    known = {} if known is None else known
    for i, stop in enumerate(way.stops):
        if i > 0:
            edge, crossing = way.edges[i - 1], way.edge_shares[i - 1]
            sending = traffic.prompt * edge.token_s
            ahead *= min(1.0, crossing / before)
            taken = requests_s * crossing * sending
            behind = 1 - math.exp(-SPREAD * (ahead + taken / 2))
            ahead += taken
            before = crossing
            quiet += edge.delay_s + edge.token_s
            trip += edge.delay_s + edge.token_s + behind * sending
            ttft += edge.delay_s + sending + _queue_s(taken, sending)
        times = known.get(stop)
        if times is None:
            times = known[stop] = stop_times(stop, traffic, requests_s)
        ahead *= min(1.0, stop.share / before)
        before = stop.share
        behind = 1 - math.exp(-SPREAD * (ahead + times.ahead / 2))
        ahead += times.ahead
        quiet += times.decode_s + times.wait_s
        trip += times.decode_s + times.wait_s + behind * times.prompt_s
        ttft += times.decode_s + times.wait_s + times.prompt_s
    if way.back is not None:
        quiet, trip, ttft = quiet + way.back.delay_s, trip + way.back.delay_s, ttft + way.back.delay_s
    return ttft, trip, quiet


def _queue_s(taken: float, seconds: float) -> float:
    """Waiting of prompts for prompts: M/D/1."""
    return taken / (1 - taken) * seconds / 2 if taken < 1 else math.inf


def pace(
    ways: Sequence[Way], traffic: Traffic, requests_s: float, known: dict[Stop, StopTimes] | None = None
) -> Pace:
    """The plan carrying ``requests_s``, whether or not that many fit. ``known``: stops at that rate, for more."""
    ttft = trip = quiet = 0.0
    known = {} if known is None else known
    for way in ways:
        a, b, c = way_times(way, traffic, requests_s, known)
        ttft, trip, quiet = ttft + way.weight * a, trip + way.weight * b, quiet + way.weight * c
    latency = ttft + traffic.decodes * trip
    return Pace(requests_s, ttft, trip, quiet, latency, requests_s * latency)


def flow_limit(ways: Sequence[Way], traffic: Traffic) -> float:
    """Requests/s that the slowest stage or link lets through."""
    tokens = traffic.prompt + traffic.decodes
    limit = math.inf
    for way in ways:
        for stop in way.stops:
            limit = min(limit, stop_limit(stop, traffic))
        for edge, share in zip(way.edges, way.edge_shares, strict=True):
            if edge.token_s > 0:
                limit = min(limit, 1 / (tokens * edge.token_s * share))
    return limit


def load_of(state: Pace, traffic: Traffic, most: float, limited: bool = False) -> float:
    """How much of its room the plan needs, or of what the limits grant where that is more: 1 is all."""
    if most <= 0:
        return math.inf
    slo = traffic.slo
    times = ((state.ttft_s, slo.ttft_s), (state.trip_s, slo.tpot_s), (state.latency_s, slo.latency_s))
    taken = [s / allowed for s, allowed in times if limited and allowed is not None]
    return max(state.in_flight / most, *taken) if taken else state.in_flight / most


def served(ways: Sequence[Way], traffic: Traffic, most: float, limited: bool = False) -> Pace:
    """The most that the plan serves with at most ``most`` requests at once; ``limited``: within the limits too.

    In flight and times grow with the rate, so the largest rate is where a false position settles (the Illinois
    rule: Dowell and Jarratt, BIT 11, 1971), from below; halved where they are infinite.
    """
    high = flow_limit(ways, traffic)
    best = pace(ways, traffic, high)
    above = load_of(best, traffic, most, limited) - 1
    if above <= 0:
        return best
    best = pace(ways, traffic, 0.0)
    low, below = 0.0, load_of(best, traffic, most, limited) - 1
    if below > 0:
        return best
    near = high * _PRECISION
    for _ in range(_ROUNDS):
        if high - low <= near:
            break
        middle = (low + high) / 2
        if math.isfinite(above) and below < 0:
            middle = min(high - near / 2, max(low + near / 2, low - below * (high - low) / (above - below)))
        state = pace(ways, traffic, middle)
        found = load_of(state, traffic, most, limited) - 1
        if found <= 0:
            best, low, below, above = state, middle, found, above / 2
        else:
            high, above, below = middle, found, below / 2
    return best
