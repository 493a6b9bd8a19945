"""Which Ray node each node of the plan is, and the placement group that holds the devices there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hexgen.cluster import Cluster, Node
from hexgen.errors import DeploymentError
from hexgen.plan import Plan

# `ray start --labels hexgen.node=NAME` says which node of cluster.yaml this Ray node is.
NODE_LABEL = "hexgen.node"
NODE_ID_LABEL = "ray.io/node-id"
PLACEMENT_TIMEOUT_S = 60.0
# Ray takes its resources in steps of 1/10000.
EPSILON = 1e-6


@dataclass(frozen=True, slots=True)
class RayNode:
    """A live node of the Ray cluster, and all that it offers (not what is free of it)."""

    id: str
    address: str
    hostname: str
    cpus: float
    gpus: float
    labels: dict[str, str] = field(default_factory=dict)

    def describe(self) -> str:
        label = f" {self.labels[NODE_LABEL]}" if NODE_LABEL in self.labels else ""
        return f"{self.address}{label} with {self.cpus:g} CPU and {self.gpus:g} GPU"


@dataclass(frozen=True, slots=True)
class Demand:
    """What the plan uses of one node: its devices in plan order, each with so many CPUs, and a GPU or none."""

    node: Node
    devices: tuple[str, ...]

    @property
    def needs_gpu(self) -> bool:
        return self.node.device.kind != "cpu"

    @property
    def cpus_each(self) -> int:
        return 1 if self.needs_gpu else self.node.threads or 1

    @property
    def cpus(self) -> int:
        return self.cpus_each * len(self.devices)

    @property
    def gpus(self) -> int:
        return len(self.devices) if self.needs_gpu else 0

    def describe(self) -> str:
        return f"{self.gpus} GPU and {self.cpus} CPU" if self.needs_gpu else f"{self.cpus} CPU"


def demands(plan: Plan, cluster: Cluster) -> tuple[Demand, ...]:
    """The nodes that the plan uses, in the cluster's order."""
    used = {device for stage in plan.stages for device in stage.devices}
    found = []
    for node in cluster.nodes:
        devices = tuple(f"{node.name}/{i}" for i in range(node.count) if f"{node.name}/{i}" in used)
        if devices:
            found.append(Demand(node, devices))
    return tuple(found)


def cpus_needed(plan: Plan, cluster: Cluster) -> int:
    return sum(demand.cpus for demand in demands(plan, cluster))


def live_nodes() -> tuple[RayNode, ...]:
    """The Ray cluster's live nodes, head first, then by address."""
    import ray

    found = []
    state: Any = ray
    for entry in state.nodes():
        if not entry["Alive"]:
            continue
        resources: dict[str, float] = entry["Resources"]
        node = RayNode(
            id=entry["NodeID"],
            address=entry["NodeManagerAddress"],
            hostname=entry["NodeManagerHostname"],
            cpus=resources.get("CPU", 0.0),
            gpus=resources.get("GPU", 0.0),
            labels=dict(entry.get("Labels") or {}),
        )
        found.append(("node:__internal_head__" not in resources, node.address, node.id, node))
    return tuple(entry[-1] for entry in sorted(found, key=lambda entry: entry[:3]))


def match_nodes(wanted: Sequence[Demand], offered: Sequence[RayNode]) -> dict[str, RayNode]:
    """A Ray node for each node of the plan.

    By ``address`` where the cluster file gives one, else by labels (the file's own, or ``hexgen.node`` = the
    node's name), else in order: a Ray node of its own for each node of the plan while there are enough with
    room, then together (a plan of three nodes runs on one machine too). Raises ``DeploymentError``.
    """
    rooms = {node.id: [node.cpus, node.gpus] for node in offered}
    taken: dict[str, RayNode] = {}

    def take(demand: Demand, candidates: Sequence[RayNode], pinned_by: str | None) -> None:
        used = {node.id for node in taken.values()}
        fresh_first = sorted(candidates, key=lambda node: node.id in used)
        for node in fresh_first:
            cpus, gpus = rooms[node.id]
            if cpus + EPSILON >= demand.cpus and gpus + EPSILON >= demand.gpus:
                rooms[node.id] = [cpus - demand.cpus, gpus - demand.gpus]
                taken[demand.node.name] = node
                return
        raise _no_room(demand, candidates, pinned_by)

    in_order = []
    for demand in wanted:
        candidates, pinned_by = _pinned(demand.node, offered)
        if pinned_by is None:
            in_order.append(demand)
        else:
            take(demand, candidates, pinned_by)
    # A Ray node that carries another node's name is that node's.
    names = {demand.node.name for demand in wanted}
    open_nodes = [node for node in offered if node.labels.get(NODE_LABEL) not in names]
    for demand in in_order:
        take(demand, open_nodes, None)
    return taken


