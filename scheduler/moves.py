"""From one plan to another: which weights stay on each device, which must be loaded, and how to load least.

Bytes are exact: a device keeps what its old and its new part have in common, layer by layer, head by head, column
by column (`hexgen.split` says who holds what, `hexgen.memory` what it weighs). Devices that a plan could exchange
without serving any differently are dealt so that least must be loaded.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from hexgen.cluster import Cluster, Node
from hexgen.memory import plan_dtype, rank_weights_bytes
from hexgen.model import DTYPE_BYTES, DType, ModelSpec
from hexgen.plan import Layers, Plan, Stage, resolve_cluster
from hexgen.scheduler.assignment import assign
from hexgen.split import Range, RankSlice, split_stage


@dataclass(frozen=True, slots=True)
class Holding:
    """The weights on one device."""

    dtype: DType
    layers: Layers
    part: RankSlice
    tables: frozenset[str]  # "embedding", "head": rows of each that `part.vocab` says
    final_norm: bool


@dataclass(frozen=True, slots=True)
class DeviceMove:
    """What becomes of one device. ``layers``: None where a plan does not use it."""

    device: str
    stage: str | None  # of the new plan
    old_layers: Layers | None
    layers: Layers | None
    keeps_bytes: int
    loads_bytes: int
    frees_bytes: int


def holdings(plan: Plan, cluster: Cluster, model: ModelSpec) -> dict[str, Holding]:
    """Device id -> what it holds, for every device that the plan uses."""
    dtype = plan_dtype(plan.engine, model, [cluster.device(d).type for s in plan.stages for d in s.devices])
    firsts = {route.path[0].stage for route in plan.routes}
    lasts = {route.path[-1].stage for route in plan.routes}
    held: dict[str, Holding] = {}
    for stage in plan.stages:
        held |= held_by(stage, model, dtype, stage.name in firsts, stage.name in lasts)
    return held


def held_by(stage: Stage, model: ModelSpec, dtype: DType, embeds: bool, samples: bool) -> dict[str, Holding]:
    """The same for one stage, which is or is not the first or the last of a route."""
    tables = _tables(model, embeds, samples)
    parts = split_stage(model, stage.width, stage.shares)
    return {
        device: Holding(dtype, stage.layers, part, tables, samples)
        for device, part in zip(stage.devices, parts, strict=True)
    }


def _tables(model: ModelSpec, embeds: bool, samples: bool) -> frozenset[str]:
    head = "embedding" if model.tie_embeddings else "head"
    return frozenset(["embedding"] * embeds + [head] * samples)


def common_bytes(model: ModelSpec, a: Holding | None, b: Holding | None) -> int:
    """Bytes of the weights that are in both; of ``a`` with itself, all that it holds."""
    if a is None or b is None or a.dtype != b.dtype:
        return 0
    part = RankSlice(
        _common(a.part.query_heads, b.part.query_heads),
        _common(a.part.kv_heads, b.part.kv_heads),
        _common(a.part.columns, b.part.columns),
        _common(a.part.vocab, b.part.vocab),
    )
    first, end = _common(a.layers, b.layers)
    size = rank_weights_bytes(model, a.dtype, end - first, part, False, False)
    rows = part.n_vocab * len(a.tables & b.tables) * model.hidden_size
    norm = model.hidden_size if a.final_norm and b.final_norm else 0
    return size + (rows + norm) * DTYPE_BYTES[a.dtype]


def _common(a: Range, b: Range) -> Range:
    start = max(a[0], b[0])
    return start, max(start, min(a[1], b[1]))


def surviving(old: Plan, cluster: Cluster, model: ModelSpec) -> dict[str, Holding]:
    """What the old plan's devices hold that are still there; another type of device is another device."""
    before = resolve_cluster(old)
    there = {device.id: device.type for device in cluster.devices()}
    held = holdings(old, before, model)
    return {device: what for device, what in held.items() if there.get(device) == before.device(device).type}


