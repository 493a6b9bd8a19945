"""From a survey to a cluster, and to a file in which every figure says how it was come by."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hexgen.catalogue import DEFAULT_NETWORK, lookup
from hexgen.cluster import Cluster, DeviceType, Link, cluster_to_dict, parse_cluster
from hexgen.discover.annotate import annotated
from hexgen.discover.kinds import Kind, cpu_kinds, gpu_kind, significant, unlike
from hexgen.discover.records import AllReduce, Wire
from hexgen.discover.survey import Found, Survey, by_machine
from hexgen.scheduler.figures import figures_of
from hexgen.units import exact_bandwidth, exact_time, format_bytes, format_time

# Left to the system and to the workers' interpreters on a node that computes on its CPU.
CPU_MEMORY_SHARE = 0.8
_MB = 1_000_000
LEAST_LATENCY_S = 1e-6
_SHOWN_PAIRS = 2000  # comments on more pairs than these would only be in the way


@dataclass(frozen=True, slots=True)
class Described:
    """``comments`` by what they belong to: ``("devices", type)``, ``("nodes", name)``, ``("links", pair)``."""

    cluster: Cluster
    comments: Mapping[tuple[str, object], Sequence[str]] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()


def described(name: str, survey: Survey, threads: int | None = None, cost_table: str | None = None) -> Described:
    """The cluster that was found, checked as a file would be. ``threads``: of one CPU device (None: all).

    ``cost_table``: the file of a model's measured times that it is to name.
    """
    comments: dict[tuple[str, object], Sequence[str]] = {}
    remarks = [remark for node in survey.nodes if node.gpus and (remark := unlike(node))]
    kinds = cpu_kinds([n for n in survey.nodes if not n.gpus])
    kinds += [gpu_kind(n) for n in survey.nodes if n.gpus]
    of = {node: kind for kind in kinds for node in kind.nodes}
    devices: dict[str, Any] = {}
    for kind in kinds:
        if kind.definition is not None and kind.name not in devices:
            devices[kind.name] = kind.definition
            comments["devices", kind.name] = kind.comments
    sharing = {n.name: len(group) for group in by_machine(survey.nodes).values() for n in group}
    nodes = []
    for found in survey.nodes:
        kind = of.get(found.name, Kind("cpu", (), None, ()))
        entry, said = _node(found, kind, sharing[found.name], threads)
        nodes.append(entry)
        comments["nodes", found.name] = said
    plain: dict[str, Any] = {"name": name, **({"devices": devices} if devices else {}), "nodes": nodes}
    links, said_of = _links(survey)
    plain["links"] = links
    if cost_table is not None:
        plain["cost_table"] = cost_table
    comments |= said_of
    return Described(parse_cluster(plain, "what was discovered"), comments, tuple(remarks))


def cluster_text(found: Described, head: str) -> str:
    """The file: ``head`` above it, and each entry's comments above the entry."""
    return annotated(cluster_to_dict(found.cluster), head, found.comments)


# ---- nodes -----------------------------------------------------------------------------------------------------


