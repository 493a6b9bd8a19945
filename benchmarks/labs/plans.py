"""The plans that are measured: the chosen one and three simpler ones, on the cluster as it was discovered."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hexgen.cluster import load_cluster
from hexgen.errors import InfeasibleError
from hexgen.memory import plan_memory
from hexgen.model import load_model
from hexgen.plan import EngineOptions, Plan
from hexgen.plan_file import dump_plan
from hexgen.scheduler import plan
from hexgen.scheduler.baselines.contract import Baseline
from hexgen.scheduler.baselines.equal import equal_layers
from hexgen.scheduler.baselines.single import single_node
from hexgen.scheduler.baselines.symmetric import symmetric
from hexgen.scheduler.pipeline import concurrency_for
from hexgen.scheduler.simulation import requests_of, simulate
from hexgen.scheduler.tables import table_for
from hexgen.scheduler.task import Objective, make_task
from hexgen.scheduler.traffic import traffic_of
from hexgen.workload import Slo, Workload

# A step of a slow core should not take a second, and a run of seconds should be many lives of a request.
OPTIONS = EngineOptions(max_sequences=8, token_budget=128)
LIMITS = (1.5, 2.0, 3.0)  # times the quickest answer to one request alone
JUDGED = 1000  # requests
LARGER = EngineOptions(max_sequences=4, token_budget=128)  # for a model whose requests take seconds


@dataclass(frozen=True, slots=True)
class Candidate:
    """A plan to be measured. ``names``: who chose it; several where they agree."""

    names: tuple[str, ...]
    file: Path
    shape: str  # for people
    tokens_s: float  # predicted, saturated
    requests_s: float
    concurrency: int  # that fills every route, with a request waiting for each


@dataclass(frozen=True, slots=True)
class Chosen:
    """``refused``: baselines without a plan, and why."""

    candidates: tuple[Candidate, ...]
    refused: dict[str, str]


def plans(
    cluster_file: Path, model_ref: str, workload: Workload, folder: Path, options: EngineOptions = OPTIONS
) -> Chosen:
    """Written below ``folder``; who chooses what another chose shares its entry."""
    model = load_model(model_ref)
    cluster = dataclasses.replace(load_cluster(cluster_file), workload=workload)
    table = table_for(None, cluster, model)
    if table is None:
        raise SystemExit(f"{cluster_file} names no table of {model_ref}")
    made = plan(cluster, model, workload, cost=table, options=options)
    task = make_task(cluster, model, workload, "throughput", None, 0, "auto", options, table)
    found = (
        Baseline("ours", made),
        symmetric(task, "throughput"),
        equal_layers(task, "throughput", whole_nodes=False),
        single_node(task, "throughput"),
    )
    names = ("ours", "symmetric", "equal layers", "single node")
    candidates: dict[str, Candidate] = {}
    refused: dict[str, str] = {}
    for name, baseline in zip(names, found, strict=True):
        if baseline.plan is None or baseline.plan.predicted is None:
            refused[name] = baseline.reason
            continue
        shape = shape_of(baseline.plan)
        if shape in candidates:
            candidates[shape] = dataclasses.replace(candidates[shape], names=(*candidates[shape].names, name))
            continue
        file = folder / f"{name.replace(' ', '-')}.yaml"
        dump_plan(dataclasses.replace(baseline.plan, model=model_ref), file)
        held = plan_memory(baseline.plan, cluster, model).kv_tokens
        traffic = traffic_of(model, workload, options)
        full = sum(max(1, concurrency_for(tokens, traffic)) for tokens in held)
        predicted = baseline.plan.predicted
        candidates[shape] = Candidate(
            (name,), file, shape, predicted.tokens_s, predicted.requests_s, full + len(baseline.plan.routes)
        )
    return Chosen(tuple(candidates.values()), refused)


def for_deadlines(
    cluster_file: Path, model_ref: str, workload: Workload, rate: float, folder: Path
) -> dict[str, tuple[Path, str]]:
    """Our plan and the symmetric one that meet the lowest deadline at this rate, by simulation: files and shapes.

    A plan for throughput gives its slowest route its share of the requests, and a deadline that 99 % meet is that
    route's. So ours are also planned within limits of latency; of symmetric ones there is the quickest, too.
    """
    model = load_model(model_ref)
    cluster = dataclasses.replace(load_cluster(cluster_file), workload=workload)
    table = table_for(None, cluster, model)
    task = make_task(cluster, model, workload, "throughput", None, 0, "auto", OPTIONS, table)
    goals: tuple[Objective, ...] = ("throughput", "latency")
    ours = [plan(cluster, model, workload, goal, cost=table, options=OPTIONS) for goal in goals]
    quickest = ours[-1].predicted
    for times in LIMITS if quickest is not None else ():
        limited = dataclasses.replace(workload, rate=rate, slo=Slo(latency_s=times * quickest.latency_s))
        try:
            ours.append(plan(cluster, model, limited, "slo", cost=table, options=OPTIONS))
        except InfeasibleError:  # nothing keeps so short a limit
            continue
    even = [found.plan for goal in goals if (found := symmetric(task, goal)).plan is not None]
    arriving = requests_of(dataclasses.replace(workload, rate=rate), JUDGED)
    found: dict[str, tuple[Path, str]] = {}
    for name, made in (("ours", ours), ("symmetric", even)):
        met = [
            np.quantile(simulate(one, cluster, model, arriving, cost_table=table).latency_s, 0.99)
            for one in made
            if one is not None
        ]
        best = made[int(np.argmin(met))]
        file = folder / f"deadline-{name}.yaml"
        dump_plan(dataclasses.replace(best, model=model_ref), file)
        found[name] = file, shape_of(best)
    return found


def shape_of(plan: Plan) -> str:
    """Every route as node:layers, weights beside them."""
    stages = {stage.name: stage for stage in plan.stages}

    def hop(name: str, layers: tuple[int, int]) -> str:
        devices = stages[name].devices
        nodes = "+".join(sorted({device.rpartition("/")[0] for device in devices}))
        return f"{nodes}:{layers[1] - layers[0]}"

    routes = [" > ".join(hop(h.stage, h.layers) for h in route.path) for route in plan.routes]
    return "; ".join(sorted(routes))
