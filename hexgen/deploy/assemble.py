"""From a plan to what each rank is told. Pure: no clock, no network, no files."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

from hexgen.cluster import Cluster
from hexgen.errors import DeploymentError, SpecError
from hexgen.memory import plan_memory
from hexgen.model import ModelSpec
from hexgen.plan import Plan, Route
from hexgen.split import split_stage
from hexgen.worker.config import EdgeSpec, RankConfig, RouteRole

SENDS, RECEIVES = 0, 1


def assemble(
    plan: Plan,
    cluster: Cluster,
    model: ModelSpec,
    model_path: str,
    *,
    deployment: str,
    store_host: str,
    store_port: int,
    addresses: Mapping[str, tuple[str, str]],
    secret: str,
) -> dict[str, RankConfig]:
    """One configuration a device, by device id.

    ``addresses`` gives every device's own (listen address, torch device). The plan must be valid
    (``hexgen.validate.check_plan``). Raises ``InfeasibleError`` where it does not fit into memory.
    """
    memory = plan_memory(plan, cluster, model)
    page_size = plan.engine.page_size
    pages = tuple(tokens // page_size for tokens in memory.kv_tokens)
    edges = _edges(plan)
    configs: dict[str, RankConfig] = {}
    for stage in plan.stages:
        roles = tuple(
            role
            for number, route in enumerate(plan.routes)
            if (role := _role(stage.name, number, route, pages[number])) is not None
        )
        slices = split_stage(model, stage.width, stage.shares)
        for rank, device in enumerate(stage.devices):
            if device not in addresses:
                raise DeploymentError("nobody said where this device is", where=f"device {device}")
            listen_host, torch_device = addresses[device]
            configs[device] = RankConfig(
                deployment=deployment,
                stage=stage.name,
                rank=rank,
                width=stage.width,
                device=torch_device,
                dtype=memory.dtype,
                threads=cluster.node(device.rsplit("/", 1)[0]).threads or 1,
                model=model,
                model_path=model_path,
                layers=stage.layers,
                slices=slices,
                routes=roles,
                edges=edges.get(stage.name, ()) if rank == 0 else (),
                page_size=page_size,
                token_budget=plan.engine.token_budget,
                max_sequences=plan.engine.max_sequences,
                max_context=plan.engine.max_context or model.max_context,
                prefix_cache=plan.engine.prefix_cache and prefixes_are_equal(model),
                store_host=store_host,
                store_port=store_port,
                listen_host=listen_host,
                secret=secret,
            )
    return configs


def prefixes_are_equal(model: ModelSpec) -> bool:
    """Whether equal tokens at equal positions always give equal keys, so that prompts may share cached pages.

    Not with dynamic NTK scaling: there the rotation depends on the length of the whole prompt.
    """
    return model.rope.kind != "dynamic"


def _role(stage: str, number: int, route: Route, pages: int) -> RouteRole | None:
    """What ``stage`` does for the route; None where the route does not pass it."""
    names = [hop.stage for hop in route.path]
    if stage not in names:
        return None
    at = names.index(stage)
    if names.count(stage) > 1:
        raise SpecError(f"passes stage {stage} twice", where=f"route {number}", remedy="make it one hop")
    return RouteRole(
        route=number,
        layers=route.path[at].layers,
        pages=pages,
        depth=len(names),
        embeds=at == 0,
        samples=at == len(names) - 1,
        next=names[at + 1] if at + 1 < len(names) else None,
        last=names[-1],
        first=names[0],
    )


def _edges(plan: Plan) -> dict[str, tuple[EdgeSpec, ...]]:
    """The edges of every stage. Routes that pass the same two stages in the same order share one."""
    pairs: set[tuple[str, str, str]] = set()
    for route in plan.routes:
        names = [hop.stage for hop in route.path]
        pairs.update((a, b, "hidden") for a, b in pairwise(names))
        if len(names) > 1:
            pairs.add((names[-1], names[0], "tokens"))
    edges: dict[str, list[EdgeSpec]] = {}
    for sender, receiver, kind in sorted(pairs):
        name = f"{sender}>{receiver}:{kind}"
        edges.setdefault(sender, []).append(EdgeSpec(name, receiver, SENDS, kind))
        edges.setdefault(receiver, []).append(EdgeSpec(name, sender, RECEIVES, kind))
    return {stage: tuple(specs) for stage, specs in edges.items()}
