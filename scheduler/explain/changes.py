"""Which changes to a cluster are worth pricing: equal nodes once, the likely ones first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import zip_longest

from hexgen.cluster import Cluster, DeviceType, Link, Node
from hexgen.scheduler.explain.classes import node_classes
from hexgen.scheduler.explain.facts import Bottleneck, ChangeKind, DeviceUse, LinkUse
from hexgen.scheduler.link_entries import LinkEntry, entry_text, link_entry, with_link
from hexgen.units import format_bytes

LINK_FACTORS = (10, 2)
MEMORY_FACTOR = 2
_NO_LINK_BYTES_S = 1e9 / 8  # what a missing link is multiplied from
_KINDS_KEPT = 8  # of each kind of change, the most promising


@dataclass(frozen=True, slots=True)
class Candidate:
    """A changed cluster. ``then``: a smaller change to try only where this one helps."""

    kind: ChangeKind
    text: str
    cluster: Cluster
    nodes: tuple[str, ...]
    price_usd_h: float | None = None
    alike: int = 1
    then: Candidate | None = None


def candidates(
    cluster: Cluster,
    used: tuple[DeviceUse, ...],
    links: tuple[LinkUse, ...],
    bottleneck: Bottleneck,
    *,
    chosen: bool = False,
) -> list[Candidate]:
    """Changes of all kinds in turn, so that a short time sees some of each.

    ``chosen``: nodes are unused for their price. Using one of them is then the change, not buying another.
    """
    kinds: tuple[list[Candidate], ...] = (
        list(_more_nodes(cluster, used, bottleneck, chosen)),
        list(_fewer_nodes(cluster, used)),
        list(_faster_links(cluster, links)),
        list(_more_memory(cluster, used, bottleneck)),
        list(_fewer_devices(cluster, used)),
    )
    turns = zip_longest(*(kind[:_KINDS_KEPT] for kind in kinds))
    return [candidate for turn in turns for candidate in turn if candidate is not None]


# ---- nodes ----------------------------------------------------------------------------------------------------


def _more_nodes(
    cluster: Cluster, used: tuple[DeviceUse, ...], bottleneck: Bottleneck, chosen: bool
) -> Iterator[Candidate]:
    """One more of each kind, those of the bottleneck's kind first, then the fastest.

    None of a kind that the plan has no use for: it leaves some of them out already.
    """
    busy = {use.device.rsplit("/", 1)[0] for use in used}
    classes = sorted(
        node_classes(cluster),
        key=lambda members: (
            not any(node.name in bottleneck.nodes for node in members),
            -members[0].count * members[0].device.bandwidth_bytes_s,
        ),
    )
    named: set[tuple[str, str]] = set()
    for members in classes:
        like = next((node for node in members if node.name not in busy), members[0])
        if like.name not in busy:
            if chosen:
                text = f"also use {like.name} ({like.count} x {like.device.name})"
                yield Candidate("add node", text, cluster, (like.name,), like.price_usd_h, len(members))
            continue
        name = _fresh_name(cluster, like.name)
        where = f" in {like.region}" if like.region is not None and _regions(cluster) > 1 else ""
        what = like.device.name if like.count == 1 else f"node of {like.count} {like.device.name}"
        if (what, where) in named:
            where = f"{where} like {like.name}"
        named.add((what, where))
        own_links = tuple(
            replace(entry, nodes=(name if entry.nodes[0] == like.name else entry.nodes[0],
                                  name if entry.nodes[1] == like.name else entry.nodes[1]))
            for entry in cluster.node_links
            if like.name in entry.nodes
        )  # fmt: skip
        yield Candidate(
            "add node",
            f"one more {what}{where}",
            replace(
                cluster,
                nodes=(*cluster.nodes, replace(like, name=name)),
                node_links=cluster.node_links + own_links,
            ),
            (name,),
            like.price_usd_h,
            len(members),
        )


def _fewer_nodes(cluster: Cluster, used: tuple[DeviceUse, ...]) -> Iterator[Candidate]:
    """One node less of each kind in use, those that are busy least first."""
    busy: dict[str, float] = {}
    for use in used:
        node = use.device.rsplit("/", 1)[0]
        busy[node] = busy.get(node, 0.0) + use.time.busy
    classes = node_classes(cluster, [node for node in cluster.nodes if node.name in busy])
    for members in sorted(classes, key=lambda members: min(busy[node.name] / node.count for node in members)):
        gone = min(members, key=lambda node: busy[node.name])
        if len(cluster.nodes) == 1:
            return
        alike = f" (1 of {len(members)} alike)" if len(members) > 1 else ""
        yield Candidate(
            "drop node",
            f"drop {gone.name}{alike}",
            _without(cluster, gone.name),
            (gone.name,),
            None if gone.price_usd_h is None else -gone.price_usd_h,
            len(members),
        )


def _fewer_devices(cluster: Cluster, used: tuple[DeviceUse, ...]) -> Iterator[Candidate]:
    """One device less in a node of several: what a failing card costs."""
    there = {use.device.rsplit("/", 1)[0] for use in used}
    for members in node_classes(
        cluster, [node for node in cluster.nodes if node.name in there and node.count > 1]
    ):
        node = members[0]
        less = replace(node, count=node.count - 1)
        yield Candidate(
            "drop device",
            f"drop {node.name}/{node.count - 1} (1 of {node.count} {node.device.name})",
            replace(cluster, nodes=tuple(less if other is node else other for other in cluster.nodes)),
            (node.name,),
            alike=len(members),
        )


def _without(cluster: Cluster, name: str) -> Cluster:
    return replace(
        cluster,
        nodes=tuple(node for node in cluster.nodes if node.name != name),
        node_links=tuple(entry for entry in cluster.node_links if name not in entry.nodes),
    )


def _fresh_name(cluster: Cluster, like: str) -> str:
    taken = {node.name for node in cluster.nodes}
    stem = like.rstrip("0123456789").rstrip("-") or like
    return next(name for n in range(len(taken) + 2) if (name := f"{stem}-more{n or ''}") not in taken)


def _regions(cluster: Cluster) -> int:
    return len({node.region for node in cluster.nodes})


# ---- links ----------------------------------------------------------------------------------------------------


def _faster_links(cluster: Cluster, links: tuple[LinkUse, ...]) -> Iterator[Candidate]:
    """Links that routes cross, the most loaded first, then others between regions, the slowest first."""
    seen: set[object] = set()
    crossed = [(use.sender, use.receiver) for use in links if use.sender != use.receiver]
    first = list({node.region: node.name for node in reversed(cluster.nodes)}.values())
    others = sorted(
        ((a, b) for i, a in enumerate(first) for b in first[i + 1 :]),
        key=lambda pair: cluster.link(*pair).bandwidth_bytes_s,
    )
    for a, b in [*crossed, *others]:
        entry = link_entry(cluster, a, b)
        if entry in seen:
            continue
        seen.add(entry)
        trials = [_faster(cluster, a, b, entry, factor) for factor in LINK_FACTORS]
        yield replace(trials[0], then=trials[1])


def _faster(cluster: Cluster, a: str, b: str, entry: LinkEntry, factor: int) -> Candidate:
    now = cluster.link(a, b)
    link = Link((now.bandwidth_bytes_s or _NO_LINK_BYTES_S) * factor, now.latency_s)
    before = bandwidth_text(now.bandwidth_bytes_s) if now.bandwidth_bytes_s else "none"
    text = f"{bandwidth_text(link.bandwidth_bytes_s)} {entry_text(entry)} (now {before})"
    return Candidate("link", text, with_link(cluster, entry, link), (a, b))


def bandwidth_text(bytes_s: float) -> str:
    """``10 Gbps``: networks are sold in bits."""
    bits = bytes_s * 8
    for unit, size in (("Tbps", 1e12), ("Gbps", 1e9), ("Mbps", 1e6), ("Kbps", 1e3)):
        if bits >= size * 0.9995:
            return f"{bits / size:.3g} {unit}" if bits / size < 999.5 else f"{bits / size:.0f} {unit}"
    return f"{bits:.3g} bps"


# ---- memory ---------------------------------------------------------------------------------------------------


def _more_memory(cluster: Cluster, used: tuple[DeviceUse, ...], bottleneck: Bottleneck) -> Iterator[Candidate]:
    """More memory for all devices of a type, where KV room bounds the plan and devices of the type are full."""
    if not bottleneck.kv_bound:
        return
    full = {use.memory.limited_by for use in used} - {None}
    types = {cluster.device(device).type for device in full if device is not None}
    for device in sorted(types, key=lambda device: device.memory_bytes):
        bigger = replace(device, memory_bytes=device.memory_bytes * MEMORY_FACTOR)
        members = [node for node in cluster.nodes if node.device == device]
        yield Candidate(
            "memory",
            f"{format_bytes(bigger.memory_bytes)} in every {device.name} "
            f"(now {format_bytes(device.memory_bytes)}, {sum(n.count for n in members)} devices)",
            replace(
                cluster,
                nodes=tuple(_with_memory(node, device, bigger) for node in cluster.nodes),
            ),
            tuple(node.name for node in members),
            alike=len(members),
        )


def _with_memory(node: Node, device: DeviceType, bigger: DeviceType) -> Node:
    return replace(node, device=bigger) if node.device == device else node
