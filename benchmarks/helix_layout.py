"""Plans and placements as Helix's simulator wants them: one machine a stage, links, and the cluster file it reads.

Helix (ASPLOS'25) knows machines of seven kinds, each with its own measured tables; a node of several GPUs is one
machine (`L4x2`). A machine runs from the layer a request arrives with to its own last layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from hexgen.cluster import Cluster, Node
from hexgen.errors import SpecError
from hexgen.plan import Plan, Stage

# Both from the artifact's machine_profiles.ini; its "10 * gbps" of every network card counts bytes.
MEMORY_GB = {"A100": 40, "V100": 16, "L4": 24, "L4x2": 48, "T4": 16, "T4x2": 32, "T4x4": 64}
NIC_BYTES_S = 10e9
PLACEMENTS = Path(__file__).parent / "data" / "helix_placements.yaml"
SOURCE, SINK = "source", "sink"


@dataclass(frozen=True, slots=True)
class Machine:
    name: str
    kind: str  # a key of MEMORY_GB
    node: str
    first: int
    end: int


@dataclass(frozen=True, slots=True)
class Wire:
    start: str  # machine, or SOURCE
    to: str  # machine, or SINK
    bandwidth_bytes_s: float
    latency_s: float
    weight: float = 0.0  # share of the requests that a plan sends this way


@dataclass(frozen=True, slots=True)
class Layout:
    """What one run needs. ``kinds`` counts the whole cluster: their estimates depend on it."""

    name: str
    layers: int
    machines: tuple[Machine, ...]
    wires: tuple[Wire, ...]
    kinds: dict[str, int]
    weighted: bool  # whether ``Wire.weight`` says anything


def kind(node: Node, width: int) -> str:
    """Helix's name of ``width`` devices of a node."""
    name = node.base_device.partition("-")[0]
    found = name if width == 1 else f"{name}x{width}"
    if found not in MEMORY_GB:
        raise SpecError(
            f"Helix has no tables for {width} x {node.base_device} in one machine",
            where=f"node {node.name}",
            remedy=f"it knows {', '.join(MEMORY_GB)}",
        )
    return found


def from_plan(plan: Plan, cluster: Cluster, layers: int, name: str) -> Layout:
    """One machine a stage, one link a step of a route. Raises `SpecError` for what Helix cannot express."""
    machines = {stage.name: _machine(stage, cluster) for stage in plan.stages}
    shares: dict[tuple[str, str], float] = {}
    whole = sum(route.weight for route in plan.routes)
    for number, route in enumerate(plan.routes):
        for hop in route.path:
            end = machines[hop.stage].end
            if hop.layers[1] != end:
                raise SpecError(
                    f"stage {hop.stage} is left after layer {hop.layers[1]}, and holds up to {end}",
                    where=f"routes[{number}]",
                    remedy="Helix's machines run to their last layer",
                )
        stops = [SOURCE, *(hop.stage for hop in route.path), SINK]
        for step in pairwise(stops):
            shares[step] = shares.get(step, 0.0) + route.weight / whole
    used = {stop for step in shares for stop in step}
    kept = {stage: machine for stage, machine in machines.items() if stage in used}
    held = tuple(kept.values())
    wires = tuple(_wire(cluster, kept, a, b, share) for (a, b), share in shares.items())
    return Layout(name, layers, held, wires, _kinds(cluster, held), weighted=True)


def from_placement(cluster_name: str, model: str, method: str, cluster: Cluster, layers: int) -> Layout:
    """A published placement, on the links published with it, or on all that continue the model."""
    entry = next(
        (e for e in placements() if (e["cluster"], e["model"], e["method"]) == (cluster_name, model, method)), None
    )
    if entry is None:
        had = sorted(e["method"] for e in placements() if (e["cluster"], e["model"]) == (cluster_name, model))
        raise SpecError(
            f"has no placement {method!r} of {model} on {cluster_name}",
            where=str(PLACEMENTS),
            remedy=f"it has {', '.join(had) or 'none for these'}",
        )
    machines = {}
    for name, (first, end) in entry["layers"].items():
        node = cluster.node(name)
        machines[name] = Machine(name, kind(node, node.count), name, first, end)
    steps = [(a, b) for a, b in entry.get("links", ())] or _continuing(list(machines.values()), layers)
    used = {stop for step in steps for stop in step}
    held = tuple(machine for machine in machines.values() if machine.name in used)
    wires = tuple(_wire(cluster, machines, a, b, 0.0) for a, b in steps)
    return Layout(method, layers, held, wires, _kinds(cluster, held), weighted=False)


