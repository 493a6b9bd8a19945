"""Whether what the actors found on their nodes is what the plan was made for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from hexgen.catalogue import lookup
from hexgen.cluster import Cluster
from hexgen.deploy.facts import installed_version
from hexgen.errors import DeploymentError, SpecError
from hexgen.memory import PlanMemory
from hexgen.plan import DevicePrediction
from hexgen.units import format_bytes


@dataclass(frozen=True, slots=True)
class Facts:
    """What a placed actor found on its node, before anything is loaded."""

    device: str  # id in the plan
    ray_node: str  # id in Ray
    address: str  # the node's, as Ray knows it: every socket of the rank binds to it
    hostname: str
    pid: int
    hexgen_version: str
    torch_version: str
    torch_device: str  # "cpu" or "cuda:0" (Ray shows each actor only its own GPU)
    device_name: str
    device_uuid: str | None  # None for a CPU
    memory_bytes: int  # of the GPU; of a CPU node what is available on the whole machine
    cores: int


def verify(facts: Mapping[str, Facts], cluster: Cluster, memory: PlanMemory) -> tuple[str, ...]:
    """Raise ``DeploymentError`` where the plan cannot run on what was found; returns remarks for a person."""
    _one_version(facts.values())
    _distinct_gpus(facts.values())
    planned = {prediction.device: prediction for prediction in memory.devices}
    machines: dict[str, list[Facts]] = defaultdict(list)
    for found in facts.values():
        if found.torch_device == "cpu":
            machines[found.hostname].append(found)
        else:
            _gpu_memory(found, planned[found.device])
    for on_one in machines.values():
        _machine_memory(on_one, planned)
    return (*_slower_than_planned(facts, cluster), *_crowded(machines, cluster))


def _one_version(facts: Iterable[Facts]) -> None:
    own = installed_version()
    for found in facts:
        if found.hexgen_version != own:
            raise DeploymentError(
                f"hexgen {found.hexgen_version} is installed there, and {own} here",
                where=f"device {found.device} on {found.hostname}",
                remedy="install the same version on every node",
            )


def _distinct_gpus(facts: Iterable[Facts]) -> None:
    owners: dict[str, str] = {}
    for found in facts:
        if found.device_uuid is None:
            continue
        other = owners.setdefault(found.device_uuid, found.device)
        if other != found.device:
            raise DeploymentError(
                f"this device and {other} are the same GPU",
                where=f"device {found.device} on {found.hostname}",
                remedy="count the GPUs with `nvidia-smi -L` there, and what `ray start --num-gpus` said",
            )


def _total(planned: DevicePrediction) -> int:
    return planned.weights_bytes + planned.kv_bytes + planned.buffers_bytes


def _gpu_memory(found: Facts, planned: DevicePrediction) -> None:
    if found.memory_bytes < _total(planned):
        raise DeploymentError(
            f"the plan puts {format_bytes(_total(planned))} on it, but it is a {found.device_name} with "
            f"{format_bytes(found.memory_bytes)}",
            where=f"device {found.device} on {found.hostname}",
            remedy="correct the cluster file (`hexgen discover` writes one from what is there) and plan anew",
        )


def _machine_memory(on_one: list[Facts], planned: Mapping[str, DevicePrediction]) -> None:
    needed = sum(_total(planned[found.device]) for found in on_one)
    available = max(found.memory_bytes for found in on_one)
    if needed > available:
        raise DeploymentError(
            f"the plan puts {format_bytes(needed)} on this machine, which has {format_bytes(available)} available",
            where=f"{on_one[0].hostname} ({', '.join(found.device for found in on_one)})",
            remedy="free memory there, lower the nodes' `memory` in the cluster file, and plan anew",
        )


def _slower_than_planned(facts: Mapping[str, Facts], cluster: Cluster) -> list[str]:
    remarks = []
    for found in facts.values():
        expected = cluster.node(found.device.rpartition("/")[0]).device
        if found.torch_device == "cpu":
            continue
        try:
            actual = lookup(found.device_name)
        except SpecError:
            continue  # a card the catalogue does not know: the file's own figures stand
        if actual.name != expected.name:
            remarks.append(f"device {found.device} is a {actual.name}, the plan was made for a {expected.name}")
    return remarks


def _crowded(machines: Mapping[str, list[Facts]], cluster: Cluster) -> list[str]:
    remarks = []
    for hostname, on_one in machines.items():
        threads = sum(cluster.node(found.device.rpartition("/")[0]).threads or 1 for found in on_one)
        cores = max(found.cores for found in on_one)
        if threads > cores:
            remarks.append(f"{hostname} has {cores} cores for {threads} threads: slower than predicted")
    return remarks