def _pinned(node: Node, offered: Sequence[RayNode]) -> tuple[list[RayNode], str | None]:
    """The Ray nodes that the cluster file means by this node, and by what; None where it leaves it open."""
    named = [ray for ray in offered if ray.labels.get(NODE_LABEL) == node.name]
    if node.address is not None:
        there = [ray for ray in offered if node.address in (ray.address, ray.hostname)]
        if not there:
            raise DeploymentError(
                f"no Ray node has the address {node.address}",
                where=f"node {node.name}",
                remedy=f"start Ray there, or correct `address`; Ray has {_all(offered)}",
            )
        return [ray for ray in there if ray in named] or there, f"address {node.address}"
    if node.labels:
        labelled = [ray for ray in offered if set(node.labels) <= set(ray.labels.items())]
        text = ",".join(f"{key}={value}" for key, value in node.labels)
        if not labelled:
            raise DeploymentError(
                f"no Ray node has the labels {text}",
                where=f"node {node.name}",
                remedy=f'start Ray there with `--labels "{text}"`; Ray has {_all(offered)}',
            )
        return labelled, f"labels {text}"
    return (named, f"label {NODE_LABEL}={node.name}") if named else ([], None)


def _no_room(demand: Demand, candidates: Sequence[RayNode], pinned_by: str | None) -> DeploymentError:
    message = f"the plan needs {demand.describe()} here"
    if pinned_by is not None:
        message += f", and what its {pinned_by} names does not have that (beside the plan's other nodes)"
    else:
        message += ", and no Ray node has that left"
    return DeploymentError(
        message,
        where=f"node {demand.node.name}",
        remedy=f"Ray has {_all(candidates)}; add a node with `ray start --address=HEAD:PORT`, or plan anew",
    )


def _all(nodes: Sequence[RayNode]) -> str:
    return "; ".join(node.describe() for node in nodes) or "no nodes"


@dataclass(frozen=True, slots=True)
class Placement:
    """The placement group, and which of its bundles each device has."""

    group: Any
    bundles: dict[str, int]
    demands: dict[str, Demand]  # by device

    def remove(self) -> None:
        import ray

        utilities: Any = ray.util
        utilities.remove_placement_group(self.group)


def place(wanted: Sequence[Demand], nodes: dict[str, RayNode]) -> Placement:
    """Reserve a bundle for each device on its node; ``DeploymentError`` where others hold what is needed."""
    import ray

    utilities: Any = ray.util
    bundles: list[dict[str, float]] = []
    selectors: list[dict[str, str]] = []
    index: dict[str, int] = {}
    by_device: dict[str, Demand] = {}
    for demand in wanted:
        for device in demand.devices:
            index[device] = len(bundles)
            by_device[device] = demand
            bundles.append({"CPU": demand.cpus_each, **({"GPU": 1} if demand.needs_gpu else {})})
            selectors.append({NODE_ID_LABEL: nodes[demand.node.name].id})
    group = utilities.placement_group(bundles, strategy="PACK", bundle_label_selector=selectors)
    placement = Placement(group, index, by_device)
    try:
        if group.wait(PLACEMENT_TIMEOUT_S):
            return placement
    except BaseException:  # Ctrl-C while waiting: the group must not stay
        placement.remove()
        raise
    placement.remove()
    raise DeploymentError(
        f"the plan's devices did not become free within {PLACEMENT_TIMEOUT_S:.0f} s",
        where="Ray placement group",
        remedy="another job holds them: see `ray status`, end it, or leave those nodes out of the plan",
    )
