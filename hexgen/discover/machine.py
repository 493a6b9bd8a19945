"""What a node says of itself: cores, memory, GPUs, and how these are joined."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hexgen.deploy.facts import LAB_MEMORY_VARIABLE, available_memory, installed_version, usable_cores
from hexgen.discover.cgroups import cpu_quota, hidden, memory_room
from hexgen.discover.nvml import nvml_gpus
from hexgen.discover.records import Gpu, Machine

_MEBIBYTE = 1024 * 1024
_QUERY_TIMEOUT_S = 30


def look() -> Machine:
    """This machine as this process may use it: in a Ray worker, Ray has chosen the GPUs."""
    found = nvml_gpus()
    gpus, topology, said = found if found is not None else (_smi_gpus(), None, "")
    room = memory_room()
    told = os.environ.get(LAB_MEMORY_VARIABLE, "")
    return Machine(
        hostname=os.uname().nodename,
        boot_id=_boot_id(),
        cores=usable_cores(),
        memory_bytes=available_memory(),
        memory_limit_bytes=room.limit_bytes if room is not None else None,
        memory_hidden=hidden("memory"),
        memory_room_bytes=room.room_bytes if room is not None else None,
        cpu_quota=cpu_quota(),
        lab_memory_bytes=int(told) if told.isdigit() else None,
        gpus=visible(gpus, os.environ.get("CUDA_VISIBLE_DEVICES")),
        topology=topology,
        topology_said=said,
        versions=versions(),
    )


def visible(gpus: tuple[Gpu, ...], setting: str | None) -> tuple[Gpu, ...]:
    """Those that ``CUDA_VISIBLE_DEVICES`` names, by number or by the beginning of their UUID."""
    if setting is None:
        return gpus
    wanted = [part.strip() for part in setting.split(",") if part.strip()]
    return tuple(
        gpu
        for number, gpu in enumerate(gpus)
        if any(part == str(number) or (part.startswith("GPU-") and gpu.uuid.startswith(part)) for part in wanted)
    )


def _smi_gpus() -> tuple[Gpu, ...]:
    """By nvidia-smi, where NVML's Python package is not installed; nothing where there is no driver."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    query = [tool, "--query-gpu=uuid,name,memory.total,compute_cap", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=_QUERY_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return parse_smi(done.stdout)


def parse_smi(text: str) -> tuple[Gpu, ...]:
    found = []
    for line in text.splitlines():
        fields = [part.strip() for part in line.split(",")]
        if len(fields) == 4 and fields[2].isdigit():
            capability = fields[3] if fields[3].replace(".", "", 1).isdigit() else None
            found.append(Gpu(fields[1], int(fields[2]) * _MEBIBYTE, capability, fields[0]))
    return tuple(found)


def free_memory() -> int:
    """Bytes that this process may still take."""
    room = memory_room()
    return available_memory() if room is None else min(available_memory(), room.room_bytes)


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return os.uname().nodename


def versions() -> dict[str, str]:
    """Of what decides times: a table measured with others need not hold."""
    found = {"hexgen": installed_version(), "torch": version("torch")}
    torch: Any = sys.modules.get("torch")  # whose import takes seconds, and who measures has done it
    if torch is not None and torch.cuda.is_available():
        found["cuda"] = str(torch.version.cuda)
    return found
