"""The lab as a whole: built in order, run, and taken down in one sweep."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import IO

from hexgen.cluster import Cluster, Node
from hexgen.deploy.facts import LAB_MEMORY_VARIABLE
from hexgen.errors import DeploymentError, SpecError
from hexgen.lab import links, namespaces, ray_nodes
from hexgen.lab.claims import Claim
from hexgen.lab.command import Signals, command_environment, run
from hexgen.lab.groups import COMMAND, LEAST_CORES, Groups
from hexgen.lab.names import LabName, check_cluster
from hexgen.lab.namespaces import Door
from hexgen.lab.teardown import Removed, claim_free, clean, start_watchdog
from hexgen.worker.latency import VARIABLE

NAME_VARIABLE = "HEXGEN_LAB"  # in every process of a lab: its name
NODE_VARIABLE = "HEXGEN_LAB_NODE"
# Beside what the cluster file says a device has: what a Python process with torch and Ray's libraries takes (0.4
# GB as measured), and what a Ray node takes that does nothing (0.2 GB, and an object store of 0.08 GB).
_WORKER_BYTES = 1024**3
_RAY_BYTES = 512 * 1024**2
_REAP_S = 10.0  # for the end of a process that has been killed


def cores_of(node: Node, scale: float) -> float:
    """The processor time of all of the node's devices, in cores: ``speed`` is a factor on one thread's figures."""
    return node.count * (node.threads or 1) * node.speed * scale


def member_of(node: str) -> str:
    """The node's control group."""
    return f"node.{node}"


