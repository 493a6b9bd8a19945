"""``hexgen simulate``: the options of the command. What it then does is in `hexgen.cli.simulate_run`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hexgen.cli._common import CostOption, JsonOption, WorkloadOption
from hexgen.cli._load import BurstinessOption, ConcurrencyOption, TraceOption


def simulate_command(
    plan: Annotated[Path, typer.Argument(help="The plan file.", metavar="PLAN")],
    workload: WorkloadOption = None,
    rate: Annotated[
        str | None, typer.Option("--rate", help="Requests per second, or max; instead of the workload's.")
    ] = None,
    requests: Annotated[
        int | None, typer.Option("--requests", help="How many; without a rate, all are there from the start.")
    ] = None,
    burstiness: BurstinessOption = 1.0,
    concurrency: ConcurrencyOption = None,
    trace: TraceOption = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of arrivals and lengths.")] = 0,
    warmup: Annotated[float, typer.Option("--warmup", help="Seconds before figures are counted.")] = 0.0,
    until: Annotated[
        float | None, typer.Option("--until", help="Seconds at which the clock stops (default: all is served).")
    ] = None,
    cost: CostOption = None,
    slo_attainment: Annotated[
        float | None,
        typer.Option("--slo-attainment", help="Find the largest rate at which this share keeps the limits."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Simulate a plan under a workload: the engine's own batching, the planner's step times."""
    # Late: `hexgen --help` should not pay for the planner.
    from hexgen.cli.simulate_run import SimulateRequest, run

    run(
        SimulateRequest(
            plan=plan,
            workload=workload,
            rate=rate,
            requests=requests,
            burstiness=burstiness,
            concurrency=concurrency,
            trace=trace,
            seed=seed,
            warmup_s=warmup,
            until_s=until,
            cost=cost,
            slo_attainment=slo_attainment,
            as_json=as_json,
        )
    )
