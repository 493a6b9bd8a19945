"""The lab's Ray cluster: one node in each namespace, head first, with token authentication."""

from __future__ import annotations

import os
import secrets
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hexgen.cluster import Cluster, Node
from hexgen.errors import DeploymentError
from hexgen.lab.names import LabName
from hexgen.lab.namespaces import Door
from hexgen.lab.ray_node import GCS_PORT

START_TIMEOUT_S = 600.0  # of all; one takes some five seconds on an idle machine
_POLL_S = 0.2


@dataclass(slots=True)
class RayNodes:
    """The processes that stand for the nodes; they end with their control groups."""

    address: str  # of the head, as `--ray-address` takes it
    environment: dict[str, str]  # what a process needs to join
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def dead(self) -> str | None:
        """The name of a node whose Ray has ended; None while all run."""
        return next((name for name, process in self.processes.items() if process.poll() is not None), None)


def ray_environment() -> dict[str, str]:
    """A token of this lab's own, made anew; written to no file."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def cpus_of(node: Node) -> int:
    """What the node offers Ray: what its devices take (``hexgen.deploy.ray_placement``)."""
    return node.count * (node.threads or 1)


def start(
    lab: LabName, cluster: Cluster, doors: Mapping[str, Door], environments: Mapping[str, Mapping[str, str]]
) -> RayNodes:
    """Start the head, then the others. ``environments`` are the nodes' own additions.

    ``DeploymentError`` with the last line of a node's log where it does not come up; what runs is left to the
    caller's clean-up.
    """
    head, *others = cluster.nodes
    addresses = lab.addresses(cluster)
    nodes = RayNodes(f"{addresses[head.name]}:{GCS_PORT}", ray_environment())
    deadline = time.monotonic() + START_TIMEOUT_S

    def begin(node: Node, position: int, joins: str | None) -> None:
        command = [
            sys.executable, "-m", "hexgen.lab.ray_node", "--name", node.name, "--address", addresses[node.name],
            "--cpus", str(cpus_of(node)), "--folder", str(lab.folder / str(position)),
            *(f"--label={key}={value}" for key, value in node.labels),
        ]  # fmt: skip
        if joins is not None:
            command += ["--head", joins]
        with open(_log(lab, node.name), "wb") as log:
            nodes.processes[node.name] = subprocess.Popen(
                doors[node.name].command(command),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                env=_clean_environment() | nodes.environment | dict(environments[node.name]),
                start_new_session=True,  # Ctrl-C is the command's; the nodes end after it
            )

    begin(head, 0, None)
    _await(lab, nodes, [head.name], deadline)
    # Ray gives a node 30 s to come up: no more of them at a time than there are cores.
    numbered = list(enumerate(others, 1))
    together = len(os.sched_getaffinity(0))
    for first in range(0, len(numbered), together):
        batch = numbered[first : first + together]
        for position, node in batch:
            begin(node, position, addresses[head.name])
        _await(lab, nodes, [node.name for _, node in batch], deadline)
    return nodes


def _await(lab: LabName, nodes: RayNodes, names: Sequence[str], deadline: float) -> None:
    waiting = set(names)
    while waiting:
        outputs = {output: name for name in waiting if (output := nodes.processes[name].stdout) is not None}
        for output in select.select(list(outputs), [], [], _POLL_S)[0]:
            name = outputs[output]
            if not output.readline().startswith(b"ready"):
                raise DeploymentError(f"Ray did not start: {_last_line(_log(lab, name))}", where=f"node {name}")
            waiting.discard(name)
        if waiting and time.monotonic() > deadline:
            raise DeploymentError(
                f"Ray did not start within {START_TIMEOUT_S:.0f} s: {_last_line(_log(lab, min(waiting)))}",
                where=f"node {', '.join(sorted(waiting))}",
                remedy="is the machine busy with something else?",
            )


def _clean_environment() -> dict[str, str]:
    """Ours, without what would send the nodes into another Ray cluster."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}


def _log(lab: LabName, name: str) -> Path:
    return lab.folder / f"{name}.log"


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it ended without a word"
