"""Known device types and the links inside a node.

Sizes and rates are the vendors' datasheet figures: memory as advertised (powers of 1000), bandwidth of the
memory, dense (not sparse) FLOP/s. fp16 and bf16 are the tensor units' rates with fp32 accumulation, which on
consumer cards is half of the advertised one; fp32 is the ordinary units' rate. Links: one direction, per device.

The ``cpu`` type is one thread of a 2.5 GHz server core as measured with PyTorch (matrix product 75 GFLOP/s in
float32, 20 in bfloat16, 7 in float16; a matrix-vector product streams 11 GB/s); a node's ``threads`` and ``speed``
scale it.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping

from hexgen.cluster_spec import DeviceType, Link
from hexgen.errors import SpecError

_GB = 1e9
_TFLOPS = 1e12


def _gpu(
    name: str,
    memory_gb: float,
    bandwidth_gb_s: float,
    fp16_tflops: float,
    fp32_tflops: float,
    capability: str,
) -> DeviceType:
    amd = capability.startswith("gfx")
    bf16 = amd or float(capability) >= 8.0  # Volta and Turing have no bfloat16 units
    return DeviceType(
        name=name,
        memory_bytes=round(memory_gb * _GB),
        bandwidth_bytes_s=bandwidth_gb_s * _GB,
        fp16_flops=fp16_tflops * _TFLOPS,
        bf16_flops=fp16_tflops * _TFLOPS if bf16 else 0.0,
        fp32_flops=fp32_tflops * _TFLOPS,
        capability=capability,
        kind="rocm" if amd else "cuda",
    )


_TYPES: tuple[tuple[DeviceType, str], ...] = (  # with the link that joins such devices in a node, unless told
    # data centre: Volta, Turing, Ampere
    (_gpu("V100-16G", 16, 900, 125, 15.7, "7.0"), "nvlink2"),
    (_gpu("V100-32G", 32, 900, 125, 15.7, "7.0"), "nvlink2"),
    (_gpu("T4", 16, 320, 65, 8.1, "7.5"), "pcie3"),
    (_gpu("A2", 16, 200, 18, 4.5, "8.6"), "pcie4"),
    (_gpu("A10", 24, 600, 125, 31.2, "8.6"), "pcie4"),
    (_gpu("A10G", 24, 600, 70, 35, "8.6"), "pcie4"),
    (_gpu("A30", 24, 933, 165, 10.3, "8.0"), "pcie4"),
    (_gpu("A40", 48, 696, 149.7, 37.4, "8.6"), "pcie4"),
    (_gpu("A100-40G-SXM", 40, 1555, 312, 19.5, "8.0"), "nvlink3"),
    (_gpu("A100-40G-PCIe", 40, 1555, 312, 19.5, "8.0"), "pcie4"),
    (_gpu("A100-80G-SXM", 80, 2039, 312, 19.5, "8.0"), "nvlink3"),
    (_gpu("A100-80G-PCIe", 80, 1935, 312, 19.5, "8.0"), "pcie4"),
    # data centre: Hopper, Ada, Blackwell
    (_gpu("H100-SXM", 80, 3350, 989, 67, "9.0"), "nvlink4"),
    (_gpu("H100-PCIe", 80, 2000, 756, 51, "9.0"), "pcie5"),
    (_gpu("H100-NVL", 94, 3900, 835, 60, "9.0"), "pcie5"),
    (_gpu("H200-SXM", 141, 4800, 989, 67, "9.0"), "nvlink4"),
    (_gpu("H20", 96, 4000, 148, 44, "9.0"), "nvlink4"),
    (_gpu("GH200", 96, 4000, 989, 67, "9.0"), "nvlink4"),
    (_gpu("L4", 24, 300, 121, 30.3, "8.9"), "pcie4"),
    (_gpu("L40", 48, 864, 181, 90.5, "8.9"), "pcie4"),
    (_gpu("L40S", 48, 864, 362, 91.6, "8.9"), "pcie4"),
    (_gpu("B200", 180, 8000, 2250, 75, "10.0"), "nvlink5"),
    # workstation
    (_gpu("RTX6000", 24, 672, 130.5, 16.3, "7.5"), "pcie3"),
    (_gpu("RTX8000", 48, 672, 130.5, 16.3, "7.5"), "pcie3"),
    (_gpu("TITAN-RTX", 24, 672, 130.5, 16.3, "7.5"), "pcie3"),
    (_gpu("A4000", 16, 448, 76.7, 19.2, "8.6"), "pcie4"),
    (_gpu("A4500", 20, 640, 94.6, 23.7, "8.6"), "pcie4"),
    (_gpu("A5000", 24, 768, 111, 27.8, "8.6"), "pcie4"),
    (_gpu("A6000", 48, 768, 154.8, 38.7, "8.6"), "pcie4"),
    (_gpu("RTX4000-Ada", 20, 360, 106.8, 26.7, "8.9"), "pcie4"),
    (_gpu("RTX5000-Ada", 32, 576, 261, 65.3, "8.9"), "pcie4"),
    (_gpu("RTX6000-Ada", 48, 960, 364, 91.1, "8.9"), "pcie4"),
    (_gpu("RTX-PRO-6000", 96, 1792, 503, 125, "12.0"), "pcie5"),
    # consumer: RTX 20
    (_gpu("RTX2060", 6, 336, 25.8, 6.5, "7.5"), "pcie3"),
    (_gpu("RTX2070", 8, 448, 29.9, 7.5, "7.5"), "pcie3"),
    (_gpu("RTX2080", 8, 448, 40.3, 10.1, "7.5"), "pcie3"),
    (_gpu("RTX2080Ti", 11, 616, 53.8, 13.4, "7.5"), "pcie3"),
    # consumer: RTX 30
    (_gpu("RTX3060", 12, 360, 25.5, 12.7, "8.6"), "pcie4"),
    (_gpu("RTX3070", 8, 448, 40.6, 20.3, "8.6"), "pcie4"),
    (_gpu("RTX3080", 10, 760, 59.5, 29.8, "8.6"), "pcie4"),
    (_gpu("RTX3080Ti", 12, 912, 68.2, 34.1, "8.6"), "pcie4"),
    (_gpu("RTX3090", 24, 936, 71, 35.6, "8.6"), "pcie4"),
    (_gpu("RTX3090Ti", 24, 1008, 80, 40, "8.6"), "pcie4"),
    # consumer: RTX 40
    (_gpu("RTX4060", 8, 272, 30.2, 15.1, "8.9"), "pcie4"),
    (_gpu("RTX4060Ti-16G", 16, 288, 44.1, 22.1, "8.9"), "pcie4"),
    (_gpu("RTX4070", 12, 504, 58.3, 29.1, "8.9"), "pcie4"),
    (_gpu("RTX4070Ti", 12, 504, 80.2, 40.1, "8.9"), "pcie4"),
    (_gpu("RTX4080", 16, 717, 97.5, 48.7, "8.9"), "pcie4"),
    (_gpu("RTX4090", 24, 1008, 165, 82.6, "8.9"), "pcie4"),
    # consumer: RTX 50
    (_gpu("RTX5060Ti-16G", 16, 448, 47.4, 23.7, "12.0"), "pcie5"),
    (_gpu("RTX5070", 12, 672, 61.7, 30.9, "12.0"), "pcie5"),
    (_gpu("RTX5070Ti", 16, 896, 87.9, 43.9, "12.0"), "pcie5"),
    (_gpu("RTX5080", 16, 960, 112.6, 56.3, "12.0"), "pcie5"),
    (_gpu("RTX5090", 32, 1792, 210, 104.8, "12.0"), "pcie5"),
    # AMD
    (_gpu("MI210", 64, 1638, 181, 22.6, "gfx90a"), "pcie4"),
    (_gpu("MI300X", 192, 5300, 1307, 163.4, "gfx942"), "xgmi"),
    (_gpu("MI325X", 256, 6000, 1307, 163.4, "gfx942"), "xgmi"),
    # a CPU worker with one thread; see the module's text
    (
        DeviceType(
            name="cpu",
            memory_bytes=round(4 * _GB),
            bandwidth_bytes_s=11 * _GB,
            fp16_flops=7e9,
            bf16_flops=20e9,
            fp32_flops=75e9,
            kind="cpu",
        ),
        "shm",
    ),
)

DEVICE_TYPES: Mapping[str, DeviceType] = {device.name: device for device, _ in _TYPES}

# Bandwidth after line coding; latency of one transfer as a collective sees it, launch included.
LINKS: Mapping[str, Link] = {
    "none": Link(6e9, 20e-6),  # no path between the devices: through host memory
    "pcie3": Link(15.75e9, 10e-6),
    "pcie4": Link(31.5e9, 10e-6),
    "pcie5": Link(63e9, 10e-6),
    "nvlink-bridge": Link(56.25e9, 5e-6),  # RTX 3090, A5000, A6000, A40 in pairs
    "nvlink2": Link(150e9, 5e-6),
    "nvlink3": Link(300e9, 5e-6),
    "nvlink4": Link(450e9, 5e-6),
    "nvlink5": Link(900e9, 5e-6),
    "xgmi": Link(448e9, 5e-6),
    "shm": Link(2e9, 100e-6),  # processes on one machine, over gloo's loopback sockets
}

DEFAULT_NETWORK = Link(1.25e9, 1e-3)  # between nodes of a file that names no link: 10 Gbit/s, 1 ms

_ALIASES: dict[str, str] = {
    "V100": "V100-16G",
    "V100-SXM2-16G": "V100-16G",
    "V100-SXM2-32G": "V100-32G",
    "V100-SXM3-32G": "V100-32G",
    "V100S-PCIe-32G": "V100-32G",
    "A100": "A100-40G-SXM",
    "A100-40G": "A100-40G-SXM",
    "A100-80G": "A100-80G-SXM",
    "A100-SXM": "A100-40G-SXM",
    "A100-SXM4-40G": "A100-40G-SXM",
    "A100-SXM4-80G": "A100-80G-SXM",
    "A100-PCIe": "A100-40G-PCIe",
    "A100-PCIe-40G": "A100-40G-PCIe",
    "A100-PCIe-80G": "A100-80G-PCIe",
    "H100": "H100-SXM",
    "H100-80G": "H100-SXM",
    "H100-80G-HBM3": "H100-SXM",
    "H100-SXM5": "H100-SXM",
    "H200": "H200-SXM",
    "H200-141G": "H200-SXM",
    "GH200-480G": "GH200",
    "RTX-A4000": "A4000",
    "RTX-A4500": "A4500",
    "RTX-A5000": "A5000",
    "RTX-A6000": "A6000",
    "Quadro-RTX-6000": "RTX6000",
    "Quadro-RTX-8000": "RTX8000",
    "RTX-4000-Ada-Generation": "RTX4000-Ada",
    "RTX-5000-Ada-Generation": "RTX5000-Ada",
    "RTX-6000-Ada-Generation": "RTX6000-Ada",
    "RTX-PRO-6000-Blackwell-Server-Edition": "RTX-PRO-6000",
    "RTX-PRO-6000-Blackwell-Workstation-Edition": "RTX-PRO-6000",
    "RTX4060Ti": "RTX4060Ti-16G",
    "RTX5060Ti": "RTX5060Ti-16G",
    "Instinct-MI210": "MI210",
    "Instinct-MI300X": "MI300X",
    "Instinct-MI325X": "MI325X",
    "host": "cpu",
}


def _key(name: str) -> str:
    """Names differ in vendor, spaces, dashes and case; what is left after those identifies a type."""
    text = re.sub(r"^(nvidia|amd|geforce|tesla|\s|-)+", "", name.strip().lower())
    return re.sub(r"(?<=\d)gb\b", "g", text).replace(" ", "").replace("-", "").replace("_", "")


_BY_KEY: dict[str, str] = {_key(name): name for name in DEVICE_TYPES}
_BY_KEY.update({_key(alias): name for alias, name in _ALIASES.items()})
_DEFAULT_LINKS: dict[str, str] = {device.name: link for device, link in _TYPES}


def canonical_name(name: str) -> str | None:
    """The catalogue's name of what ``name`` means (``"A100"``, ``"NVIDIA A100-SXM4-80GB"``), or None."""
    return _BY_KEY.get(_key(name))


