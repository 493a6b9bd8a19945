"""The whole survey: a probe on every node, what each has, what each measures, and every pair of them.

Nodes that are one machine (the same boot id) measure one after another, others at the same time; pairs in rounds
that use each node once. A node that fails is left out with a line, a pair that fails is written as no link.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from hexgen.deploy.ray_placement import NODE_LABEL, RayNode, live_nodes
from hexgen.discover.asking import Asker, LocalAsker, RayAsker
from hexgen.discover.names import natural, node_names
from hexgen.discover.probe import CONTROL_THREADS, Probe
from hexgen.discover.records import Machine, Measured, Wire
from hexgen.discover.rounds import rounds
from hexgen.discover.timing import DISTURBED
from hexgen.errors import DeploymentError

LOOK_TIMEOUT_S = 90.0  # a worker process starts and imports torch on a slow and busy node
MEASURE_TIMEOUT_S = 90.0
WIRE_TIMEOUT_S = 30.0
STORE_KEYS = "discover"
BUSY_CORES = 0.3  # of other processes: less is what systems do by themselves

OnProgress = Callable[[str, int, int], None]  # what is under way, steps done, steps in all


@dataclass(frozen=True, slots=True)
class Found:
    """One node: what it is called, where it is, what it has and measured."""

    name: str
    address: str | None  # None where several Ray nodes share one, or without Ray
    labelled: bool  # Ray has it under this name (`hexgen.node`)
    cpus: int  # that Ray may use there
    gpus: int
    machine: Machine
    measured: Measured | None = None


@dataclass(frozen=True, slots=True)
class Survey:
    nodes: tuple[Found, ...]
    wires: Mapping[tuple[str, str], Wire | None] = field(default_factory=dict)  # None: no connection came about
    left_out: tuple[str, ...] = ()  # one line each
    remarks: tuple[str, ...] = ()
    seconds: float = 0.0


class Surveyor:
    """Keeps the probes while a survey lasts (and a calibration after it)."""

    def __init__(
        self, asker: Asker, nodes: Sequence[Found], host: str, progress: OnProgress, on_ray: bool
    ) -> None:
        self.asker = asker
        self.on_ray = on_ray
        self.nodes = list(nodes)
        self.left_out: list[str] = []
        self.remarks: list[str] = []
        self.progress = progress
        self._host = host

    # ---- one node ----------------------------------------------------------------------------------------------

    def drop(self, node: str, reason: str) -> None:
        self.left_out.append(f"{node} is left out: {' '.join(reason.split())}")
        self.nodes = [found for found in self.nodes if found.name != node]

    def prepare(self) -> None:
        """All nodes at once; those that cannot measure are dropped."""
        self.progress("preparing probes", 0, 1)
        self.asker.ask("prepare", {node.name: () for node in self.nodes}, LOOK_TIMEOUT_S, self.drop)

    def measure(self, threads: int | None) -> None:
        """Each node by itself; ``threads`` of one CPU device (None: all that the node has)."""
        waves = one_of_each_machine(self.nodes)
        self._remark_sharing()
        for done, wave in enumerate(waves):
            self.progress("measuring nodes", done, len(waves))
            asked = {n.name: (min(threads or n.cpus, max(1, n.cpus)), n.gpus > 0) for n in wave}
            answers = self.asker.ask("measure", asked, MEASURE_TIMEOUT_S, self.drop)
            self.nodes = [replace(n, measured=answers.get(n.name, n.measured)) for n in self.nodes]
        for node in self.nodes:
            if node.machine.memory_hidden:
                self.remarks.append(
                    f"{node.name}: its control group's memory limit cannot be read: correct `memory`"
                )
            if node.measured is not None and (busy := busy_remark(node.name, node.measured)):
                self.remarks.append(busy)

    def _remark_sharing(self) -> None:
        for nodes in by_machine(self.nodes).values():
            if len(nodes) > 1:
                names = ", ".join(node.name for node in nodes)
                divided = "" if nodes[0].machine.lab_memory_bytes is not None else ", memory divided"
                self.remarks.append(f"{names} are one machine: measured one after another{divided}")

    # ---- pairs -------------------------------------------------------------------------------------------------

    def pairs(self) -> dict[tuple[str, str], Wire | None]:
        from hexgen.worker.communicator import serve_store

        found: dict[tuple[str, str], Wire | None] = {}
        schedule = rounds([node.name for node in self.nodes])
        if not schedule:
            return found
        store, port = serve_store(self._host)
        for done, pairs in enumerate(schedule):
            self.progress("measuring links", done, len(schedule))
            sides: dict[str, tuple[Any, ...]] = {}
            for a, b in pairs:
                key = f"{STORE_KEYS}/{a}/{b}"
                for side, node in enumerate((a, b)):
                    sides[node] = (self._host, port, key, side, WIRE_TIMEOUT_S / 2)
            reasons: dict[str, str] = {}
            answers = self.asker.ask("wire", sides, WIRE_TIMEOUT_S, reasons.__setitem__)
            for a, b in pairs:
                found[a, b] = answers.get(a)
                if found[a, b] is None:
                    reason = " ".join(reasons.get(a, reasons.get(b, "no answer")).split())
                    self.remarks.append(f"no connection between {a} and {b}, written as none: {reason}")
        del store
        return found


@contextmanager
def surveyed(ray_address: str | None, progress: OnProgress) -> Iterator[Surveyor]:
    """Probes on every node that answers, until the end of the block.

    Without ``ray_address`` and ``RAY_ADDRESS``, this machine alone. Raises ``DeploymentError`` where the cluster
    cannot be reached or no node answers.
    """
    if ray_address is None and not os.environ.get("RAY_ADDRESS"):
        yield _this_machine(progress)
        return
    import ray

    from hexgen.deploy.ray_connect import connect_ray

    connection = connect_ray(ray_address)
    probes: dict[str, Any] = {}
    try:
        live = live_nodes()
        names = node_names([(node.labels.get(NODE_LABEL), node.hostname) for node in live])
        nodes = dict(zip(names, live, strict=True))
        progress("starting probes", 0, 1)
        probes.update({name: _start(node) for name, node in nodes.items()})
        asker = RayAsker(probes, lambda: progress("", 0, 0))
        surveyor = Surveyor(asker, (), connection.host, progress, on_ray=True)
        machines = asker.ask("look", dict.fromkeys(nodes, ()), LOOK_TIMEOUT_S, surveyor.drop)
        surveyor.nodes = _found(nodes, machines)
        _only_what_computes(surveyor)
        yield surveyor
    finally:
        for probe in probes.values():
            ray.kill(probe, no_restart=True)
        connection.close()


def _start(node: RayNode) -> Any:
    """The actor holds the node's GPUs, so that it sees all of them; it runs beside whatever uses the CPUs."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    actor: Any = ray.remote(Probe)
    affinity: Any = NodeAffinitySchedulingStrategy
    return actor.options(
        num_cpus=0,
        num_gpus=int(node.gpus),
        max_restarts=0,
        max_task_retries=0,
        max_concurrency=CONTROL_THREADS,
        scheduling_strategy=affinity(node_id=node.id, soft=False),
    ).remote()


