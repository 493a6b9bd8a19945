"""``hexgen plan``: the options of the command. What it then does is in `hexgen.cli.plan_run`."""

from __future__ import annotations

import math
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from hexgen.cli._common import CostOption, JsonOption, WorkloadOption

_WHAT_IF_S = 5.0


class ObjectiveChoice(StrEnum):
    throughput = "throughput"
    latency = "latency"
    slo = "slo"
    cost = "cost"
    maxflow = "maxflow"


class EngineChoice(StrEnum):
    auto = "auto"
    exact = "exact"
    genetic = "genetic"
    heuristic = "heuristic"


OBJECTIVES = (
    "throughput: most tokens/s; latency: the quickest answer to one request; slo: most tokens/s within the "
    "workload's limits; cost: the cheapest nodes that carry the rate; maxflow: most flow of tokens, as in Helix."
)

MODEL = (
    "A built-in name like llama-2-70b, a Hugging Face directory, or the id of a cached model (default: the "
    "cluster file's, else demo)."
)
TIME_LIMIT = (
    "Seconds until the plan is there; how good it is then depends on the machine (default: as long as a fixed "
    "amount of search takes)."
)


def _left_s(limit_s: float | None, started_s: float) -> float | None:
    """Of the limit, which counts the whole command."""
    if limit_s is None or not math.isfinite(limit_s) or limit_s <= 0:
        return limit_s  # said to be wrong where limits are checked
    return max(0.0, limit_s - (time.monotonic() - started_s))


def plan_command(
    context: typer.Context,
    cluster: Annotated[Path, typer.Argument(help="The cluster file.", metavar="CLUSTER")],
    model: Annotated[
        str | None,
        typer.Option("--model", help=MODEL),
    ] = None,
    workload: WorkloadOption = None,
    objective: Annotated[
        ObjectiveChoice, typer.Option("--objective", help=OBJECTIVES)
    ] = ObjectiveChoice.throughput,
    time_limit: Annotated[float | None, typer.Option("--time-limit", help=TIME_LIMIT)] = None,
    engine: Annotated[
        EngineChoice, typer.Option("--engine", help="How to search; auto takes what suits the cluster.")
    ] = EngineChoice.auto,
    cost: CostOption = None,
    seed: Annotated[
        int,
        typer.Option(
            "--seed", min=0, help="Of the search. Without --time-limit the same seed gives the same plan."
        ),
    ] = 0,
    old: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="Start from this plan, which runs now: few weights move, in about a second.",
            metavar="OLD_PLAN",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", help="Write the plan to this file (default: only show it).", metavar="PLAN"
        ),
    ] = None,
    as_json: JsonOption = False,
    explain: Annotated[
        bool,
        typer.Option("--explain", help="What each device does, what bounds the plan, what would change it."),
    ] = False,
    what_if: Annotated[
        float,
        typer.Option("--what-if", min=0.0, help="Seconds that --explain may take to price changes; 0: none."),
    ] = _WHAT_IF_S,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="Beside it, what simpler and published ways of placing would serve: takes some seconds more, "
            "which --time-limit does not count.",
        ),
    ] = False,
    front: Annotated[
        bool,
        typer.Option("--front", help="Beside it, plans that serve less and answer sooner, or more and later."),
    ] = False,
    html: Annotated[
        Path | None,
        typer.Option("--html", help="Write the plan, and what was asked for beside it, as one page to this file."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", help="Draw which device holds which layers to this file, .png or .svg."),
    ] = None,
) -> None:
    """Plan who holds which layers of a model on a cluster of unequal devices."""
    # Late: `hexgen --help` should not pay for the planner.
    from hexgen.cli.plan_run import PlanRequest, run

    run(
        PlanRequest(
            cluster=cluster,
            model=model,
            workload=workload,
            objective=objective.value,
            time_limit_s=_left_s(time_limit, context.obj),
            engine=engine.value,
            cost=cost,
            seed=seed,
            old=old,
            output=output,
            as_json=as_json,
            explain=explain,
            what_if_s=what_if,
            compare=compare,
            front=front,
            html=html,
            plot=plot,
        )
    )