def device_moves(
    held: dict[str, Holding], new: Plan, cluster: Cluster, model: ModelSpec
) -> tuple[DeviceMove, ...]:
    """One entry for each device of the cluster that holds something now (``held``) or in the new plan."""
    wanted = holdings(new, cluster, model)
    stages = {device: stage for stage in new.stages for device in stage.devices}
    moves: list[DeviceMove] = []
    for device in (d.id for d in cluster.devices()):
        before, after = held.get(device), wanted.get(device)
        if before is None and after is None:
            continue
        keeps = common_bytes(model, before, after)
        stage = stages.get(device)
        moves.append(
            DeviceMove(
                device=device,
                stage=None if stage is None else stage.name,
                old_layers=None if before is None else before.layers,
                layers=None if stage is None else stage.layers,
                keeps_bytes=keeps,
                loads_bytes=common_bytes(model, after, after) - keeps,
                frees_bytes=common_bytes(model, before, before) - keeps,
            )
        )
    return tuple(moves)


# ---- equal devices --------------------------------------------------------------------------------------------


def dealt_to_keep_most(held: dict[str, Holding], new: Plan, cluster: Cluster, model: ModelSpec) -> Plan:
    """The new plan with equal devices exchanged so that least must be loaded: the same plan in all that counts.

    Devices of one node are equal, and so are nodes that differ in nothing but their names. Whole nodes are
    assigned, and within each pair of nodes the devices: both exactly.
    """
    wanted = holdings(new, cluster, model)
    renamed: dict[str, str] = {}
    for nodes in _equal_nodes(cluster):
        renamed |= _deal(nodes, held, wanted, model)
    stages = tuple(_renamed(stage, renamed) for stage in new.stages)
    return dataclasses.replace(new, stages=stages)


def _renamed(stage: Stage, renamed: dict[str, str]) -> Stage:
    return dataclasses.replace(stage, devices=tuple(renamed[device] for device in stage.devices))


def _equal_nodes(cluster: Cluster) -> list[list[Node]]:
    """Nodes that the planner cannot tell apart. One with links of its own is like no other."""
    linked = {name for entry in cluster.node_links for name in entry.nodes}
    classes: dict[object, list[Node]] = {}
    for node in cluster.nodes:
        own = node.name if node.name in linked else None
        key = (node.device, node.count, node.link, node.region, node.price_usd_h, own)
        classes.setdefault(key, []).append(node)
    return list(classes.values())


def _deal(
    nodes: list[Node], held: dict[str, Holding], wanted: dict[str, Holding], model: ModelSpec
) -> dict[str, str]:
    """Device in the new plan -> device that takes its place, within one class of equal nodes."""
    here = [tuple(held.get(f"{node.name}/{i}") for i in range(node.count)) for node in nodes]
    roles = [tuple(wanted.get(f"{node.name}/{i}") for i in range(node.count)) for node in nodes]
    solved: dict[object, tuple[int, list[int]]] = {}

    def within(role: int, node: int) -> tuple[int, list[int]]:
        if len(here[node]) == 1:
            return -common_bytes(model, here[node][0], roles[role][0]), [0]
        key = roles[role], here[node]
        if key not in solved:
            costs = [[-common_bytes(model, has, want) for has in here[node]] for want in roles[role]]
            chosen = assign(_staying(costs))
            solved[key] = sum(costs[i][j] for i, j in enumerate(chosen)), chosen
        return solved[key]

    if len(nodes) == 1:
        return {f"{nodes[0].name}/{i}": f"{nodes[0].name}/{j}" for i, j in enumerate(within(0, 0)[1])}
    costs = [[within(role, node)[0] for node in range(len(nodes))] for role in range(len(nodes))]
    renamed: dict[str, str] = {}
    for role, node in enumerate(assign(_staying(costs))):
        for i, j in enumerate(within(role, node)[1]):
            renamed[f"{nodes[role].name}/{i}"] = f"{nodes[node].name}/{j}"
    return renamed


def _staying(costs: list[list[int]]) -> list[list[int]]:
    """Among equal costs, whoever is there already stays."""
    scale = len(costs) + 1
    return [[cost * scale - (i == j) for j, cost in enumerate(row)] for i, row in enumerate(costs)]
