"""Nodes that differ in nothing but their names: what is true of one is true of all, so one is looked at."""

from __future__ import annotations

from collections.abc import Iterable

from hexgen.cluster import Cluster, Node


def node_classes(cluster: Cluster, nodes: Iterable[Node] | None = None) -> list[tuple[Node, ...]]:
    """Equal nodes together (same device, count, link, region, price, and no link of their own), in file order."""
    linked = {name for entry in cluster.node_links for name in entry.nodes}
    found: dict[object, list[Node]] = {}
    for node in cluster.nodes if nodes is None else nodes:
        own = node.name if node.name in linked else None
        key = (node.device, node.count, node.link, node.region, node.price_usd_h, own)
        found.setdefault(key, []).append(node)
    return [tuple(members) for members in found.values()]


def range_text(names: Iterable[str]) -> str:
    """``t4-1 .. t4-12`` for many, ``a, b`` for two, the name itself for one."""
    listed = list(names)
    if len(listed) <= 2:
        return ", ".join(listed)
    return f"{listed[0]} .. {listed[-1]}"
