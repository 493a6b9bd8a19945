"""From what a person gives (a plan or none, a model or none) to a running deployment, for every front door."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hexgen.cluster import Cluster
from hexgen.errors import CheckpointError, HexgenError, SpecError
from hexgen.memory import PlanMemory
from hexgen.model import BUNDLED_MODELS, ModelSpec, find_checkpoint, load_model
from hexgen.plan import Plan, load_plan, resolve_cluster
from hexgen.validate import check_plan

if TYPE_CHECKING:
    from hexgen.deploy.ray_deployment import OnProgress, RayDeployment

DEFAULT_MODEL = "demo"
_SHOWN = 8  # weights, in a remark


@dataclass(frozen=True, slots=True)
class Launchable:
    """A plan that fits its cluster and its model, and the checkpoint to run it on."""

    plan: Plan  # with the cluster inline
    cluster: Cluster
    model: ModelSpec
    model_path: Path  # the checkpoint, on this machine
    remarks: tuple[str, ...] = ()  # what is not as the plan's file has it, for people


def prepare(
    plan: Plan | str | Path | None = None, model: str | Path | None = None, *, ray_address: str | None = None
) -> Launchable:
    """Read and check everything that can be checked before a worker starts.

    Without a plan one is made for what the Ray cluster has, or else this machine. The model is ``model``, else the
    plan's, else the bundled one. Raises ``SpecError`` or ``InfeasibleError``.
    """
    if plan is None:
        return _planned(model or DEFAULT_MODEL, ray_address)
    where, base = "plan", None
    if not isinstance(plan, Plan):
        where, base = str(plan), Path(plan).parent
        plan = load_plan(plan)
    cluster = resolve_cluster(plan, base)
    # --model is a path where we are; the plan's own model may be beside the plan.
    path, shape = (
        _checkpoint(model, None, "--model") if model else _checkpoint(plan.model, base, f"{where}: model")
    )
    plan = replace(plan, model=str(model or plan.model), cluster=cluster)
    memory = check_plan(plan, cluster, shape, where)
    plan, remarks = _weighed(plan, cluster, shape)
    return Launchable(plan, cluster, shape, path, (*_on_memory(plan, memory), *remarks))


def _weighed(plan: Plan, cluster: Cluster, model: ModelSpec) -> tuple[Plan, tuple[str, ...]]:
    """A plan that a person wrote without weights gets those at which its routes serve most, by the cost model.

    Such a plan has no prediction, several routes, and every weight is 1, as where none is given.
    """
    if plan.predicted is not None or len(plan.routes) < 2 or any(route.weight != 1 for route in plan.routes):
        return plan, ()
    from hexgen.scheduler.task import make_task
    from hexgen.scheduler.weights import weighted

    try:
        task = make_task(cluster, model, None, "throughput", None, 0, "auto", plan.engine)
        found = weighted(plan, task)
    except HexgenError:
        return plan, ()  # no figures for such a plan: turn by turn, and measured speeds correct it
    weights = [route.weight for route in found.routes]
    if max(weights) <= min(weights) * (1 + 1e-3):
        return plan, ()
    shares = ", ".join(f"{weight / sum(weights):.2f}" for weight in weights[:_SHOWN])
    more = ", ..." if len(weights) > _SHOWN else ""
    return found, (f"the plan gives its routes no weights; by their predicted speeds they get {shares}{more}",)


def _on_memory(plan: Plan, memory: PlanMemory) -> tuple[str, ...]:
    """A published table's KV room is the planner's matter; what is served is what the devices have."""
    source = plan.predicted.source if plan.predicted is not None else None
    if source is None:
        return ()
    least, most = min(memory.kv_tokens), max(memory.kv_tokens)
    room = f"{least}" if least == most else f"{least} to {most}"
    return (
        f"planned with the figures of {source}; KV room is that of the devices' memory: {room} tokens a route",
    )


def _planned(model: str | Path, ray_address: str | None) -> Launchable:
    from hexgen.deploy.discover import discover
    from hexgen.scheduler import plan as make_plan

    path, shape = _checkpoint(model, None, "--model")
    cluster = discover(ray_address).cluster
    plan = replace(make_plan(cluster, shape), model=str(model), cluster=cluster)
    check_plan(plan, cluster, shape)
    return Launchable(plan, cluster, shape, path)


def _checkpoint(reference: str | Path, base: Path | None, where: str) -> tuple[Path, ModelSpec]:
    path = find_checkpoint(reference, base)
    if path is None:
        load_model(reference, where, base)  # says what is wrong with a name that means nothing
        raise SpecError(
            f"{reference} names a model's shape; there are no weights to run",
            where=where,
            remedy="give the checkpoint's folder with --model DIR",
        )
    shape = load_model(path)
    if not any(path.glob("*.safetensors")):
        raise CheckpointError(
            "there is no *.safetensors file in this folder",
            where=str(path),
            remedy="only safetensors are loaded; convert the checkpoint, or finish its download",
        )
    return path, shape


def node_reference(path: Path) -> str:
    """What the nodes are told: the same path, or the name of a model that comes with their own installation."""
    from hexgen.deploy.ray_actor import BUNDLED_PREFIX

    for name in BUNDLED_MODELS:
        if find_checkpoint(name) == path:
            return f"{BUNDLED_PREFIX}{name}"
    return str(path)


def deploy(
    ready: Launchable, *, ray_address: str | None = None, on_progress: OnProgress | None = None
) -> RayDeployment:
    """Start ``ready`` on the Ray cluster at ``ray_address`` (or ``RAY_ADDRESS``), else on a local instance."""
    from hexgen.deploy.ray_deployment import RayDeployment

    return RayDeployment(
        ready.plan,
        ready.cluster,
        ready.model,
        node_reference(ready.model_path),
        ray_address=ray_address,
        on_progress=on_progress,
    )
