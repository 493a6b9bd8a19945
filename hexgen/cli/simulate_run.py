"""What ``hexgen simulate`` does: reads what was named, runs the plan on a virtual clock, gives the figures."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import typer

from hexgen.cli._common import given_text, say
from hexgen.cli._load import rate_of
from hexgen.cli.read_plan import read_plan
from hexgen.cli.simulate_tables import Simulated, as_object, show, why_no_times
from hexgen.cluster import Cluster
from hexgen.errors import SpecError
from hexgen.model import ModelSpec
from hexgen.plan import Plan
from hexgen.scheduler.evaluate import evaluate
from hexgen.scheduler.simulation import (
    Requests,
    SimulationResult,
    largest_rate,
    replay,
    requests_of,
    served,
    simulate,
)
from hexgen.scheduler.simulation.requests import Ints
from hexgen.scheduler.tables import CostTable
from hexgen.scheduler.task import default_workload
from hexgen.workload import Lengths, Slo, Workload, load_workload

_REQUESTS = 2000  # where a rate is given and no number
_MOST_REQUESTS = 10_000_000  # drawn: some hundred bytes each


@dataclass(frozen=True, slots=True)
class SimulateRequest:
    """The options of the command, as they were given."""

    plan: Path
    workload: str | None
    rate: str | None
    requests: int | None
    burstiness: float
    concurrency: int | None
    trace: Path | None
    seed: int
    warmup_s: float
    until_s: float | None
    cost: Path | None
    slo_attainment: float | None
    as_json: bool


@dataclass(frozen=True, slots=True)
class _Input:
    """What the options name, read and checked."""

    plan: Plan
    cluster: Cluster
    model: ModelSpec
    workload: Workload
    table: CostTable | None


def run(asked: SimulateRequest) -> None:
    """Raises ``HexgenError`` where something is wrong."""
    _check(asked)
    given = _read(asked)
    if asked.slo_attainment is not None and given.workload.slo == Slo():
        raise SpecError(
            "the workload names no limits to keep",
            where="--slo-attainment",
            remedy="add them, like --workload prompt=763,output=232,ttft=2s,tpot=100ms",
        )
    result = _simulated(asked, given)
    found = Simulated(
        given.plan,
        given.workload,
        None if asked.trace is None else str(asked.trace),
        asked.seed,
        result,
        evaluate(given.plan, given.cluster, given.model, given.workload, cost_table=given.table),
        None if asked.slo_attainment is None else _largest_rate(asked, given, asked.slo_attainment),
    )
    nothing = why_no_times(found)
    if nothing is not None:
        say(f"note: {nothing}")
    if asked.as_json:
        typer.echo(json.dumps(as_object(found), allow_nan=False))
    else:
        show(found)


def _read(asked: SimulateRequest) -> _Input:
    read = read_plan(asked.plan, asked.cost)
    plan, cluster, model = read.plan, read.cluster, read.model
    limit = min(plan.engine.max_context or model.max_context, model.max_context)
    workload = load_workload(asked.workload) if asked.workload else cluster.workload or default_workload(limit)
    if asked.trace is not None:
        workload = _like(replay(asked.trace, limit=asked.requests), workload.slo)
    if asked.rate is not None:
        workload = replace(workload, rate=rate_of(asked.rate))
    mean = workload.prompt_tokens.mean + workload.output_tokens.mean
    if mean > limit:
        raise SpecError(
            f"a mean request has {mean:g} tokens, and {model.name} takes at most {limit} here",
            where=str(asked.trace or asked.workload or "workload"),
            remedy="shorten prompts or outputs, or raise the plan's max_context",
        )
    return _Input(plan, cluster, model, workload, read.table)


def _like(requests: Requests, slo: Slo) -> Workload:
    """A trace in figures: what is served, and so what is to be predicted."""

    def lengths(tokens: Ints) -> Lengths:
        return Lengths(float(tokens.mean()), float(np.percentile(tokens, 99)), int(tokens.max()))

    rate: float | Literal["max"] = "max"
    if math.isfinite(requests.rate) and requests.rate > 0:
        rate = requests.rate
    return Workload(lengths(requests.prompt_tokens), lengths(requests.output_tokens), rate, slo)


def _simulated(asked: SimulateRequest, given: _Input) -> SimulationResult:
    """As many requests as are served, where nothing else is said; else those that are asked for."""
    plan, cluster, model, workload = given.plan, given.cluster, given.model, given.workload
    counted = asked.requests or asked.concurrency or asked.trace or asked.until_s or asked.warmup_s
    if workload.rate == "max" and not counted:
        return served(plan, cluster, model, workload, seed=asked.seed, cost_table=given.table)
    return simulate(
        plan,
        cluster,
        model,
        _requests(asked, given),
        cost_table=given.table,
        slo=workload.slo,
        warmup_s=asked.warmup_s,
        until_s=asked.until_s,
        concurrency=asked.concurrency,
    )


def _requests(asked: SimulateRequest, given: _Input, rate: float | None = None) -> Requests:
    """``rate``: instead of the workload's or the trace's own."""
    if asked.trace is not None:
        own = None if asked.rate is None or given.workload.rate == "max" else given.workload.rate
        found = replay(asked.trace, limit=asked.requests, rate=rate or own)
        return found.at_once() if asked.rate is not None and own is rate is None else found
    count = asked.requests or _REQUESTS
    return requests_of(given.workload, count, asked.seed, rate=rate, burstiness=asked.burstiness)


def _largest_rate(asked: SimulateRequest, given: _Input, share: float) -> float:
    return largest_rate(
        given.plan,
        given.cluster,
        given.model,
        _requests(asked, given, 1.0),
        given.workload.slo,
        attainment=share,
        cost_table=given.table,
    )


def _check(asked: SimulateRequest) -> None:
    """What can be told without reading a file."""
    given_text("--workload", asked.workload)
    for name, count in (("--requests", asked.requests), ("--concurrency", asked.concurrency)):
        if count is not None and not 1 <= count <= _MOST_REQUESTS:
            raise SpecError(f"must lie between 1 and {_MOST_REQUESTS:,}, not {count}", where=name)
    if asked.concurrency is not None and asked.rate is not None:
        raise SpecError("a closed loop has no rate of its own", remedy="give --rate or --concurrency, not both")
    if asked.slo_attainment is not None and not 0 < asked.slo_attainment < 1:
        raise SpecError(f"must lie between 0 and 1, not {asked.slo_attainment:g}", where="--slo-attainment")
    if not (math.isfinite(asked.burstiness) and asked.burstiness > 0):
        raise SpecError(f"must be a positive number, not {asked.burstiness:g}", where="--burstiness")
    if not (math.isfinite(asked.warmup_s) and asked.warmup_s >= 0):
        raise SpecError(f"must be 0 or more seconds, not {asked.warmup_s:g}", where="--warmup")
    if asked.until_s is not None and not asked.until_s > asked.warmup_s:
        raise SpecError(
            f"{asked.until_s:g} s leave nothing after a warm-up of {asked.warmup_s:g} s",
            where="--until",
            remedy="let the clock stop after --warmup",
        )
    if asked.trace is not None and not asked.trace.is_file():
        raise SpecError("there is no such file", where=str(asked.trace), remedy="name a .csv of requests")
