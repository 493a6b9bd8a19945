"""A plan file as commands read it that predict or simulate the plan."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hexgen.cluster import Cluster
from hexgen.model import ModelSpec, load_model
from hexgen.plan import Plan, load_plan, resolve_cluster
from hexgen.scheduler.tables import CostTable, table_for
from hexgen.validate import check_plan


@dataclass(frozen=True, slots=True)
class PlanRead:
    """A plan with all that its prediction needs, checked against one another."""

    plan: Plan
    cluster: Cluster
    model: ModelSpec
    table: CostTable | None


def read_plan(path: Path, cost: Path | None) -> PlanRead:
    """The plan at ``path``; the cost table is that of ``--cost``, or the cluster's own. Raises ``SpecError``."""
    plan = load_plan(path)
    cluster = resolve_cluster(plan, path.parent)
    model = load_model(plan.model, where=f"{path}: model", base_dir=path.parent)
    check_plan(plan, cluster, model, where=str(path))
    table = table_for(cost, cluster, model)
    if table is not None:
        table.check(model, cluster.nodes)
    return PlanRead(plan, cluster, model, table)
