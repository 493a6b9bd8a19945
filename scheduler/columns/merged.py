"""Nodes joined as fast as the inside of a node: their bound comes from a cluster where they are one node.

Groups may span such an island, and columns do not. With the island as a single node, joined throughout by the
faster of its links, every real group and pipeline has one that is at least as good: a bound there is a bound here.
"""

from __future__ import annotations

from dataclasses import replace

from hexgen.cluster import Link
from hexgen.scheduler.groups import Topology, islands


def merged(topology: Topology) -> Topology | None:
    """The relaxed topology; None where an island's nodes differ, or links are given node by node."""
    found = islands(topology)
    if topology.cluster.node_links:
        return None
    gone: set[int] = set()
    nodes = list(topology.nodes)
    for island in found:
        members = [topology.nodes[place] for place in island]
        lead = members[0]
        if any((m.device, m.link, m.region) != (lead.device, lead.link, lead.region) for m in members):
            return None
        between = topology.link(island[0], island[1])
        link = Link(
            max(lead.link.bandwidth_bytes_s, between.bandwidth_bytes_s),
            min(lead.link.latency_s, between.latency_s),
        )
        nodes[island[0]] = replace(lead, count=sum(m.count for m in members), link=link)
        gone |= set(island[1:])
    left = tuple(node for place, node in enumerate(nodes) if place not in gone)
    return Topology(replace(topology.cluster, nodes=left), left)
