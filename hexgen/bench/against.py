"""Predicted beside measured: the plan in simulation under the very load that was sent, and the run itself."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from hexgen.bench.client import RankSeconds, ServerState
from hexgen.bench.record import Record
from hexgen.bench.run import Bench
from hexgen.cluster import Cluster
from hexgen.errors import SpecError
from hexgen.model import ModelSpec
from hexgen.plan import Plan, Prediction
from hexgen.scheduler.evaluate import evaluate
from hexgen.scheduler.simulation import Requests, SimulationResult, simulate
from hexgen.scheduler.tables.source import CostTable
from hexgen.workload import Lengths, Workload

_KINDS = ("compute", "wait", "transfer", "host")  # of `RankSeconds`


@dataclass(frozen=True, slots=True)
class Expected:
    """A plan and everything that its prediction needs."""

    plan: Plan
    cluster: Cluster
    model: ModelSpec
    cost_table: CostTable | None = None


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of the cluster or of its requests; times in seconds, NaN where it is not known."""

    name: str
    closed_form: float  # what the planner counts with: saturated where it is tokens or requests
    simulated: float
    measured: float

    @property
    def ratio(self) -> float:
        """Measured over simulated."""
        return self.measured / self.simulated if self.simulated > 0 else math.nan


@dataclass(frozen=True, slots=True)
class StageTimes:
    """Seconds of one stage over the whole run, by kind. ``steps`` of 0: the server does not tell."""

    stage: str
    # busy, wait, transfer. Busy is a step's whole time in the cost model: layers and software together.
    predicted: dict[str, float]
    # compute, host (together: busy), wait, transfer, of the stage's leader; empty where the server does not tell
    measured: dict[str, float]
    steps: int
    sends_far: bool = True  # to another node, over a link; else to a stage of its own node, or to none

    @property
    def busy_s(self) -> float:
        """Measured."""
        return self.measured["compute"] + self.measured["host"]


@dataclass(frozen=True, slots=True)
class Comparison:
    figures: tuple[Figure, ...]
    stages: tuple[StageTimes, ...]
    simulated: SimulationResult
    simulated_s: float  # how long the same load takes in simulation
    measured_s: float
    steps: int | None  # of all routes; None: the server does not tell
    totals: dict[str, float]  # what the server's counters moved by


def check_server(expected: Expected, state: ServerState) -> None:
    """``SpecError`` where the server says that it runs other stages than the plan's."""
    running = {rank.stage for rank in state.ranks}
    planned = {stage.name for stage in expected.plan.stages}
    if running and running != planned:
        raise SpecError(
            f"the server runs the stages {', '.join(sorted(running))}, the plan has {', '.join(sorted(planned))}",
            where="--against",
            remedy="give the plan that is served",
        )
    for stage in expected.plan.stages:
        held = state.layers.get(stage.name, stage.layers)
        if held != stage.layers:
            raise SpecError(
                f"the server's stage {stage.name} holds layers {held[0]} to {held[1]}, the plan's "
                f"{stage.layers[0]} to {stage.layers[1]}",
                where="--against",
                remedy="give the plan that is served",
            )


def compare(expected: Expected, bench: Bench, workload: Workload, concurrency: int | None) -> Comparison:
    """Simulate the requests that were answered, in the times and lengths that they really had.

    ``workload`` is the one that was drawn from; its lengths stand for the requests in the closed form.
    """
    done = sorted(bench.outcome.completed, key=lambda r: r.sent_s)
    simulated = simulate(
        expected.plan,
        expected.cluster,
        expected.model,
        _requests(done, concurrency),
        cost_table=expected.cost_table,
        concurrency=concurrency,
    )
    sent = _as_sent(workload, done)
    if concurrency is not None:
        sent = replace(sent, rate="max")
    closed_form = evaluate(expected.plan, expected.cluster, expected.model, sent, cost_table=expected.cost_table)
    span_s = simulated.ended_s - simulated.started_s
    moved = {
        name: value - bench.before.totals.get(name, 0.0)
        for name, value in bench.after.totals.items()
    }  # fmt: skip
    return Comparison(
        figures=_figures(closed_form, simulated, bench),
        stages=_stages(expected.plan, simulated, span_s, bench),
        simulated=simulated,
        simulated_s=span_s,
        measured_s=bench.outcome.duration_s,
        steps=round(moved["steps_total"]) if "steps_total" in moved else None,
        totals=moved,
    )