def lookup(name: str, where: str | None = None) -> DeviceType:
    """The device type that ``name`` means; ``SpecError`` with the nearest known name where there is none."""
    canonical = canonical_name(name)
    if canonical is None:
        raise SpecError(f"unknown device type {name!r}", where=where, remedy=_suggestion(name))
    return DEVICE_TYPES[canonical]


def _suggestion(name: str) -> str:
    close = difflib.get_close_matches(_key(name), list(_BY_KEY), n=3, cutoff=0.5)
    names = list(dict.fromkeys(_BY_KEY[key] for key in close))
    own = "describe your own under `devices:`"
    return f"did you mean {' or '.join(names)}? or {own}" if names else own


def lookup_link(name: str, where: str | None = None) -> Link:
    if name not in LINKS:
        close = difflib.get_close_matches(name.lower(), list(LINKS), n=1)
        raise SpecError(
            f"unknown link {name!r}",
            where=where,
            remedy=(f"did you mean {close[0]}? " if close else "")
            + f"known: {', '.join(LINKS)}, or {{bandwidth: ..., latency: ...}}",
        )
    return LINKS[name]


def default_link_name(device: DeviceType) -> str:
    """The link that usually joins devices of this type in a node."""
    return _DEFAULT_LINKS.get(device.name, "shm" if device.kind == "cpu" else "pcie4")


def scaled(device: DeviceType, *, memory_bytes: int | None, speed: float, threads: int | None) -> DeviceType:
    """The type with a node's own figures applied.

    ``speed`` scales bandwidth and FLOP/s. A CPU device's ``threads`` scale its FLOP/s too, and its bandwidth as
    far as four of them: past that the memory channels are the limit.
    """
    cores = threads if device.kind == "cpu" and threads is not None else 1
    return dataclasses.replace(
        device,
        memory_bytes=device.memory_bytes if memory_bytes is None else memory_bytes,
        bandwidth_bytes_s=device.bandwidth_bytes_s * speed * min(cores, 4),
        fp16_flops=device.fp16_flops * speed * cores,
        bf16_flops=device.bf16_flops * speed * cores,
        fp32_flops=device.fp32_flops * speed * cores,
    )