def _continuing(machines: list[Machine], layers: int) -> list[tuple[str, str]]:
    """Every step to a machine that holds the next layer, as Helix's partial inference allows."""
    steps = [(SOURCE, machine.name) for machine in machines if machine.first == 0]
    steps += [(machine.name, SINK) for machine in machines if machine.end == layers]
    return steps + [(a.name, b.name) for a in machines for b in machines if b.first <= a.end < b.end]


def placements() -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = yaml.safe_load(PLACEMENTS.read_text(encoding="utf-8"))["placements"]
    return entries


def cluster_ini(layout: Layout, kv_token_layers: Callable[[str, int], int]) -> str:
    """The file that `ClusterSimulator.from_ini_file` reads; ``kv_token_layers(kind, layers)`` is Helix's table."""
    names = {machine.name: f"compute_node_{i}" for i, machine in enumerate(layout.machines, start=2)}
    names |= {SOURCE: "source", SINK: "sink"}
    nic = f"{NIC_BYTES_S!r}"
    parts = [
        ("Coordinator", {"inbound_nic_speed": nic, "outbound_nic_speed": nic}),
        ("MachineTypes", {"types": repr(sorted({machine.kind for machine in layout.machines}))}),
        ("ComputeNodes", {"names": repr([names[machine.name] for machine in layout.machines])}),
    ]
    for machine in layout.machines:
        held = machine.end - machine.first
        values = {
            "vram_size": f"{MEMORY_GB[machine.kind]} * GB",
            "inbound_nic_speed": nic,
            "outbound_nic_speed": nic,
            "disk_speed": "1 * gbps",
            "machine_type": repr(machine.kind),
            "kv_cache_capacity": str(kv_token_layers(machine.kind, held)),
            "activation_backup_capacity": "0",
        }
        parts.append((names[machine.name], values))
    links = [f"link_{names[wire.start]}_{names[wire.to]}" for wire in layout.wires]
    parts.append(("Links", {"names": repr(links)}))
    for link, wire in zip(links, layout.wires, strict=True):
        values = {
            "in": names[wire.start],
            "out": names[wire.to],
            "latency": repr(wire.latency_s),
            "bandwidth": repr(wire.bandwidth_bytes_s),
        }
        parts.append((link, values))
    return "\n".join(_sections(parts)) + "\n"


def _sections(parts: list[tuple[str, dict[str, str]]]) -> Iterator[str]:
    for title, values in parts:
        yield f"[{title}]"
        yield from (f"{key}={value}" for key, value in values.items())
        yield ""


def _machine(stage: Stage, cluster: Cluster) -> Machine:
    nodes = sorted({device.partition("/")[0] for device in stage.devices})
    if len(nodes) > 1:
        raise SpecError(
            f"spans the nodes {', '.join(nodes)}",
            where=f"stage {stage.name}",
            remedy="Helix has tables for devices of one node only",
        )
    return Machine(stage.name, kind(cluster.node(nodes[0]), stage.width), nodes[0], *stage.layers)


def _wire(cluster: Cluster, machines: dict[str, Machine], start: str, to: str, weight: float) -> Wire:
    """The coordinator sits nowhere in our cluster files: its links are the cluster's default ones."""
    outside = start == SOURCE or to == SINK
    link = cluster.default_link if outside else cluster.link(machines[start].node, machines[to].node)
    return Wire(start, to, link.bandwidth_bytes_s, link.latency_s, weight)


def _kinds(cluster: Cluster, machines: Iterable[Machine]) -> dict[str, int]:
    count: dict[str, int] = {}
    for node in cluster.nodes:
        name = kind(node, node.count)
        count[name] = count.get(name, 0) + 1
    for machine in machines:
        count.setdefault(machine.kind, 1)
    return count
