"""The rate that a plan can carry within limits, and how the share that keeps them falls with the rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from hexgen.cluster import Cluster
from hexgen.errors import SpecError
from hexgen.model import ModelSpec
from hexgen.plan import Plan
from hexgen.scheduler.simulation.layout import Layout, layout_of
from hexgen.scheduler.simulation.native import native_run
from hexgen.scheduler.simulation.record import Recorder
from hexgen.scheduler.simulation.requests import Requests
from hexgen.scheduler.simulation.result import SimulationResult, result_of
from hexgen.scheduler.simulation.run import Run
from hexgen.scheduler.tables.source import CostTable
from hexgen.workload import Slo

_WARM_SHARE = 0.1  # of the requests come into a cluster that is not yet as full as it will be, and are not judged
_DOUBLINGS = 40
_FIRST_STEP = 1.25
# So few requests at a time hardly ever meet: limits missed then are missed at any rate.
_ALONE = 0.005


@dataclass(frozen=True, slots=True)
class AttainmentPoint:
    rate: float  # requests/s
    attainment: float  # share of the requests that keep all limits
    result: SimulationResult


def largest_rate(
    plan: Plan,
    cluster: Cluster,
    model: ModelSpec,
    requests: Requests,
    slo: Slo,
    *,
    attainment: float = 0.99,
    cost_table: CostTable | None = None,
    tolerance: float = 0.02,
    start: float = 1.0,
    deadline: float | None = None,
) -> float:
    """The largest rate (requests/s) at which at least ``attainment`` of the requests keep all limits; 0 for none.

    ``requests`` gives lengths and the pattern of arrivals, which every rate tried shares, squeezed or stretched
    (common random numbers), so that the answer is as smooth in the plan as it can be. The first tenth is not
    judged. Growing steps from ``start`` bracket the rate, bisection narrows it to ``tolerance`` of itself; a trial
    ends as soon as too many have missed. At ``deadline`` (of `time.monotonic`) the largest rate that was found to
    keep the limits is returned. Raises ``SpecError`` for a share that so few requests cannot show.
    """
    attempt = _attempts(plan, cluster, model, requests, slo, attainment, cost_table, deadline)
    low = high = 0.0
    try:
        for found in _brackets(attempt, start):
            low, high = found
        while high - low > tolerance * high:
            middle = math.sqrt(low * high)
            if attempt(middle).kept:
                low = middle
            else:
                high = middle
    except _LateError:
        pass
    return low


def carries(
    plan: Plan,
    cluster: Cluster,
    model: ModelSpec,
    requests: Requests,
    slo: Slo,
    rate: float,
    *,
    attainment: float = 0.99,
    cost_table: CostTable | None = None,
    deadline: float | None = None,
) -> bool:
    """Whether at least ``attainment`` of the requests keep all limits at ``rate`` requests/s: one trial of those
    that `largest_rate` makes. False also where ``deadline`` came first.
    """
    try:
        return _attempts(plan, cluster, model, requests, slo, attainment, cost_table, deadline)(rate).kept
    except _LateError:
        return False


class _LateError(Exception):
    """The deadline came before a trial had its answer."""


@dataclass(frozen=True, slots=True)
class Trial:
    kept: bool
    crowd: float  # requests in the system at a time, on average


def _attempts(
    plan: Plan,
    cluster: Cluster,
    model: ModelSpec,
    requests: Requests,
    slo: Slo,
    attainment: float,
    cost_table: CostTable | None,
    deadline: float | None,
) -> Callable[[float], Trial]:
    """One trial at a rate, which raises `_LateError` where the deadline comes first. Raises ``SpecError`` where
    limits, share or requests make no question.
    """
    if slo == Slo():
        raise SpecError("there are no limits to keep", where="slo", remedy="name one: {ttft: 2s, tpot: 100ms}")
    if not 0 < attainment < 1:
        raise SpecError(f"must lie between 0 and 1, not {attainment:g}", where="attainment")
    judged_from = int(len(requests) * _WARM_SHARE)
    judged = len(requests) - judged_from
    allowed = int(judged * (1 - attainment) + 1e-9)
    if allowed < 1:
        raise SpecError(
            f"{len(requests)} requests cannot show a share of {attainment:g}",
            where="requests",
            remedy=f"simulate at least {math.ceil(1 / (1 - attainment) / (1 - _WARM_SHARE)) + 1}",
        )
    layout = layout_of(plan, cluster, model, cost_table)

    def attempt(rate: float) -> Trial:
        asked = requests.at_rate(rate)
        recorder = Recorder(asked, len(layout.routes), slo, judged_from, allowed)
        run = native_run(layout, asked, recorder) or Run(layout, asked, recorder)
        if not run.to_end(0.0, math.inf, deadline) and not recorder.hopeless:
            raise _LateError
        return Trial(not recorder.hopeless, recorder.crowd(run.now_s))

    return attempt


def _brackets(attempt: Callable[[float], Trial], start: float) -> Iterator[tuple[float, float]]:
    """Closer and closer: a rate that keeps the limits (zero: none is known), and one that does not (or the same
    again, where none was found). Steps grow: predictions that ``start`` comes from are usually near.
    """
    rate, step = start, _FIRST_STEP
    trial = attempt(rate)
    if trial.kept:
        for _ in range(_DOUBLINGS):
            yield rate, rate
            above = rate * step
            if not attempt(above).kept:
                yield rate, above
                return
            rate, step = above, min(2.0, step * step)
        return
    while trial.crowd > _ALONE:
        below = rate / step
        trial = attempt(below)
        if trial.kept:
            yield below, rate
            return
        rate, step = below, min(2.0, step * step)
    yield 0.0, 0.0


def attainment_curve(
    plan: Plan,
    cluster: Cluster,
    model: ModelSpec,
    requests: Requests,
    slo: Slo,
    rates: Iterable[float],
    *,
    cost_table: CostTable | None = None,
) -> list[AttainmentPoint]:
    """The same requests at each of these rates, served to their ends; the first tenth is not judged."""
    layout = layout_of(plan, cluster, model, cost_table)
    return [_point(layout, requests.at_rate(rate), slo, rate) for rate in rates]


def _point(layout: Layout, requests: Requests, slo: Slo, rate: float) -> AttainmentPoint:
    recorder = Recorder(requests, len(layout.routes), slo, 0, None)
    run = native_run(layout, requests, recorder) or Run(layout, requests, recorder)
    warm_s = float(requests.arrival_s[int(len(requests) * _WARM_SHARE)])
    run.to_end(warm_s, math.inf)
    result = result_of(layout, requests, recorder, run, slo)
    return AttainmentPoint(rate, result.attainment(), result)