def _found(nodes: Mapping[str, RayNode], machines: Mapping[str, Machine]) -> list[Found]:
    sharing = Counter(node.address for node in nodes.values())
    return [
        Found(
            name=name,
            address=node.address if sharing[node.address] == 1 else None,
            labelled=node.labels.get(NODE_LABEL) == name,
            cpus=int(node.cpus),
            gpus=min(int(node.gpus), len(machines[name].gpus)),
            machine=machines[name],
        )
        for name, node in sorted(nodes.items(), key=lambda entry: natural(entry[0]))
        if name in machines
    ]


def _this_machine(progress: OnProgress) -> Surveyor:
    from hexgen.deploy.ray_local import LOOPBACK

    probe = Probe(LOOPBACK)
    machine = probe.look()
    (name,) = node_names([(None, machine.hostname)])
    found = Found(name, None, False, machine.cores, len(machine.gpus), machine)
    return Surveyor(LocalAsker(name, probe), [found], LOOPBACK, progress, on_ray=False)


def _only_what_computes(surveyor: Surveyor) -> None:
    """GPU nodes where there are GPUs, else those that offer Ray a CPU. Raises ``DeploymentError`` for none."""
    with_gpus = any(node.gpus for node in surveyor.nodes)
    for node in list(surveyor.nodes):
        if with_gpus and not node.gpus:
            surveyor.drop(node.name, "it has no GPU")
        elif not node.gpus and node.cpus < 1:
            surveyor.drop(node.name, "it offers Ray no CPU")
    if not surveyor.nodes:
        raise DeploymentError(
            "no node can be discovered: " + ("; ".join(surveyor.left_out) or "the cluster has none"),
            where="Ray",
            remedy="start nodes with `ray start`, with the same hexgen installed",
        )


def busy_remark(name: str, measured: Measured) -> str:
    """A line where other programs ran while ``name`` was measured; empty where none did."""
    slowed, cores = measured.speeds.disturbance, measured.others
    if slowed <= DISTURBED and cores <= BUSY_CORES:
        return ""
    found = [f"{cores:.1f} cores of its machine"] if cores > BUSY_CORES else []
    found += [f"{slowed:.1f} times as long as alone"] if slowed > DISTURBED else []
    return (
        f"{name} was busy with other programs ({', '.join(found)}): its figures are for when it is not, and "
        "may be off by a third: measure again when it is idle"
    )


def by_machine(nodes: Sequence[Found]) -> dict[str, list[Found]]:
    found: dict[str, list[Found]] = {}
    for node in nodes:
        found.setdefault(node.machine.boot_id, []).append(node)
    return found


def one_of_each_machine(nodes: Sequence[Found]) -> list[list[Found]]:
    """Waves in which every machine has at most one of its nodes."""
    machines = list(by_machine(nodes).values())
    longest = max((len(members) for members in machines), default=0)
    return [[members[i] for members in machines if i < len(members)] for i in range(longest)]


def survey(
    surveyor: Surveyor,
    *,
    measure: bool = True,
    threads: int | None = None,
    prepared: Callable[[], None] = lambda: None,
) -> Survey:
    """Measure (unless told not to) what the surveyor has found. ``prepared`` is called before anything is."""
    started = time.monotonic()
    wires: dict[tuple[str, str], Wire | None] = {}
    if measure:
        surveyor.prepare()
        prepared()
        surveyor.measure(threads)
        wires = surveyor.pairs()
    if not surveyor.nodes:
        raise DeploymentError("no node could be measured: " + "; ".join(surveyor.left_out), where="Ray")
    return Survey(
        tuple(surveyor.nodes),
        wires,
        tuple(surveyor.left_out),
        tuple(surveyor.remarks),
        time.monotonic() - started,
    )
