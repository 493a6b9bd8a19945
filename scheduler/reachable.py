"""Nodes that no link leads to: a link without bandwidth is none. Planned without them, and said so."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from hexgen.cluster import Cluster


def without_nodes(cluster: Cluster, names: Collection[str]) -> Cluster:
    """The cluster without some of its nodes, and without the links that only those had."""
    nodes = tuple(node for node in cluster.nodes if node.name not in names)
    left, regions = {node.name for node in nodes}, {node.region for node in nodes}
    return dataclasses.replace(
        cluster,
        nodes=nodes,
        node_links=tuple(entry for entry in cluster.node_links if left.issuperset(entry.nodes)),
        region_links=tuple(entry for entry in cluster.region_links if regions.issuperset(entry.regions)),
    )


def reachable(cluster: Cluster) -> tuple[Cluster, tuple[str, ...]]:
    """The connected part with most memory, and the names of the nodes outside it."""
    links = [entry.link for entry in cluster.node_links] + [entry.link for entry in cluster.region_links]
    if all(link.bandwidth_bytes_s > 0 for link in (*links, cluster.default_link)):
        return cluster, ()
    parts = _parts(cluster)
    memory = {node.name: node.count * node.device.memory_bytes for node in cluster.nodes}
    main = max(parts, key=lambda part: sum(memory[name] for name in part))
    outside = tuple(node.name for node in cluster.nodes if node.name not in main)
    return (without_nodes(cluster, outside), outside) if outside else (cluster, ())


def _parts(cluster: Cluster) -> list[set[str]]:
    """Sets of nodes that are connected, over other nodes if need be; in the order of the cluster."""
    left = dict.fromkeys(node.name for node in cluster.nodes)
    parts: list[set[str]] = []
    while left:
        first = next(iter(left))
        del left[first]
        part, border = {first}, [first]
        while border:
            here = border.pop()
            near = [name for name in left if cluster.link(here, name).bandwidth_bytes_s > 0]
            for name in near:
                del left[name]
            part.update(near)
            border.extend(near)
        parts.append(part)
    return parts