class Laboratory:
    """A running lab of ``cluster``; ``close()`` (or the end of the ``with`` block) removes every trace of it.

    ``scale`` is a factor on all speeds, for machines with fewer cores than the cluster wants. ``with_ray``:
    whether Ray runs on the nodes. Raises ``DeploymentError`` after everything that was made has been removed.
    """

    def __init__(
        self,
        cluster: Cluster,
        groups: Groups,
        *,
        scale: float = 1.0,
        with_ray: bool = True,
        where: str = "cluster",
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        check_cluster(cluster, where)
        _check_speeds(cluster, scale, where)
        self.cluster = cluster
        self.remarks: list[str] = []
        self._groups = groups
        self._scale = scale
        self._claim: Claim = claim_free(groups)
        self._closed = False
        self._ray: ray_nodes.RayNodes | None = None
        self._watchdog, self._lifeline = start_watchdog(self.name)
        try:
            self._build()
            if with_ray:
                say(f"starting Ray on {len(cluster.nodes)} nodes")
                self._start_ray()
            self._limit()
        except BaseException:
            self.close()
            raise

    @property
    def name(self) -> LabName:
        return self._claim.lab

    @property
    def head(self) -> str:
        return self.cluster.nodes[0].name

    @property
    def ray_address(self) -> str | None:
        return self._ray.address if self._ray is not None else None

    def door(self, node: str, *, limited: bool = True) -> Door:
        """To ``node``: with its limits, or (the command, which is no part of the node's computing) without."""
        member = member_of(node) if limited else COMMAND
        return Door(self.name, node, self._groups.doors(self.name, member))

    def environment(self, node: str) -> dict[str, str]:
        """What every process on ``node`` has in addition to ours."""
        memory_bytes = self.cluster.node(node).memory_bytes
        return {
            NAME_VARIABLE: self.name.text,
            NODE_VARIABLE: node,
            VARIABLE: links.latencies(self.cluster, self.name, node),
            **({} if memory_bytes is None else {LAB_MEMORY_VARIABLE: str(memory_bytes)}),
        }

    def start(self, node: str, command: Sequence[str], *, stdout: int | None = None) -> subprocess.Popen[bytes]:
        """A process on ``node``, under its limits."""
        environment = command_environment(self.environment(node))
        return subprocess.Popen(self.door(node).command(command), env=environment, stdout=stdout)

    def begin(
        self, command: Sequence[str], *, stdin: int | None = None, stdout: int | IO[bytes] | None = None,
        stderr: int | IO[bytes] | None = None,
    ) -> subprocess.Popen[bytes]:  # fmt: skip
        """``command`` on the head, as `run` has it, without waiting for its end."""
        return subprocess.Popen(
            self.door(self.head, limited=False).command(command),
            env=self._command_environment(),
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
        )

    def lift(self) -> None:
        """No limits of the processor's time until `restore`, for what takes long and is not to be measured."""
        for node in self.cluster.nodes:
            self._groups.set_cores(self.name, member_of(node.name), None)

    def restore(self) -> None:
        """Each node's speed as the cluster file has it."""
        for node in self.cluster.nodes:
            self._groups.set_cores(self.name, member_of(node.name), cores_of(node, self._scale))

    def weigh(self, factor: int) -> None:
        """Against everything else on the machine, the lab counts ``factor`` times as much as by its threads: for
        measurements that others must not slow.
        """
        threads = {member_of(node.name): ray_nodes.cpus_of(node) for node in self.cluster.nodes}
        weights = {member: factor * count for member, count in threads.items()}
        self._groups.set_weights(self.name, weights | {COMMAND: factor})

    def run(self, command: Sequence[str], signals: Signals) -> int:
        """``command`` on the head, to its end; its exit status."""
        said: set[str] = set()

        def watch() -> None:
            dead = self._ray.dead() if self._ray is not None else None
            if dead is not None and dead not in said:
                said.add(dead)
                print(f"note: Ray on node {dead} has ended", file=sys.stderr, flush=True)

        return run(self.door(self.head, limited=False), command, self._command_environment(), signals, watch)

    def _command_environment(self) -> dict[str, str]:
        additions: Mapping[str, str] = self.environment(self.head)
        if self._ray is not None:
            additions = {**additions, **self._ray.environment, "RAY_ADDRESS": self._ray.address}
        return command_environment(additions)

    def close(self) -> Removed:
        """End and remove everything. May be called twice."""
        if self._closed:
            return Removed(0, 0, 0, 0)
        self._closed = True
        try:
            removed = clean(self.name, self._groups)
        finally:
            if self._ray is not None:
                for process in self._ray.processes.values():
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(_REAP_S)
            self._claim.release()
            os.close(self._lifeline)  # the watchdog wakes, finds nothing and ends
        with suppress(subprocess.TimeoutExpired):
            self._watchdog.wait(_REAP_S)
        return removed

    def __enter__(self) -> Laboratory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- building -----------------------------------------------------------------------------------------------

    def _build(self) -> None:
        self._groups.create(self.name, (COMMAND, *(member_of(node.name) for node in self.cluster.nodes)))
        self.name.folder.mkdir(mode=0o700)
        namespaces.create(self.name, self.cluster)
        namespaces.write_hosts(self.name, self.cluster)
        self.remarks += links.shape(self.cluster, self.name)
        self.remarks += links.remarks(self.cluster)
        self.remarks += _crowded(self.cluster, self._scale)

    def _start_ray(self) -> None:
        """Without limits as yet: a slow node need not take minutes to start."""
        doors = {node.name: self.door(node.name) for node in self.cluster.nodes}
        environments = {node.name: self.environment(node.name) for node in self.cluster.nodes}
        self._ray = ray_nodes.start(self.name, self.cluster, doors, environments)

    def _limit(self) -> None:
        self.weigh(1)
        self.restore()
        for node in self.cluster.nodes:
            member = member_of(node.name)
            if node.memory_bytes is not None:
                used = self._groups.used_memory_bytes(self.name, member)
                room = node.count * (node.memory_bytes + _WORKER_BYTES) + _RAY_BYTES
                self._groups.set_memory(self.name, member, max(room, used + node.count * node.memory_bytes))
        if any(node.memory_bytes is not None for node in self.cluster.nodes) and self._groups.memory is None:
            raise DeploymentError(
                "the cluster file states memory, and this machine has no control group for it",
                remedy="leave `memory` out of it, or enable the memory controller",
            )


def _check_speeds(cluster: Cluster, scale: float, where: str) -> None:
    for node in cluster.nodes:
        cores = cores_of(node, scale)
        if cores < LEAST_CORES:
            raise SpecError(
                f"a speed of {node.speed:g} is {cores:g} cores; the least that can be given is {LEAST_CORES:g}",
                where=f"{where}: node {node.name}",
                remedy="raise its speed (or --scale)",
            )


def _crowded(cluster: Cluster, scale: float) -> tuple[str, ...]:
    wanted = sum(cores_of(node, scale) for node in cluster.nodes)
    cores = len(os.sched_getaffinity(0))
    if wanted <= cores:
        return ()
    fitting = 0.9 * scale * cores / wanted
    return (
        f"the nodes want {wanted:.3g} cores in all and this machine has {cores}: when all compute at once they "
        f"are slower than the file says, and unequally so (--scale {fitting:.2g} keeps their ratios)",
    )
