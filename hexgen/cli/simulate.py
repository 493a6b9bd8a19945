"""``hexgen simulate``: the options of the command. What it then does is in `hexgen.cli.simulate_run`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hexgen.cli._common import CostOption, JsonOption, WorkloadOption
from hexgen.cli._load import BurstinessOption, ConcurrencyOption, TraceOption

REQUESTS = (
    "How many (default: 2,000; without a rate, as many as saturate the plan). Without a rate all are there from "
    "the start."
)


def simulate_command(
    plan: Annotated[Path, typer.Argument(help="The plan file.", metavar="PLAN")],
    workload: WorkloadOption = None,
    rate: Annotated[
        str | None, typer.Option("--rate", help="Requests per second, or max; instead of the workload's.")
    ] = None,
    requests: Annotated[
        int | None,
        typer.Option("--requests", help=REQUESTS),
    ] = None,
    burstiness: BurstinessOption = 1.0,
    concurrency: ConcurrencyOption = None,
    trace: TraceOption = None,
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="Of arrivals and lengths: the same seed draws the same requests.")
    ] = 0,
    warmup: Annotated[float, typer.Option("--warmup", help="Simulated seconds before figures are counted.")] = 0.0,
    until: Annotated[
        float | None,
        typer.Option("--until", help="Simulated seconds at which the clock stops (default: when all is served)."),
    ] = None,
    cost: CostOption = None,
    slo_attainment: Annotated[
        float | None,
        typer.Option(
            "--slo-attainment",
            help="Also find the largest rate at which this share of the requests (like 0.99) keeps the limits.",
        ),
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