def _node(found: Found, kind: Kind, sharing: int, threads: int | None) -> tuple[dict[str, Any], list[str]]:
    entry: dict[str, Any] = {"name": found.name, "device": kind.name}
    said: list[str] = []
    if found.address is not None and not found.labelled:
        entry["address"] = found.address
    if found.gpus:
        memory = min(gpu.memory_bytes for gpu in found.machine.gpus[: found.gpus])
        entry["count"] = found.gpus
        if kind.definition is None and memory < lookup(kind.name).memory_bytes:
            entry["memory"] = f"{memory // _MB}MB"
        if kind.speed is not None:
            entry["speed"] = kind.speed
        said += kind.comments if kind.definition is None else ()
        said.append(f"{found.name}: count and memory as the driver says")
    else:
        each = min(threads or found.cpus, found.cpus)
        entry |= {"count": max(1, found.cpus // each), "threads": each}
        each_bytes, how = found.machine.lab_memory_bytes, "what the laboratory gives each device"
        if each_bytes is None:
            bytes_here, how = _cpu_memory(found, sharing)
            each_bytes, how = int(bytes_here / entry["count"]), f"{CPU_MEMORY_SHARE:.0%} of {how}"
        entry["memory"] = f"{max(1, each_bytes // _MB)}MB"
        said.append(f"{found.name}: {found.cpus} CPU(s) as Ray has them; memory: {how}")
    link, how = _inner_link(found, kind)
    if link is not None:
        entry["link"] = link
    if how:
        said.append(f"  link: {how}")
    return entry, said


def _cpu_memory(found: Found, sharing: int) -> tuple[float, str]:
    machine = found.machine
    limit, room = machine.memory_limit_bytes, machine.memory_room_bytes
    part = machine.memory_bytes / sharing
    if limit is not None and room is not None and room < part:
        how = f"what the control group's limit of {format_bytes(limit)} leaves beside Ray and one worker"
        return room * CPU_MEMORY_SHARE, how
    shared = f", shared by {sharing} nodes of one machine" if sharing > 1 else ""
    return part * CPU_MEMORY_SHARE, f"{format_bytes(machine.memory_bytes)} available{shared}"


def _inner_link(found: Found, kind: Kind) -> tuple[Any, str]:
    reduced = found.measured.all_reduce if found.measured is not None else None
    if reduced is not None:
        link = link_of(reduced, _device(kind))
        how = (
            f"measured, all-reduce of {reduced.how}: {format_bytes(reduced.small_bytes)} in "
            f"{format_time(reduced.small_s)}, {format_bytes(reduced.large_bytes)} in "
            f"{format_time(reduced.large_s)}; as the planner's model of a ring has it"
        )
        return _link(link), how
    if found.gpus > 1 and found.machine.topology is not None:
        return found.machine.topology, f"{found.machine.topology_said}; figures of the catalogue"
    return None, ""


def _device(kind: Kind) -> DeviceType:
    if kind.definition is None:
        return lookup(kind.name)
    plain = {"devices": {kind.name: kind.definition}, "nodes": [{"name": "x", "device": kind.name}]}
    return parse_cluster(plain).nodes[0].device


def link_of(reduced: AllReduce, device: DeviceType) -> Link:
    """The link with which the planner's all-reduce (`StageProfile.all_reduce_s`) takes what was measured.

    The small one is all latency, in the tree's 2 ceil(log2 w) steps; the large one a ring's, 2(w-1) steps and
    2(w-1)/w of the bytes (Patarasuk & Yuan 2009, section 3).
    """
    figures, width = figures_of(device), reduced.ranks
    steps = 2 * min(width - 1, math.ceil(math.log2(width)))
    latency = max(LEAST_LATENCY_S, (reduced.small_s - figures.all_reduce_s) / steps)
    moving = reduced.large_s - figures.all_reduce_s - 2 * (width - 1) * latency
    moving = max(moving, reduced.large_s / 10)
    bandwidth = 2 * (width - 1) / width * reduced.large_bytes / (moving * figures.link_share)
    return Link(significant(bandwidth), significant(latency))


# ---- links between nodes ---------------------------------------------------------------------------------------


def _links(survey: Survey) -> tuple[dict[str, Any], dict[tuple[str, object], Sequence[str]]]:
    said: dict[tuple[str, object], Sequence[str]] = {}
    hops = {node.name: node.measured.hop_s if node.measured else 0.0 for node in survey.nodes}
    known = {pair: wire for pair, wire in survey.wires.items() if all(name in hops for name in pair)}
    if not known:
        said["links", "default"] = [
            "default: not measured; correct it, or add links between nodes, before planning"
        ]
        return {"default": _link(DEFAULT_NETWORK)}, said
    entries = []
    slowest = DEFAULT_NETWORK
    for (a, b), wire in sorted(known.items()):
        link = Link(0.0, 0.0) if wire is None else _wire_link(wire, max(hops[a], hops[b]))
        if wire is not None and (link.bandwidth_bytes_s < slowest.bandwidth_bytes_s or slowest is DEFAULT_NETWORK):
            slowest = link
        entries.append({"between": [a, b], **_link(link)})
        if len(known) <= _SHOWN_PAIRS:
            said["links", (a, b)] = [_pair_said(a, b, wire, max(hops[a], hops[b]))]
    said["links", "default"] = [
        "default: every pair is below; this is the slowest of them, for nodes added by hand"
    ]
    return {"default": _link(slowest), "nodes": entries}, said


def _wire_link(wire: Wire, hop_s: float) -> Link:
    """The planner adds software's time to every message, so what an edge takes without a network comes off."""
    return Link(significant(wire.bandwidth_bytes_s), significant(max(LEAST_LATENCY_S, wire.one_way_s - hop_s)))


def _pair_said(a: str, b: str, wire: Wire | None, hop_s: float) -> str:
    if wire is None:
        return f"{a}, {b}: no connection came about"
    return (
        f"{a}, {b}: measured over the engine's edge: {format_bytes(wire.streamed_bytes)} each way, the slower "
        f"counts; {format_time(wire.one_way_s)} one way (lower quartile of {wire.pings}) less "
        f"{format_time(hop_s)} of software"
    )


def _link(link: Link) -> dict[str, str]:
    return {"bandwidth": exact_bandwidth(link.bandwidth_bytes_s), "latency": exact_time(link.latency_s)}
