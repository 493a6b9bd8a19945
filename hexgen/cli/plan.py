"""``hexgen plan``: what is there -> who holds which layers, as a table, a JSON object or a plan file."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hexgen.errors import SpecError

if TYPE_CHECKING:
    from hexgen.cluster import Cluster
    from hexgen.model import ModelSpec
    from hexgen.plan import Plan
    from hexgen.scheduler.compare import Baseline

BUNDLED_MODEL = "demo"
_PIPED_WIDTH = 140


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


def plan_command(
    cluster: Annotated[Path, typer.Argument(help="The cluster file.", metavar="CLUSTER")],
    model: Annotated[
        str | None,
        typer.Option("--model", help="A built-in name, a Hugging Face directory, or the id of a cached model."),
    ] = None,
    workload: Annotated[
        str | None,
        typer.Option("--workload", help="A YAML file, a .csv trace, or text like prompt=763,output=232,rate=2.5."),
    ] = None,
    objective: Annotated[
        ObjectiveChoice, typer.Option("--objective", help="What the plan should be best at.")
    ] = ObjectiveChoice.throughput,
    time_limit: Annotated[
        float | None, typer.Option("--time-limit", help="Seconds to search for; the plan then depends on them.")
    ] = None,
    engine: Annotated[
        EngineChoice, typer.Option("--engine", help="How to search; exact is for up to six devices.")
    ] = EngineChoice.auto,
    seed: Annotated[int, typer.Option("--seed", help="Of the search; the same seed gives the same plan.")] = 0,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write the plan to this file.", metavar="PLAN")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object on standard output and nothing else.")
    ] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Per device: memory used and stranded; per stage: what it waits for.")
    ] = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="Beside it, what simpler placements would serve.")
    ] = False,
) -> None:
    """Plan who holds which layers of a model on a cluster of unequal devices."""
    # Late: `hexgen --help` should not pay for the planner.
    from dataclasses import replace

    from hexgen.cluster import load_cluster
    from hexgen.model import BUILTIN_CONFIGS, BUNDLED_MODELS, load_model
    from hexgen.plan import dump_plan
    from hexgen.scheduler.compare import baselines
    from hexgen.scheduler.planner import plan
    from hexgen.scheduler.task import make_task
    from hexgen.workload import load_workload

    spec = load_cluster(cluster)
    ref = model or spec.model or BUNDLED_MODEL
    shape = load_model(
        ref, where="--model" if model else f"{cluster}: model", base_dir=None if model else cluster.parent
    )
    asked = load_workload(workload) if workload else None
    made = plan(spec, shape, asked, objective.value, time_limit_s=time_limit, seed=seed, engine=engine.value)
    # A name stays a name; a directory is written in full, so that the plan can be served from anywhere.
    made = replace(made, model=ref if ref in BUILTIN_CONFIGS or ref in BUNDLED_MODELS else shape.name)
    others: tuple[Baseline, ...] = ()
    if compare:
        task = make_task(spec, shape, asked, objective.value, None, seed, engine.value, made.engine)
        others = baselines(task, objective.value)
    if output is not None:
        try:
            dump_plan(made, output)
        except OSError as error:
            raise SpecError(f"cannot be written: {error.strerror}", where=str(output)) from error
    if as_json:
        typer.echo(json.dumps(_as_json(made, others if compare else None)))
        return
    if output is None or explain or compare:
        _show(made, spec, shape, objective.value, explain=explain, others=others if compare else None)
    if output is not None:
        typer.echo(f"wrote {output}", err=True)


def _as_json(made: Plan, others: tuple[Baseline, ...] | None) -> dict[str, Any]:
    """The plan, and beside it what ``--compare`` asked for; baselines leave the cluster out, it is the plan's."""
    from hexgen.plan import plan_to_dict

    value: dict[str, Any] = plan_to_dict(made)
    if others is not None:
        value["compare"] = [
            {"name": o.name, "reason": o.reason}
            | ({"plan": {k: v for k, v in plan_to_dict(o.plan).items() if k != "cluster"}} if o.plan else {})
            for o in others
        ]
    return value


def _show(
    made: Plan,
    cluster: Cluster,
    model: ModelSpec,
    objective: str,
    *,
    explain: bool,
    others: tuple[Baseline, ...] | None,
) -> None:
    from rich.console import Console

    from hexgen.cli.plan_tables import compare_table, explain_tables, plan_tables

    # Piped, the width of a screen is unknown; tables folded to 80 columns are hard to read.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _PIPED_WIDTH)
    for table in plan_tables(made, cluster, model):
        console.print(table)
    if explain:
        for table in explain_tables(made, cluster):
            console.print(table)
    if others is not None:
        console.print(compare_table(made, others, objective))