def _requests(done: list[Record], concurrency: int | None) -> Requests:
    sent = np.array([r.sent_s for r in done])
    arrivals = np.zeros(len(done)) if concurrency is not None else sent - sent[0]
    prompts = np.array([max(1, r.prompt_tokens) for r in done], dtype=np.int64)
    return Requests(arrivals, prompts, np.array([r.output_tokens for r in done], dtype=np.int64))


def _as_sent(workload: Workload, done: list[Record]) -> Workload:
    """The workload with the means that were really sent, where they are not those it was drawn from."""
    prompt = float(np.mean([max(1, r.prompt_tokens) for r in done]))
    output = float(np.mean([r.output_tokens for r in done]))
    return Workload(
        _lengths(workload.prompt_tokens, prompt), _lengths(workload.output_tokens, output), workload.rate
    )


def _lengths(drawn: Lengths, mean: float) -> Lengths:
    return drawn if abs(mean / drawn.mean - 1) < 0.1 else Lengths(mean=mean)


def _figures(closed_form: Prediction, simulated: SimulationResult, bench: Bench) -> tuple[Figure, ...]:
    measures = bench.measures
    means = {"ttft": closed_form.ttft_s, "tpot": closed_form.tpot_s, "e2el": closed_form.latency_s}
    found = [
        Figure("output tokens/s", closed_form.tokens_s, simulated.tokens_s, measures.tokens_s),
        Figure("requests/s", closed_form.requests_s, simulated.requests_s, measures.requests_s),
    ]
    for name in ("ttft", "tpot", "itl", "e2el"):
        found.append(Figure(f"mean {name}", means.get(name, math.nan), simulated.mean(name), measures.mean(name)))
        found += [
            Figure(f"p{p} {name}", math.nan, simulated.percentile(name, p), measures.percentile(name, p))
            for p in (50, 90, 99)
        ]
    return tuple(found)


def _stages(plan: Plan, simulated: SimulationResult, span_s: float, bench: Bench) -> tuple[StageTimes, ...]:
    # Links are numbered as the routes first meet them (`simulation.layout`); a stage sends over those it begins.
    pairs = dict.fromkeys(pair for route in plan.routes for pair in pairwise(hop.stage for hop in route.path))
    sends: dict[str, float] = {}
    for (sender, _), share in zip(pairs, simulated.link_busy, strict=True):
        sends[sender] = sends.get(sender, 0.0) + share * span_s
    nodes = {stage.name: stage.devices[0].rpartition("/")[0] for stage in plan.stages}  # of its leader
    homes = {(route.path[-1].stage, route.path[0].stage) for route in plan.routes}  # tokens go back to the first
    far = {a for a, b in (*pairs, *homes) if nodes[a] != nodes[b]}
    found = []
    for stage in plan.stages:
        busy_s = simulated.stage_busy[stage.name] * span_s
        send_s = sends.get(stage.name, 0.0)
        predicted = {"busy": busy_s, "wait": max(0.0, span_s - busy_s - send_s), "transfer": send_s}
        moved = _moved(stage.name, bench)
        measured: dict[str, float] = {}
        if moved is not None:
            measured = {"compute": moved.compute_s, "transfer": moved.transfer_s, "host": moved.host_s}
            # What a rank waits for just now is not in its count yet: the rest of the run is.
            measured["wait"] = max(0.0, bench.outcome.duration_s - sum(measured.values()))
        steps = moved.steps if moved is not None else 0
        found.append(StageTimes(stage.name, predicted, measured, steps, stage.name in far))
    return tuple(found)


def _moved(stage: str, bench: Bench) -> RankSeconds | None:
    """What the leader of ``stage`` did during the run."""
    before = next((r for r in bench.before.ranks if (r.stage, r.rank) == (stage, 0)), None)
    after = next((r for r in bench.after.ranks if (r.stage, r.rank) == (stage, 0)), None)
    if before is None or after is None:
        return None
    return RankSeconds(
        stage,
        0,
        after.steps - before.steps,
        *(getattr(after, f"{kind}_s") - getattr(before, f"{kind}_s") for kind in _KINDS),
    )
