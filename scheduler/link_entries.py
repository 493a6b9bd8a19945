"""The lines of a cluster file that say how nodes are joined: which one is about two nodes, and changing it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations_with_replacement

from hexgen.cluster import Cluster, Link, NodeLink, RegionLink

# ("nodes", a, b), ("regions", x, y) or ("default",); the names sorted.
LinkEntry = tuple[str, ...]


def link_entry(cluster: Cluster, a: str, b: str) -> LinkEntry:
    """The most specific line for two nodes; where both have regions it is theirs, even if yet to be added."""
    if any({a, b} == set(entry.nodes) for entry in cluster.node_links):
        return ("nodes", *sorted((a, b)))
    x, y = cluster.node(a).region, cluster.node(b).region
    if x is not None and y is not None:
        return ("regions", *sorted((x, y)))
    return ("default",)


def with_link(cluster: Cluster, entry: LinkEntry, link: Link) -> Cluster:
    """The cluster with that line saying ``link``."""
    names = set(entry[1:])
    if entry[0] == "nodes":
        changed = (NodeLink(e.nodes, link) if set(e.nodes) == names else e for e in cluster.node_links)
        return replace(cluster, node_links=tuple(changed))
    if entry[0] == "regions":
        # The first of two equal entries wins.
        return replace(cluster, region_links=(RegionLink((entry[1], entry[2]), link), *cluster.region_links))
    return replace(cluster, default_link=link)


def entry_text(entry: LinkEntry) -> str:
    if entry[0] == "default":
        return "between the nodes"
    return f"within {entry[1]}" if entry[1] == entry[2] else f"between {entry[1]} and {entry[2]}"


def dead_entries(cluster: Cluster) -> Iterator[LinkEntry]:
    """The lines that say that no way joins nodes which are there: own links, then regions', then the default."""
    for own in cluster.node_links:
        if not own.link.bandwidth_bytes_s > 0:
            yield ("nodes", *sorted(own.nodes))
    regions: dict[frozenset[str], Link] = {}
    for entry in cluster.region_links:
        regions.setdefault(frozenset(entry.regions), entry.link)
    default = cluster.default_link
    if default.bandwidth_bytes_s > 0 and all(link.bandwidth_bytes_s > 0 for link in regions.values()):
        return
    members = Counter(node.region for node in cluster.nodes)
    named = sorted(name for name in members if name is not None)
    for x, y in combinations_with_replacement(named, 2):
        joined = x != y or members[x] > 1
        if joined and not regions.get(frozenset((x, y)), default).bandwidth_bytes_s > 0:
            yield ("regions", x, y)
    if members[None] and len(cluster.nodes) > 1 and not default.bandwidth_bytes_s > 0:
        yield ("default",)
