"""Device types of what was found: the catalogue's for GPUs, own ones for CPUs, equal for nodes that measure alike.

Two runs on equal machines differ by some per cent. Nodes whose figures all lie within `ALIKE` of each other become
one type: the planner works with types, and a table of times needs one entry for each.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from hexgen.catalogue import canonical_name, lookup
from hexgen.cluster import DeviceType
from hexgen.discover.records import Gpu, Speeds
from hexgen.discover.survey import Found
from hexgen.units import exact_bandwidth, exact_bytes, exact_flops, format_bytes

ALIKE = 1.2
# Of a datasheet's figures, what large operands reach on a healthy card (`hexgen.scheduler.figures` has lower
# shares, for real layers): used the other way round for a card that the catalogue does not know.
GPU_BANDWIDTH_SHARE = 0.88
GPU_COMPUTE_SHARE = 0.70
SLOW_SHARE = 0.7  # of what its type should reach: a card below it is taken for as slow as it was measured


@dataclass(frozen=True, slots=True)
class Kind:
    """A device type as the file has it; ``definition`` for `devices:` (None: the catalogue has it)."""

    name: str
    nodes: tuple[str, ...]
    definition: dict[str, str] | None
    comments: tuple[str, ...]
    speed: float | None = None  # of these nodes, where they fall behind their type


def significant(value: float, digits: int = 3) -> float:
    """``value`` rounded to so many digits: a measurement has no more."""
    return float(f"{value:.{digits}g}")


# ---- CPUs ------------------------------------------------------------------------------------------------------


def cpu_kinds(nodes: Sequence[Found]) -> list[Kind]:
    """Own types ``cpu-1``, ``cpu-2``, ... of measured CPU nodes, the fastest first."""
    measured = [(node, node.measured.speeds) for node in nodes if node.measured is not None]
    ordered = sorted(measured, key=lambda entry: (-entry[1].threads, -_pace(entry[1])))
    groups: list[list[tuple[Found, Speeds]]] = []
    for node, speeds in ordered:
        for group in groups:
            if all(same_cores(node, first) or alike(speeds, other) for first, other in group):
                group.append((node, speeds))
                break
        else:
            groups.append([(node, speeds)])
    groups.sort(key=lambda group: -_pace(group[0][1]))
    return [_cpu_kind(f"cpu-{i}", group) for i, group in enumerate(groups, 1)]


def same_cores(a: Found, b: Found) -> bool:
    """Nodes of one machine with equal quotas and threads compute alike, whatever load made of their figures."""
    if a.measured is None or b.measured is None or a.machine.boot_id != b.machine.boot_id:
        return False
    one, other = a.measured.speeds, b.measured.speeds
    if one.threads != other.threads or one.quota != other.quota:
        return False
    return one.quota is not None or 1 / ALIKE <= one.share / other.share <= ALIKE  # a quota that cannot be read


def alike(a: Speeds, b: Speeds) -> bool:
    if a.threads != b.threads:
        return False
    ratios = [a.bandwidth_bytes_s / b.bandwidth_bytes_s, a.flops["float32"] / b.flops["float32"]]
    return all(1 / ALIKE <= ratio <= ALIKE for ratio in ratios)


def _pace(speeds: Speeds) -> float:
    return math.sqrt(speeds.bandwidth_bytes_s * speeds.flops["float32"])


def _cpu_kind(name: str, group: Sequence[tuple[Found, Speeds]]) -> Kind:
    every = [speeds for _, speeds in group]
    one, threads = every[0], every[0].threads
    channels = min(threads, 4)  # as `hexgen.catalogue.scaled` multiplies them out again

    def mean(values: Sequence[float]) -> float:
        return math.exp(sum(math.log(value) for value in values) / len(values))

    bandwidth = significant(mean([s.bandwidth_bytes_s for s in every]) / channels)
    flops = {d: significant(mean([s.flops[d] for s in every]) / threads) for d in every[0].flops}
    copy, stream = (mean([getattr(s, f) for s in every]) for f in ("copy_bytes_s", "stream_bytes_s"))
    each = f"; divided by {threads} threads, which the planner multiplies out" if threads > 1 else ""
    clock = "wall time, best of two" if threads > 1 else "this thread's CPU time"
    clock += f" at {one.share:.2g} of a CPU, its control group's quota" if one.share < 1 else ""
    comments = [
        f"{name}: {', '.join(node.name for node, _ in group)}"
        + (f" (alike within {ALIKE - 1:.0%}; means of {len(group)})" if len(group) > 1 else ""),
        f"  bandwidth: measured, the better of copying ({format_bytes(copy)}/s read and written) and of reading",
        f"    weights in a matrix-vector product ({format_bytes(stream)}/s); {one.sizes}{each}",
        f"  fp32, bf16, fp16: measured, square matrix products in PyTorch with {threads} thread(s){each}",
        f"  all of it in {clock}",
        "  memory: a placeholder; each node's own figure stands with it",
    ]
    definition = {
        "memory": exact_bytes(4_000_000_000),
        "bandwidth": exact_bandwidth(bandwidth),
        "fp16": exact_flops(flops["float16"]),
        "bf16": exact_flops(flops["bfloat16"]),
        "fp32": exact_flops(flops["float32"]),
        "kind": "cpu",
    }
    return Kind(name, tuple(node.name for node, _ in group), definition, tuple(comments))


# ---- GPUs ------------------------------------------------------------------------------------------------------


def gpu_kind(node: Found) -> Kind:
    """The catalogue's type of the node's GPUs (all taken for the smallest), or one made of measurements."""
    gpu = min(node.machine.gpus[: node.gpus], key=lambda each: each.memory_bytes)
    speeds = node.measured.speeds if node.measured is not None else None
    known = canonical_name(gpu.name)
    if known is not None:
        return _known_gpu(node, lookup(gpu.name), speeds)
    return _unknown_gpu(node, gpu, speeds)


def _known_gpu(node: Found, device: DeviceType, speeds: Speeds | None) -> Kind:
    if speeds is None:
        return Kind(device.name, (node.name,), None, ())
    tensor = "bfloat16" if device.bf16_flops else "float16"
    bandwidth = speeds.bandwidth_bytes_s / device.bandwidth_bytes_s
    compute = speeds.flops[tensor] / device.flops(tensor)
    reached = min(bandwidth / GPU_BANDWIDTH_SHARE, compute / GPU_COMPUTE_SHARE)
    speed = significant(reached, 2) if reached < SLOW_SHARE else None
    comments = [
        f"{node.name}: {device.name} by the driver's name; speeds are the catalogue's (datasheet).",
        f"  measured: {format_bytes(speeds.bandwidth_bytes_s)}/s ({bandwidth:.0%} of the catalogue's),",
        f"  {speeds.flops[tensor] / 1e12:.0f} TFLOP/s in {tensor} ({compute:.0%}); {speeds.sizes}",
    ]
    if speed is not None:
        comments.append(f"  speed: {speed:g} of what this type usually reaches; hot, capped, or in use by others?")
    return Kind(device.name, (node.name,), None, tuple(comments), speed)


def _unknown_gpu(node: Found, gpu: Gpu, speeds: Speeds | None) -> Kind:
    from hexgen.errors import DeploymentError

    name = "-".join(gpu.name.removeprefix("NVIDIA ").split())
    if speeds is None:
        raise DeploymentError(
            f"the catalogue has no GPU {gpu.name!r}",
            where=node.name,
            remedy="measure it (without --no-measure), or describe it under `devices:` by hand",
        )
    flops = {dtype: significant(value / GPU_COMPUTE_SHARE) for dtype, value in speeds.flops.items()}
    definition = {
        "memory": exact_bytes(gpu.memory_bytes),
        "bandwidth": exact_bandwidth(significant(speeds.bandwidth_bytes_s / GPU_BANDWIDTH_SHARE)),
        "fp16": exact_flops(flops["float16"]),
        "bf16": exact_flops(flops["bfloat16"]),
        "fp32": exact_flops(flops["float32"]),
        **({"capability": gpu.capability} if gpu.capability else {}),
        "kind": "cuda",
    }
    comments = (
        f"{name}: not in the catalogue; what was measured, as a datasheet would have it:",
        f"  bandwidth: {format_bytes(speeds.bandwidth_bytes_s)}/s measured / {GPU_BANDWIDTH_SHARE:g}",
        f"  fp16, bf16, fp32: matrix products / {GPU_COMPUTE_SHARE:g}; {speeds.sizes}",
        "  memory, capability: as the driver says",
    )
    return Kind(name, (node.name,), definition, comments)


def unlike(node: Found) -> str | None:
    """A remark where one node has several kinds of GPU."""
    kinds = Counter(gpu.name for gpu in node.machine.gpus[: node.gpus])
    if len(kinds) < 2:
        return None
    have = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    return (
        f"{node.name} has unlike GPUs ({have}): all are taken for the smallest; for better plans run one "
        "`ray start` for each kind there, with CUDA_VISIBLE_DEVICES"
    )
