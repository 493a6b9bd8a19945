"""What ``hexgen plan`` does: reads what was named, plans, and gives whatever was asked for beside the plan."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from hexgen.cli._common import check_target, given_text, say
from hexgen.cli.plan_output import Made, print_json, show, write_plan
from hexgen.cli.plan_progress import search_shown
from hexgen.cluster import Cluster, load_cluster
from hexgen.errors import SpecError
from hexgen.model import BUILTIN_CONFIGS, BUNDLED_MODELS, ModelSpec, load_model
from hexgen.plan import Plan, load_plan, resolve_cluster
from hexgen.scheduler.compare import baselines
from hexgen.scheduler.explain import explain
from hexgen.scheduler.front import front
from hexgen.scheduler.picture import check_plot, write_page, write_plot
from hexgen.scheduler.planner import plan
from hexgen.scheduler.replan import DEFAULT_LIMIT_S, Replanned, replan
from hexgen.scheduler.tables import CostTable, table_for
from hexgen.scheduler.task import Engine, Objective, Task, make_task
from hexgen.workload import Workload, load_workload

BUNDLED_MODEL = "demo"


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """The options of the command, as they were given."""

    cluster: Path
    model: str | None
    workload: str | None
    objective: Objective
    time_limit_s: float | None
    engine: Engine
    cost: Path | None
    seed: int
    old: Path | None
    output: Path | None
    as_json: bool
    explain: bool
    what_if_s: float
    compare: bool
    html: Path | None
    plot: Path | None
    front: bool = False

    @property
    def targets(self) -> tuple[Path, ...]:
        """The files to be written."""
        return tuple(path for path in (self.output, self.html, self.plot) if path is not None)

    @property
    def shows(self) -> bool:
        """Whether tables are printed: scripts that only want the plan's file are not given any."""
        only_file = self.output is not None and len(self.targets) == 1
        return not self.as_json and (not only_file or self.explain or self.compare or self.front)


@dataclass(frozen=True, slots=True)
class _Input:
    """What the options name, read and checked."""

    cluster: Cluster
    model: ModelSpec
    model_ref: str  # what the plan says of the model
    workload: Workload | None
    table: CostTable | None


def run(asked: PlanRequest) -> None:
    """Raises ``HexgenError`` where something is wrong, before minutes are spent on a plan where possible."""
    _check(asked)
    given = _read(asked)
    try:
        found, replanned = _planned(asked, given)
    except KeyboardInterrupt:
        say("interrupted: nothing was planned or written; --time-limit ends a search with the best plan it has")
        raise
    found = dataclasses.replace(found, model=given.model_ref)
    made = Made(found, given.cluster, given.model, asked.objective, replanned=replanned)
    made = _with_comments(asked, given, made)
    _write(asked, made)
    if asked.as_json:
        print_json(made, explain=asked.explain)
    elif asked.shows:
        show(made, explain=asked.explain)
    for target in () if asked.as_json else asked.targets:
        say(f"wrote {target}")


def _check(asked: PlanRequest) -> None:
    """What can be told before anything is planned."""
    given_text("--model", asked.model)
    given_text("--workload", asked.workload)
    for target in asked.targets:
        check_target(target)
        if target.exists() and asked.cluster.exists() and target.samefile(asked.cluster):
            raise SpecError("is the cluster file, which would be lost", where=str(target), remedy="name another")
    if len({target.absolute() for target in asked.targets}) < len(asked.targets):
        raise SpecError(
            "one file cannot be the plan, its page and its picture at once", remedy="name a file for each"
        )
    if asked.plot is not None:
        check_plot(asked.plot)
    if asked.old is not None and asked.engine != "auto":
        raise SpecError(
            f"the engine {asked.engine} plans afresh, and --from asks to start from a plan",
            where="--engine",
            remedy="leave out one of them",
        )
    if asked.objective == "maxflow" and asked.engine != "auto":
        say(f"note: the objective maxflow has one search of its own: --engine {asked.engine} does not matter")


def _read(asked: PlanRequest) -> _Input:
    cluster = load_cluster(asked.cluster)
    ref = asked.model or cluster.model or BUNDLED_MODEL
    if asked.model:
        model = load_model(ref, where="--model")
    else:
        model = load_model(ref, where=f"{asked.cluster}: model", base_dir=asked.cluster.parent)
    return _Input(
        cluster,
        model,
        # A name stays a name; a directory is written in full, so that the plan can be served from anywhere.
        ref if ref in BUILTIN_CONFIGS or ref in BUNDLED_MODELS else model.name,
        load_workload(asked.workload) if asked.workload else None,
        table_for(asked.cost, cluster, model),
    )


def _planned(asked: PlanRequest, given: _Input) -> tuple[Plan, Replanned | None]:
    """A plan made afresh, or from an old one."""
    what = (given.cluster, given.model, given.workload, asked.objective)
    if asked.old is None:
        with search_shown(not asked.as_json) as report:
            made = plan(
                *what,
                time_limit_s=asked.time_limit_s,
                seed=asked.seed,
                engine=asked.engine,
                cost=given.table,
                progress=report,
            )
        return made, None
    before = load_plan(asked.old)
    _check_same_model(before, asked.old, given)
    before = dataclasses.replace(before, cluster=resolve_cluster(before, asked.old.parent))
    limit_s = DEFAULT_LIMIT_S if asked.time_limit_s is None else asked.time_limit_s
    found = replan(before, *what, time_limit_s=limit_s, seed=asked.seed, cost=given.table)
    return found.plan, found


def _check_same_model(before: Plan, path: Path, given: _Input) -> None:
    """Weights of another model are none to keep, even where layers are as many."""
    if before.model == given.model_ref:
        return
    held = load_model(before.model, where=f"{path}: model", base_dir=path.parent)
    if dataclasses.replace(held, name=given.model.name) != given.model:
        raise SpecError(
            f"is a plan of {before.model}, and what is to be planned is {given.model_ref}",
            where=str(path),
            remedy="give that model, or plan afresh without --from",
        )


def _with_comments(asked: PlanRequest, given: _Input, made: Made) -> Made:
    """Baselines and explanation, where they were asked for; a page needs one, if without what-ifs."""
    if not (asked.compare or asked.front or asked.explain or asked.html is not None):
        return made
    task = _task(asked, given, made.plan)
    if asked.compare:
        with search_shown(not asked.as_json, "comparing"):
            made = dataclasses.replace(made, others=baselines(task, asked.objective))
    if asked.front:
        with search_shown(not asked.as_json, "looking along the front"):
            made = dataclasses.replace(made, front=front(task, made.plan))
    if asked.explain or asked.html is not None:
        seconds = asked.what_if_s if asked.explain and asked.what_if_s > 0 else None
        with search_shown(not asked.as_json, "explaining"):
            told = explain(made.plan, task, asked.objective, what_if_s=seconds)
        made = dataclasses.replace(made, explanation=told)
    return made


def _task(asked: PlanRequest, given: _Input, made: Plan) -> Task:
    """What comparisons and explanations are about: the same question, without a limit of time."""
    cluster = resolve_cluster(made)  # without nodes that no link leads to, which has been said
    workload, engine = given.workload, made.engine
    return make_task(
        cluster, given.model, workload, asked.objective, None, asked.seed, "auto", engine, given.table
    )


def _write(asked: PlanRequest, made: Made) -> None:
    if asked.output is not None:
        write_plan(made, asked.output)
    if asked.html is not None and made.explanation is not None:
        write_page(asked.html, made.plan, made.cluster, made.explanation, made.others)
    if asked.plot is not None:
        write_plot(asked.plot, made.plan, made.cluster)
