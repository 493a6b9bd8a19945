"""Links between the nodes: bandwidth by ``tc``, latency by a setting that the engine's own senders follow.

At each node's veth there is one htb class for every other node, chosen by destination, so that each pair has its
own bandwidth in each direction. tc counts whole Ethernet frames, as a real link carries them: what a program sees
over TCP is about 5 % less.
"""

from __future__ import annotations

from hexgen.cluster import Cluster
from hexgen.errors import DeploymentError
from hexgen.lab.names import LabName
from hexgen.lab.namespaces import INTERFACE
from hexgen.lab.tools import run
from hexgen.units import format_time
from hexgen.worker.latency import latency_setting

_FRAME_BYTES = 1514
_SEGMENTER_BITS_S = 10**10  # never the limit
_SEGMENTER_QUEUE_BYTES = 10_000_000  # TCP keeps far less waiting here
# A packet goes out whole and at once. With the kernel's usual 64 KB of segments joined into one, a small message
# on an idle link would take no time at all; so no more are joined than the link carries within this time.
_PACKET_S = 100e-6
_MOST_SEGMENTS = 44
_BURST_S = 250e-6  # what may go out at once after a pause: covers the timers' lateness


def shaping(cluster: Cluster, lab: LabName, node: str) -> list[str]:
    """The lines of ``tc -batch`` for ``node``: pure.

    Links slower than the node's fastest get a token bucket below their class, which takes packets apart that are
    too large for them. It holds nothing back: the class does that.
    """
    lines = [f"qdisc add dev {INTERFACE} root handle 1: htb default 0"]
    joined_bytes = segments(cluster, node) * _FRAME_BYTES
    for number, (other, address) in enumerate(lab.addresses(cluster).items(), 1):
        if other == node:
            continue
        rate_bytes_s = cluster.link(node, other).bandwidth_bytes_s
        burst_bytes = max(2 * _FRAME_BYTES, round(rate_bytes_s * _BURST_S))
        quantum_bytes = max(_FRAME_BYTES, min(burst_bytes, 60_000))
        lines += [
            f"class add dev {INTERFACE} parent 1: classid 1:{number:x} htb rate {round(8 * rate_bytes_s)}bit "
            f"burst {burst_bytes} cburst {burst_bytes} quantum {quantum_bytes}",
            f"filter add dev {INTERFACE} parent 1: protocol ip prio 1 u32 match ip dst {address}/32 "
            f"flowid 1:{number:x}",
        ]
        packet_bytes = max(2 * _FRAME_BYTES, round(rate_bytes_s * _PACKET_S))
        if packet_bytes < joined_bytes:
            lines.append(
                f"qdisc add dev {INTERFACE} parent 1:{number:x} handle {0x100 + number:x}: tbf "
                f"rate {_SEGMENTER_BITS_S}bit burst {packet_bytes} limit {_SEGMENTER_QUEUE_BYTES}"
            )
    return lines


def segments(cluster: Cluster, node: str) -> int:
    """How many TCP segments ``node`` may join into one packet: few enough for its fastest link."""
    rates = [cluster.link(node, other.name).bandwidth_bytes_s for other in cluster.nodes if other.name != node]
    return max(1, int(min(_MOST_SEGMENTS, max(rates, default=0.0) * _PACKET_S / _FRAME_BYTES)))


def shape(cluster: Cluster, lab: LabName) -> tuple[str, ...]:
    """Give every link its bandwidth; returns remarks for a person. The namespaces must be there."""
    for node in cluster.nodes:
        namespace = lab.namespace(node.name)
        run("tc", "-n", namespace, "-batch", "-", script="\n".join(shaping(cluster, lab, node.name)) + "\n")
        try:
            run("ip", "-n", namespace, "link", "set", INTERFACE, "gso_max_segs", str(segments(cluster, node.name)))
        except DeploymentError:  # iproute2 before 5.18: only short messages on idle links differ
            return ("this iproute2 cannot set gso_max_segs: messages below 64 KB pass an idle link unshaped",)
    return ()


def latencies(cluster: Cluster, lab: LabName, node: str) -> str:
    """The setting (``hexgen.worker.latency``) for processes on ``node``."""
    addresses = lab.addresses(cluster)
    return latency_setting({
        addresses[other.name]: cluster.link(node, other.name).latency_s
        for other in cluster.nodes
        if other.name != node
    })  # fmt: skip


def remarks(cluster: Cluster) -> tuple[str, ...]:
    """What a person should know who looks at the links from inside."""
    names = [node.name for node in cluster.nodes]
    found = [cluster.link(a, b).latency_s for i, a in enumerate(names) for b in names[i + 1 :]]
    if not any(found):
        return ()
    span = format_time(min(found)) + ("" if min(found) == max(found) else f" to {format_time(max(found))}")
    return (f"latency ({span}) is added by the engine's senders, not by the network: ping does not show it",)
