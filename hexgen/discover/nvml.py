"""GPUs by NVML (the package nvidia-ml-py, optional): names, memory, capability, and what joins them.

The link among the GPUs of a node is the weakest that any pair of them has: NVLink where every pair is joined by it
(directly or through a switch), else PCIe of the generation that the cards run at, else the way through host memory
where no PCIe path avoids the CPUs' own interconnect.
"""

from __future__ import annotations

from importlib import import_module
from itertools import combinations
from typing import Any

from hexgen.discover.records import Gpu

_PCIE = {3: "pcie3", 4: "pcie4", 5: "pcie5"}


def nvml_gpus() -> tuple[tuple[Gpu, ...], str | None, str] | None:
    """(GPUs by index, the catalogue's name of the link among them, how that was found); None without NVML."""
    try:
        nvml: Any = import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    try:
        handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
        gpus = tuple(_gpu(nvml, handle) for handle in handles)
        link, said = _weakest(nvml, handles)
        return gpus, link, said
    except nvml.NVMLError:
        return None
    finally:
        nvml.nvmlShutdown()


def _gpu(nvml: Any, handle: Any) -> Gpu:
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    return Gpu(
        name=_text(nvml.nvmlDeviceGetName(handle)),
        memory_bytes=int(nvml.nvmlDeviceGetMemoryInfo(handle).total),
        capability=f"{major}.{minor}",
        uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
    )


def _weakest(nvml: Any, handles: list[Any]) -> tuple[str | None, str]:
    if len(handles) < 2:
        return None, ""
    pairs = list(combinations(range(len(handles)), 2))
    links = [_nvlinks(nvml, handle) for handle in handles]
    places = [_text(nvml.nvmlDeviceGetPciInfo(handle).busId) for handle in handles]
    joined = [_joined(links[a], links[b], places[a], places[b]) for a, b in pairs]
    if all(joined):
        name = _nvlink_name(nvml, handles)
        return name, f"NVML: NVLink between every pair, {min(len(link) for link in links)} active links a card"
    ancestors = [nvml.nvmlDeviceGetTopologyCommonAncestor(handles[a], handles[b]) for a, b in pairs]
    if max(ancestors) >= nvml.NVML_TOPOLOGY_SYSTEM:
        return "none", "NVML: some pairs are joined only across the CPUs"
    generation = min(_generation(nvml, handle) for handle in handles)
    some = f", NVLink between {sum(joined)} of {len(pairs)} pairs" if any(joined) else ""
    return _PCIE.get(generation, "pcie5" if generation > 5 else "pcie3"), f"NVML: PCIe {generation}{some}"


def _joined(a: list[str], b: list[str], place_a: str, place_b: str) -> bool:
    """Direct, or both to a switch: then their links end at PCI functions that are no GPU of the pair."""
    return place_b in a or place_a in b or ("switch" in a and "switch" in b)


def _nvlinks(nvml: Any, handle: Any) -> list[str]:
    """Where each active link ends: the other card's PCI bus id, or ``switch``."""
    ends = []
    for number in range(int(getattr(nvml, "NVML_NVLINK_MAX_LINKS", 18))):
        try:
            if not nvml.nvmlDeviceGetNvLinkState(handle, number):
                continue
            kind = nvml.nvmlDeviceGetNvLinkRemoteDeviceType(handle, number)
            if kind == nvml.NVML_NVLINK_DEVICE_TYPE_SWITCH:
                ends.append("switch")
            else:
                ends.append(_text(nvml.nvmlDeviceGetNvLinkRemotePciInfo(handle, number).busId))
        except nvml.NVMLError:
            continue
    return ends


def _nvlink_name(nvml: Any, handles: list[Any]) -> str:
    """By architecture: Volta has NVLink 2, Ampere 3, Hopper 4, Blackwell 5; workstation cards a bridge."""
    major, minor = min(nvml.nvmlDeviceGetCudaComputeCapability(handle) for handle in handles)
    by_major = {7: "nvlink2", 8: "nvlink3", 9: "nvlink4"}
    if (major, minor) in ((7, 5), (8, 6), (8, 9)):
        return "nvlink-bridge"
    return by_major.get(major, "nvlink5")


def _generation(nvml: Any, handle: Any) -> int:
    try:
        return int(nvml.nvmlDeviceGetMaxPcieLinkGeneration(handle))
    except nvml.NVMLError:
        return 3


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
