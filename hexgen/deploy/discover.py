"""What there is: this machine, or the nodes of a Ray cluster, as a cluster that can be planned over.

Names and memory are read from the nodes; speeds are the catalogue's.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from hexgen.catalogue import lookup
from hexgen.cluster import Cluster, parse_cluster
from hexgen.deploy.facts import available_memory, usable_cores
from hexgen.deploy.ray_placement import NODE_LABEL, RayNode, live_nodes
from hexgen.errors import DeploymentError, SpecError

# Left to the system and to the workers' interpreters on a node that computes on its CPU.
CPU_MEMORY_SHARE = 0.8
PROBE_TIMEOUT_S = 60.0
MEBIBYTE = 1024 * 1024
_NAME = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True, slots=True)
class Machine:
    """What one node found on itself."""

    hostname: str
    cores: int
    memory_bytes: int  # available
    gpus: tuple[tuple[str, int], ...]  # name as the driver has it, bytes


@dataclass(frozen=True, slots=True)
class Discovery:
    cluster: Cluster
    remarks: tuple[str, ...]


def discover(ray_address: str | None = None) -> Discovery:
    """The nodes of the cluster at ``ray_address`` (or ``RAY_ADDRESS``), else this machine.

    Raises ``DeploymentError`` where the cluster cannot be reached or a GPU is not in the catalogue.
    """
    if ray_address is None and not os.environ.get("RAY_ADDRESS"):
        machine = probe()
        return build("this-machine", [(machine.hostname, None, machine)])
    from hexgen.deploy.ray_connect import connect_ray

    connection = connect_ray(ray_address)
    try:
        nodes = live_nodes()
        return build("ray", _entries(nodes, _probe_nodes(nodes)))
    finally:
        connection.close()


def probe(in_task: bool = False) -> Machine:
    """This machine, as this process may use it; ``in_task``: a Ray task, from which Ray may hide the GPUs."""
    return Machine(os.uname().nodename, usable_cores(), available_memory(), _gpus(in_task))


def _probe_nodes(nodes: Sequence[RayNode]) -> list[Machine]:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from hexgen.deploy.ray_calls import gather

    task: Any = ray.remote(probe)
    affinity: Any = NodeAffinitySchedulingStrategy
    calls = {
        node.id: task.options(
            num_cpus=0, max_retries=0, scheduling_strategy=affinity(node_id=node.id, soft=False)
        ).remote(in_task=True)
        for node in nodes
    }
    found = gather(calls, "looking at the nodes", PROBE_TIMEOUT_S)
    # Ray says how many of the machine's CPUs and GPUs are its own.
    return [
        replace(found[node.id], cores=int(node.cpus), gpus=found[node.id].gpus[: int(node.gpus)]) for node in nodes
    ]


def _entries(nodes: Sequence[RayNode], machines: Sequence[Machine]) -> list[tuple[str, str | None, Machine]]:
    """(name, address or None, machine). The address is left out where several Ray nodes share one."""
    sharing = Counter(node.address for node in nodes)
    return [
        (
            node.labels.get(NODE_LABEL, machine.hostname),
            node.address if sharing[node.address] == 1 else None,
            machine,
        )
        for node, machine in zip(nodes, machines, strict=True)
    ]


def build(name: str, entries: Sequence[tuple[str, str | None, Machine]]) -> Discovery:
    """A cluster of GPU nodes where there are GPUs, else of the CPUs; validated as if it came from a file."""
    remarks: list[str] = []
    with_gpus = any(machine.gpus for _, _, machine in entries)
    names: Counter[str] = Counter()
    nodes: list[dict[str, Any]] = []
    for wanted, address, machine in entries:
        if with_gpus and not machine.gpus:
            remarks.append(f"{wanted} has no GPU and is left out")
            continue
        if not machine.gpus and machine.cores < 1:
            remarks.append(f"{wanted} offers Ray no CPU and is left out")
            continue
        base = _NAME.sub("-", wanted).strip("-.") or "node"
        names[base] += 1
        entry: dict[str, Any] = {"name": base if names[base] == 1 else f"{base}-{names[base]}"}
        if address is not None:
            entry["address"] = address
        nodes.append(entry | (_gpu_entry(wanted, machine, remarks) if machine.gpus else _cpu_entry(machine)))
    if not nodes:
        raise DeploymentError("the Ray cluster has no devices", remedy="start nodes that have, with `ray start`")
    return Discovery(parse_cluster({"name": name, "nodes": nodes}, "what was discovered"), tuple(remarks))


def _cpu_entry(machine: Machine) -> dict[str, Any]:
    memory = int(machine.memory_bytes * CPU_MEMORY_SHARE) // MEBIBYTE
    return {"device": "cpu", "count": 1, "threads": machine.cores, "memory": f"{memory}MiB"}


def _gpu_entry(where: str, machine: Machine, remarks: list[str]) -> dict[str, Any]:
    kinds = Counter(name for name, _ in machine.gpus)
    name, memory = min(machine.gpus, key=lambda gpu: gpu[1])
    if len(kinds) > 1:
        have = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
        remarks.append(
            f"{where} has unlike GPUs ({have}): all are taken for the smallest; for better plans run one "
            "`ray start` for each kind there, with CUDA_VISIBLE_DEVICES"
        )
    try:
        device = lookup(name)
    except SpecError as error:
        raise DeploymentError(
            f"the catalogue has no GPU {name!r}",
            where=where,
            remedy="write the cluster file by hand, with this card's figures under `devices:`",
        ) from error
    entry: dict[str, Any] = {"device": device.name, "count": len(machine.gpus)}
    if memory < device.memory_bytes:
        entry["memory"] = f"{memory // MEBIBYTE}MiB"
    return entry


def _gpus(in_task: bool) -> tuple[tuple[str, int], ...]:
    """Name and bytes of each NVIDIA GPU that this process may use; nothing where there is no driver."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    query = [tool, "--query-gpu=index,uuid,name,memory.total", "--format=csv,noheader,nounits"]
    try:
        text = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    visible = None if in_task else os.environ.get("CUDA_VISIBLE_DEVICES")
    chosen = None if visible is None else {part.strip() for part in visible.split(",")}
    found = []
    for line in text.splitlines():
        fields = [part.strip() for part in line.split(",")]
        if len(fields) == 4 and fields[3].isdigit() and (chosen is None or {fields[0], fields[1]} & chosen):
            found.append((fields[2], int(fields[3]) * MEBIBYTE))
    return tuple(found)
