"""``hexgen plan``: what is there -> who holds which layers, as a table, a JSON object, a page or a plan file."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hexgen.errors import SpecError

if TYPE_CHECKING:
    from hexgen.cluster import Cluster
    from hexgen.model import ModelSpec
    from hexgen.plan import Plan
    from hexgen.scheduler.replan import Replanned
    from hexgen.scheduler.tables import CostTable
    from hexgen.workload import Workload

BUNDLED_MODEL = "demo"
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
        ObjectiveChoice, typer.Option("--objective", help=OBJECTIVES)
    ] = ObjectiveChoice.throughput,
    time_limit: Annotated[
        float | None, typer.Option("--time-limit", help="Seconds to search for; the plan then depends on them.")
    ] = None,
    engine: Annotated[
        EngineChoice, typer.Option("--engine", help="How to search; auto takes what suits the cluster.")
    ] = EngineChoice.auto,
    cost: Annotated[
        Path | None,
        typer.Option("--cost", help="A cost table, published or measured, in place of the catalogue's figures."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the search; the same seed gives the same plan.")] = 0,
    old: Annotated[
        Path | None,
        typer.Option("--from", help="Re-plan from this plan, moving few weights.", metavar="OLD_PLAN"),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write the plan to this file.", metavar="PLAN")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object on standard output and nothing else.")
    ] = False,
    explain: Annotated[
        bool,
        typer.Option("--explain", help="What each device does, what bounds the plan, what would change it."),
    ] = False,
    what_if: Annotated[
        float, typer.Option("--what-if", min=0.0, help="Seconds of --explain for pricing changes; 0: none.")
    ] = _WHAT_IF_S,
    compare: Annotated[
        bool, typer.Option("--compare", help="Beside it, what simpler and published placements would serve.")
    ] = False,
    html: Annotated[
        Path | None, typer.Option("--html", help="Write a page with everything that was asked for to this file.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw layers by device to this file, .png or .svg.")
    ] = None,
) -> None:
    """Plan who holds which layers of a model on a cluster of unequal devices."""
    # Late: `hexgen --help` should not pay for the planner.
    from dataclasses import replace

    from hexgen.cli.plan_output import Made, check_target, print_json, show, write_plan
    from hexgen.cli.plan_progress import search_shown
    from hexgen.cluster import load_cluster
    from hexgen.model import BUILTIN_CONFIGS, BUNDLED_MODELS, load_model
    from hexgen.scheduler.compare import baselines
    from hexgen.scheduler.explain import explain as explain_plan
    from hexgen.scheduler.picture import check_plot, write_page, write_plot
    from hexgen.scheduler.tables import load_table
    from hexgen.scheduler.task import make_task
    from hexgen.workload import load_workload

    for target in (output, html, plot):
        if target is not None:
            check_target(target)
    if plot is not None:
        check_plot(plot)
    spec = load_cluster(cluster)
    ref = model or spec.model or BUNDLED_MODEL
    shape = load_model(
        ref, where="--model" if model else f"{cluster}: model", base_dir=None if model else cluster.parent
    )
    asked = load_workload(workload) if workload else None
    table = load_table(cost) if cost is not None else None
    found, replanned = _planned(
        spec,
        shape,
        asked,
        objective,
        engine,
        time_limit=time_limit,
        seed=seed,
        table=table,
        old=old,
        quiet=as_json,
    )
    # A name stays a name; a directory is written in full, so that the plan can be served from anywhere.
    found = replace(found, model=ref if ref in BUILTIN_CONFIGS or ref in BUNDLED_MODELS else shape.name)
    made = Made(found, spec, shape, objective.value, replanned=replanned)
    task = make_task(spec, shape, asked, objective.value, None, seed, "auto", found.engine, table)
    if compare:
        with search_shown(not as_json, "comparing"):
            made = replace(made, others=baselines(task, objective.value))
    if explain or html is not None:
        seconds = what_if if explain and what_if > 0 else None
        with search_shown(not as_json, "explaining"):
            made = replace(made, explanation=explain_plan(found, task, objective.value, what_if_s=seconds))
    if output is not None:
        write_plan(made, output)
    if html is not None and made.explanation is not None:
        write_page(html, found, spec, made.explanation, made.others)
    if plot is not None:
        write_plot(plot, found, spec)
    if as_json:
        print_json(made, explain=explain)
    elif output is None or explain or compare:
        show(made, explain=explain)
    for target in (output, html, plot):
        if target is not None and not as_json:
            typer.echo(f"wrote {target}", err=True)


def _planned(
    cluster: Cluster,
    model: ModelSpec,
    workload: Workload | None,
    objective: ObjectiveChoice,
    engine: EngineChoice,
    *,
    time_limit: float | None,
    seed: int,
    table: CostTable | None,
    old: Path | None,
    quiet: bool,
) -> tuple[Plan, Replanned | None]:
    """A plan made afresh, or from an old one."""
    from dataclasses import replace

    from hexgen.cli.plan_progress import search_shown
    from hexgen.plan import load_plan, resolve_cluster
    from hexgen.scheduler.planner import plan
    from hexgen.scheduler.replan import DEFAULT_LIMIT_S, replan

    if old is None:
        with search_shown(not quiet):
            made = plan(
                cluster, model, workload, objective.value,
                time_limit_s=time_limit, seed=seed, engine=engine.value, cost=table,
            )  # fmt: skip
        return made, None
    if engine is not EngineChoice.auto:
        raise SpecError(
            f"the engine {engine.value} plans afresh, and --from asks to start from a plan",
            where="--engine",
            remedy="leave out one of them",
        )
    before = load_plan(old)
    before = replace(before, cluster=resolve_cluster(before, old.parent))
    limit = DEFAULT_LIMIT_S if time_limit is None else time_limit
    found = replan(before, cluster, model, workload, objective.value, time_limit_s=limit, seed=seed, cost=table)
    return found.plan, found
