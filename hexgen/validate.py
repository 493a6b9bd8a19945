"""Does a plan fit its cluster and its model? Everything that is wrong is one error with place and remedy."""

from __future__ import annotations

import difflib
from collections.abc import Collection

from hexgen.cluster_spec import Cluster
from hexgen.errors import InfeasibleError, SpecError
from hexgen.memory import PlanMemory, plan_memory
from hexgen.model_spec import ModelSpec
from hexgen.plan_file import VERSION
from hexgen.plan_spec import Plan, Route, Stage


def check_plan(plan: Plan, cluster: Cluster, model: ModelSpec, where: str = "plan") -> PlanMemory:
    """Check names, layers, widths and memory; ``where`` is the plan's file.

    Raises ``SpecError`` for a plan that is wrong and ``InfeasibleError`` for one that does not fit into memory
    or goes where no link leads.
    """
    if plan.version != VERSION:
        raise SpecError(
            f"version {plan.version} is not known here",
            where=f"{where}: version",
            remedy=f"this hexgen reads version {VERSION}",
        )
    if not plan.routes:
        raise SpecError("there are no routes", where=f"{where}: routes", remedy="add one: {path: [s0, ...]}")
    _check_names(plan, where)
    owners: dict[str, str] = {}
    for stage in plan.stages:
        _check_stage(stage, cluster, model, owners, f"{where}: stages.{stage.name}")
    for number, route in enumerate(plan.routes):
        _check_route(route, plan, model, f"{where}: routes[{number}]")
        _check_passage(route, plan, cluster, f"{where}: routes[{number}]")
    _check_use(plan, where)
    limit = plan.engine.max_context
    if limit is not None and limit > model.max_context:
        raise SpecError(
            f"{limit} tokens are more than {model.name} was made for ({model.max_context})",
            where=f"{where}: engine.max_context",
            remedy=f"at most {model.max_context}",
        )
    return plan_memory(plan, cluster, model)


def _check_names(plan: Plan, where: str) -> None:
    seen: set[str] = set()
    for stage in plan.stages:
        if stage.name in seen:
            raise SpecError(f"the stage {stage.name!r} stands twice", where=f"{where}: stages")
        seen.add(stage.name)


def _check_stage(stage: Stage, cluster: Cluster, model: ModelSpec, owners: dict[str, str], where: str) -> None:
    first, end = stage.layers
    if not 0 <= first < end <= model.layers:
        raise SpecError(
            f"[{first}, {end}] is not a range of the {model.layers} layers of {model.name}",
            where=f"{where}.layers",
            remedy=f"layers are half-open, from 0 to {model.layers}",
        )
    if not 1 <= stage.width <= model.heads:
        raise SpecError(
            f"{stage.width} devices for {model.heads} attention heads",
            where=f"{where}.devices",
            remedy=f"a stage of {model.name} takes 1 to {model.heads} devices",
        )
    shares = stage.shares
    if shares is not None and (len(shares) != stage.width or not all(0 < s < float("inf") for s in shares)):
        raise SpecError(
            f"{list(shares)} are not {stage.width} positive numbers",
            where=f"{where}.shares",
            remedy="give one positive number a device, or leave shares out",
        )
    for i, device in enumerate(stage.devices):
        at = f"{where}.devices[{i}]"
        _check_device(device, cluster, at)
        if device in owners:
            raise SpecError(
                f"the device {device} is used twice, by {owners[device]} and {stage.name}"
                if owners[device] != stage.name
                else f"the device {device} is used twice",
                where=at,
                remedy="a device serves one stage",
            )
        owners[device] = stage.name


def _check_device(device: str, cluster: Cluster, where: str) -> None:
    node_name, _, index = device.rpartition("/")
    try:
        cluster.device(device)
    except KeyError:
        nodes = {node.name: node for node in cluster.nodes}
        if node_name in nodes and index.isdecimal():
            count = nodes[node_name].count
            remedy = f"{node_name} has {count}: {node_name}/0" + (
                f" to {node_name}/{count - 1}" if count > 1 else ""
            )
        else:
            remedy = _did_you_mean(node_name, nodes)
        raise SpecError(
            f"there is no device {device!r} in the cluster {cluster.name!r}", where=where, remedy=remedy
        ) from None


def _did_you_mean(name: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(list(known)[:10])}"


def _check_route(route: Route, plan: Plan, model: ModelSpec, where: str) -> None:
    if not 0 < route.weight < float("inf"):
        raise SpecError(
            f"the weight {route.weight} is not a positive number",
            where=f"{where}.weight",
            remedy="leave out routes that nothing goes through",
        )
    stages = {stage.name: stage for stage in plan.stages}
    seen: set[str] = set()
    at_layer = 0
    for i, hop in enumerate(route.path):
        at = f"{where}.path[{i}]"
        stage = stages.get(hop.stage)
        if stage is None:
            raise SpecError(f"there is no stage {hop.stage!r}", where=at, remedy=_did_you_mean(hop.stage, stages))
        if hop.stage in seen:
            raise SpecError(f"the route passes {hop.stage} twice", where=at, remedy="a route passes a stage once")
        seen.add(hop.stage)
        first, end = hop.layers
        if not stage.layers[0] <= first < end <= stage.layers[1]:
            raise SpecError(
                f"uses layers [{first}, {end}] of {hop.stage}, which holds {list(stage.layers)}", where=at
            )
        if first != at_layer:
            _wrong_order(first, at_layer, at, hop.stage)
        at_layer = end
    if at_layer != model.layers:
        raise SpecError(
            f"layers {at_layer} to {model.layers - 1} are missing at its end",
            where=f"{where}.path",
            remedy=f"{model.name} has {model.layers} layers; a route covers each of them once",
        )


def _check_passage(route: Route, plan: Plan, cluster: Cluster, where: str) -> None:
    """Hidden states go from stage to stage, and tokens from the last back to the first."""
    nodes = [plan.stage(hop.stage).devices[0].rpartition("/")[0] for hop in route.path]
    for a, b in zip(nodes, (*nodes[1:], nodes[0]), strict=True):
        if a != b and not cluster.link(a, b).bandwidth_bytes_s > 0:
            raise InfeasibleError(
                f"no link leads from {a} to {b}: its bandwidth is zero",
                where=f"{where}.path",
                remedy="give it a bandwidth, or use stages on nodes that are connected",
            )


def _wrong_order(first: int, expected: int, where: str, stage: str) -> None:
    if first > expected:
        missing = f"layer {expected} is" if first == expected + 1 else f"layers {expected} to {first - 1} are"
        raise SpecError(
            f"{missing} missing before {stage}",
            where=where,
            remedy="a route covers every layer once, in order",
        )
    raise SpecError(
        f"layer {first} comes again in {stage}: layers below {expected} are already covered",
        where=where,
        remedy=f"use a part of the stage: {{stage: {stage}, layers: [{expected}, ...]}}",
    )


def _check_use(plan: Plan, where: str) -> None:
    used = {hop.stage for route in plan.routes for hop in route.path}
    for stage in plan.stages:
        if stage.name not in used:
            raise SpecError(
                f"no route passes the stage {stage.name!r}",
                where=f"{where}: stages.{stage.name}",
                remedy="remove it, or add it to a path",
            )
