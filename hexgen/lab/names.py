"""What the parts of a lab are called, where they are, and which addresses its nodes have."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from hexgen.cluster import Cluster
from hexgen.errors import SpecError
from hexgen.units import exact_bandwidth

PREFIX = "hexlab-"
# 198.18.0.0/15 is set aside for benchmarks of network devices (RFC 2544): nobody's real address.
_FIRST_ADDRESS = int(ipaddress.IPv4Address("198.18.0.0"))
MAX_LABS = 512  # each has a /24 of its own
MAX_NODES = 250
_LONGEST_HOST_NAME = 63
_LEAST_BYTES_S, _MOST_BYTES_S = 1e3, 1e12  # of a link: what tc shapes
# Of locks and of each lab's files; root's alone. Short: Unix sockets live below it, whose paths hold 107
# characters, of which Ray's own part takes some 70.
FOLDER = Path("/run/hexgen-lab")
_NUMBERED = re.compile(rf"{PREFIX}(\d{{1,3}})(?:\..*)?")


@dataclass(frozen=True, slots=True)
class LabName:
    """The names of lab ``number``; no two labs that live at the same time have the same number."""

    number: int

    @property
    def text(self) -> str:
        return f"{PREFIX}{self.number}"

    @property
    def switch(self) -> str:
        """The namespace of the bridge."""
        return self.text

    def namespace(self, node: str) -> str:
        return f"{self.text}.{node}"

    @property
    def group(self) -> str:
        """The control group that holds those of the nodes."""
        return self.text

    @property
    def folder(self) -> Path:
        """Ray's sessions and logs, and this lab's host names."""
        return FOLDER / str(self.number)

    def address(self, position: int) -> str:
        """Of the node that stands at ``position`` in the cluster file, from 0."""
        return str(ipaddress.IPv4Address(_FIRST_ADDRESS + 256 * self.number + 1 + position))

    def addresses(self, cluster: Cluster) -> dict[str, str]:
        return {node.name: self.address(position) for position, node in enumerate(cluster.nodes)}


def number_of(name: str) -> int | None:
    """The number of the lab that a namespace, control group or folder of this name belongs to; None: of no lab."""
    match = _NUMBERED.fullmatch(name)
    return int(match[1]) if match and int(match[1]) < MAX_LABS else None


def check_cluster(cluster: Cluster, where: str) -> None:
    """``SpecError`` where no lab can be made of this cluster."""
    if len(cluster.nodes) > MAX_NODES:
        raise SpecError(f"{len(cluster.nodes)} nodes; a lab has at most {MAX_NODES}", where=where)
    for node in cluster.nodes:
        at = f"{where}: node {node.name}"
        if node.device.kind != "cpu":
            raise SpecError(
                f"a lab's nodes compute on the CPU, and this one has {node.base_device}",
                where=at,
                remedy="give it `device: cpu`, with threads and speed",
            )
        if node.address is not None:
            raise SpecError(
                f"a lab gives its nodes addresses of its own, not {node.address}",
                where=at,
                remedy="remove `address`",
            )
        if len(node.name) > _LONGEST_HOST_NAME:
            raise SpecError(f"is longer than a host name, {_LONGEST_HOST_NAME} characters", where=at)
    for a, b in combinations(cluster.nodes, 2):
        bandwidth = cluster.link(a.name, b.name).bandwidth_bytes_s
        if not _LEAST_BYTES_S <= bandwidth <= _MOST_BYTES_S:
            raise SpecError(
                f"a lab's links carry {exact_bandwidth(_LEAST_BYTES_S)} to {exact_bandwidth(_MOST_BYTES_S)}, and "
                f"between {a.name} and {b.name} there is {exact_bandwidth(bandwidth)}",
                where=f"{where}: links",
                remedy="give it another bandwidth, or leave a node out",
            )
