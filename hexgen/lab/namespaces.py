"""A network namespace a node, each with one veth to a bridge in a namespace of its own.

The bridge is not in the machine's own namespace: nothing there can be in its way (a firewall that also filters
bridges), nothing of it collides with another lab's, and it ends with its namespace, veths and all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hexgen.cluster import Cluster
from hexgen.lab.names import LabName
from hexgen.lab.tools import find, run

_NAMED = Path("/run/netns")  # where iproute2 keeps them
INTERFACE = "eth0"  # in every node's namespace
_BRIDGE = "br0"
# Join the control groups in $1 .. up to "--" before anything else, so that no child is ever outside of them.
_JOIN = 'while [ "$1" != -- ]; do echo $$ > "$1" || exit 125; shift; done; shift; exec "$@"'
# `ip netns exec` gives a mount namespace too, so these files are the node's alone. No name server: nothing out
# there can be reached, and asking would take its time.
_SETTLE = (
    'echo "$1" > /proc/sys/kernel/hostname && mount --bind "$2/hosts" /etc/hosts && '
    '{ [ ! -e /etc/resolv.conf ] || mount --bind "$2/resolv.conf" /etc/resolv.conf; } || exit 125; '
    'shift 2; exec "$@"'
)


def create(lab: LabName, cluster: Cluster) -> None:
    """Namespaces, bridge, veths, addresses. ``DeploymentError`` leaves what is there to the caller's clean-up."""
    run("ip", "netns", "add", lab.switch)
    ports = [f"link add {_BRIDGE} type bridge", f"link set {_BRIDGE} up"]
    for position, node in enumerate(cluster.nodes):
        namespace, port = lab.namespace(node.name), f"p{position}"
        run("ip", "netns", "add", namespace)
        run("ip", "link", "add", INTERFACE, "netns", namespace, "type", "veth", "peer", "name", port,
            "netns", lab.switch)  # fmt: skip
        ports += [f"link set {port} master {_BRIDGE} addrgenmode none", f"link set {port} up"]
        # The default route leads nowhere; Ray and others find their own address by asking how they would go out.
        own = (
            "link set lo up",
            f"link set {INTERFACE} addrgenmode none",  # no IPv6: links are shaped by IPv4 address
            f"addr add {lab.address(position)}/24 dev {INTERFACE}",
            f"link set {INTERFACE} up",
            f"route add default dev {INTERFACE}",
        )
        run("ip", "-n", namespace, "-batch", "-", script="\n".join(own) + "\n")
    run("ip", "-n", lab.switch, "-batch", "-", script="\n".join(ports) + "\n")


def write_hosts(lab: LabName, cluster: Cluster) -> None:
    """The nodes know one another by name; the lab's folder must be there."""
    lines = ["127.0.0.1 localhost"]
    for name, address in lab.addresses(cluster).items():
        # The second for whoever asks for the name of a peer on a socket that takes both families (torch does).
        lines += [f"{address} {name}", f"::ffff:{address} {name}.lab"]
    (lab.folder / "hosts").write_text("\n".join(lines) + "\n")
    (lab.folder / "resolv.conf").write_text("")


@dataclass(frozen=True, slots=True)
class Door:
    """How a process gets onto a node: its control groups (files to write a process id into), its namespace."""

    lab: LabName
    node: str
    groups: tuple[Path, ...]

    def command(self, command: Sequence[str]) -> list[str]:
        """``command``, run on the node; the process keeps the id of the one that is started."""
        return [
            "/bin/sh", "-c", _JOIN, "join", *map(str, self.groups), "--",
            find("nsenter") or "nsenter", f"--net={_NAMED / self.lab.namespace(self.node)}",
            find("unshare") or "unshare", "--mount", "--uts",
            "/bin/sh", "-c", _SETTLE, "settle", self.node, str(self.lab.folder), *command,
        ]  # fmt: skip


def existing() -> list[str]:
    """Every named network namespace of this machine."""
    return sorted(path.name for path in _NAMED.iterdir()) if _NAMED.is_dir() else []


def processes_in(namespace: str) -> set[int]:
    return {int(pid) for pid in run("ip", "netns", "pids", namespace).split()}


def delete(namespace: str) -> None:
    run("ip", "netns", "delete", namespace)
