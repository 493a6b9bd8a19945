"""What ``hexgen plan`` gives: a table, one JSON object, a page, a picture, a plan file."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from hexgen.cli._common import tables_console
from hexgen.errors import SpecError

if TYPE_CHECKING:
    from hexgen.cluster import Cluster
    from hexgen.model import ModelSpec
    from hexgen.plan import Plan
    from hexgen.scheduler.compare import Baseline
    from hexgen.scheduler.explain import Explanation
    from hexgen.scheduler.front import FrontPoint
    from hexgen.scheduler.replan import Replanned


@dataclass(frozen=True, slots=True)
class Made:
    """A plan, and whatever was asked for beside it."""

    plan: Plan
    cluster: Cluster
    model: ModelSpec
    objective: str
    explanation: Explanation | None = None
    others: tuple[Baseline, ...] | None = None
    front: tuple[FrontPoint, ...] | None = None
    replanned: Replanned | None = None


def write_plan(made: Made, path: Path) -> None:
    from hexgen.plan import dump_plan

    try:
        dump_plan(made.plan, path)
    except OSError as error:
        raise SpecError(f"cannot be written: {error.strerror}", where=str(path)) from error


def print_json(made: Made, *, explain: bool) -> None:
    """The plan, and beside it what was asked for. Baselines leave the cluster out: it is the plan's."""
    from hexgen.plan import plan_to_dict
    from hexgen.scheduler.explain.as_json import explanation_to_dict

    value: dict[str, Any] = plan_to_dict(made.plan)
    if made.others is not None:
        value["compare"] = [_baseline(other) for other in made.others]
    if made.front is not None:
        from hexgen.cli.front_tables import front_to_list

        value["front"] = front_to_list(made.front)
    if explain and made.explanation is not None:
        value["explain"] = explanation_to_dict(made.explanation)
    if made.replanned is not None:
        found = made.replanned
        value["replan"] = {
            "chosen": found.chosen,
            "loads_bytes": found.loads_bytes,
            "keeps_bytes": found.keeps_bytes,
            "gone": list(found.gone),
            "considered": [dataclasses.asdict(entry) for entry in found.considered],
            "moves": [dataclasses.asdict(move) for move in found.moves],
        }
    typer.echo(json.dumps(value))


def _baseline(other: Baseline) -> dict[str, Any]:
    from hexgen.plan import plan_to_dict

    value = {field.name: getattr(other, field.name) for field in dataclasses.fields(other) if field.name != "plan"}
    if other.plan is not None:
        value["plan"] = {key: part for key, part in plan_to_dict(other.plan).items() if key != "cluster"}
    return value


def show(made: Made, *, explain: bool) -> None:
    """Tables on standard output."""
    from hexgen.cli.explain_tables import explain_tables
    from hexgen.cli.plan_tables import compare_table, plan_tables, replan_text

    console = tables_console()
    for table in plan_tables(made.plan, made.cluster, made.model):
        console.print(table)
    if made.replanned is not None:
        console.print(replan_text(made.replanned))
    if explain and made.explanation is not None:
        for table in explain_tables(made.explanation):
            console.print(table)
    if made.front is not None:
        from hexgen.cli.front_tables import front_table

        console.print(front_table(made.front))
    if made.others is not None:
        console.print(compare_table(made.plan, made.others))
