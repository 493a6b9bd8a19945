"""``hexgen simulate``: what a plan would serve, request by request, on a virtual clock."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from hexgen.errors import SpecError

_REQUESTS = 2000  # where a rate is given and no number


def simulate_command(
    plan: Annotated[Path, typer.Argument(help="The plan file.", metavar="PLAN")],
    workload: Annotated[
        str | None,
        typer.Option("--workload", help="A YAML file, a .csv trace, or text like prompt=763,output=232,rate=2.5."),
    ] = None,
    rate: Annotated[
        str | None, typer.Option("--rate", help="Requests per second, or max; instead of the workload's.")
    ] = None,
    requests: Annotated[
        int | None, typer.Option("--requests", help="How many; without a rate, all are there from the start.")
    ] = None,
    burstiness: Annotated[
        float, typer.Option("--burstiness", help="Shape of the gaps' gamma distribution; 1 is Poisson.")
    ] = 1.0,
    concurrency: Annotated[
        int | None, typer.Option("--concurrency", help="A closed loop: so many requests at a time.")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option("--trace", help="Replay this .csv: times, prompt tokens, output tokens.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of arrivals and lengths.")] = 0,
    warmup: Annotated[float, typer.Option("--warmup", help="Seconds before figures are counted.")] = 0.0,
    until: Annotated[
        float | None, typer.Option("--until", help="Seconds at which the clock stops (default: all is served).")
    ] = None,
    cost: Annotated[
        Path | None,
        typer.Option("--cost", help="A cost table, published or measured, in place of the catalogue's figures."),
    ] = None,
    slo_attainment: Annotated[
        float | None,
        typer.Option("--slo-attainment", help="Find the largest rate at which this share keeps the limits."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object on standard output and nothing else.")
    ] = False,
) -> None:
    """Simulate a plan under a workload: the engine's own batching, the planner's step times."""
    # Late: `hexgen --help` should not pay for the planner.
    from hexgen.cli.simulate_tables import Simulated, as_object, show
    from hexgen.model import load_model
    from hexgen.plan import load_plan, resolve_cluster
    from hexgen.scheduler.evaluate import evaluate
    from hexgen.scheduler.simulation import Requests, largest_rate, replay, requests_of, served, simulate
    from hexgen.scheduler.tables import load_table
    from hexgen.scheduler.task import default_workload
    from hexgen.validate import check_plan
    from hexgen.workload import load_workload

    _check(rate, requests, concurrency, trace, slo_attainment)
    made = load_plan(plan)
    cluster = resolve_cluster(made, plan.parent)
    model = load_model(made.model, where=f"{plan}: model", base_dir=plan.parent)
    check_plan(made, cluster, model, where=str(plan))
    limit = min(made.engine.max_context or model.max_context, model.max_context)
    asked = load_workload(workload) if workload else cluster.workload or default_workload(limit)
    if rate is not None:
        asked = replace(asked, rate=_rate(rate))
    table = load_table(cost) if cost is not None else None
    if table is not None:
        table.check(model, cluster.nodes)

    def pattern(rate_of: float | None = None) -> Requests:
        if trace is not None:
            given = None if rate is None or asked.rate == "max" else asked.rate
            return replay(trace, limit=requests, rate=rate_of or given)
        return requests_of(asked, requests or _REQUESTS, seed, rate=rate_of, burstiness=burstiness)

    window: dict[str, Any] = {"slo": asked.slo, "cost_table": table, "warmup_s": warmup, "until_s": until}
    saturated = asked.rate == "max" and not (requests or concurrency or trace or until)
    if saturated:
        result = served(made, cluster, model, asked, seed=seed, cost_table=table)
    else:
        result = simulate(made, cluster, model, pattern(), concurrency=concurrency, **window)
    best = None
    if slo_attainment is not None:
        best = largest_rate(
            made, cluster, model, pattern(1.0), asked.slo, attainment=slo_attainment, cost_table=table
        )
    predicted = evaluate(made, cluster, model, asked, cost_table=table)
    found = Simulated(made, asked, None if trace is None else str(trace), seed, result, predicted, best)
    if as_json:
        typer.echo(json.dumps(as_object(found), allow_nan=False))
    else:
        show(found)


def _check(
    rate: str | None,
    requests: int | None,
    concurrency: int | None,
    trace: Path | None,
    slo_attainment: float | None,
) -> None:
    """What can be told without reading a file."""
    if requests is not None and requests < 1:
        raise SpecError(f"must be at least 1, not {requests}", where="--requests")
    if concurrency is not None and concurrency < 1:
        raise SpecError(f"must be at least 1, not {concurrency}", where="--concurrency")
    if concurrency is not None and rate is not None:
        raise SpecError("a closed loop has no rate of its own", remedy="give --rate or --concurrency, not both")
    if slo_attainment is not None and not 0 < slo_attainment < 1:
        raise SpecError(f"must lie between 0 and 1, not {slo_attainment:g}", where="--slo-attainment")
    if trace is not None and not trace.is_file():
        raise SpecError("there is no such file", where=str(trace))


def _rate(text: str) -> float | Literal["max"]:
    if text == "max":
        return "max"
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise SpecError(
            f"must be a positive number of requests per second, or max, not {text[:40]!r}", where="--rate"
        )
    return value
