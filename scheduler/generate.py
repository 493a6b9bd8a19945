"""Clusters of any size, made up: for planning at scale. ``python -m hexgen.scheduler.generate --devices 1024``

The kinds of nodes and their proportions are those of Helix's high-heterogeneity cluster (ASPLOS 2025, section 6.5;
artifact: cluster42.ini): 42 nodes of seven kinds with 64 GPUs, 1 GB/s and 1 ms between nodes. Regions are joined
by 100 Mbit/s and 50 ms, as in Helix's distributed clusters. The same arguments give the same cluster.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hexgen import yamlfile
from hexgen.cluster import Cluster, parse_cluster
from hexgen.errors import HexgenError, SpecError
from hexgen.yamlfile import Inline

MAX_GENERATED = 4096
_NEAR = Inline(bandwidth="1GB/s", latency="1ms")
_FAR = Inline(bandwidth="100Mbps", latency="50ms")


@dataclass(frozen=True, slots=True)
class _Kind:
    """A kind of node, and how many of them 64 devices have."""

    name: str
    device: str
    count: int
    link: str | None
    nodes: int


_KINDS = (
    _Kind("a100", "A100", 1, None, 4),
    _Kind("v100", "V100-16G", 1, None, 6),
    _Kind("l4", "L4", 1, None, 8),
    _Kind("l4x2", "L4", 2, "pcie4", 4),
    _Kind("t4", "T4", 1, None, 10),
    _Kind("t4x2", "T4", 2, "pcie3", 6),
    _Kind("t4x4", "T4", 4, "pcie3", 4),
)
_MIX_DEVICES = sum(kind.count * kind.nodes for kind in _KINDS)


def generate(devices: int, regions: int | None = None, seed: int | None = None) -> Cluster:
    """A cluster of exactly ``devices`` devices; see ``cluster_dict``."""
    return parse_cluster(cluster_dict(devices, regions, seed), "generated cluster")


def cluster_dict(devices: int, regions: int | None = None, seed: int | None = None) -> dict[str, Any]:
    """As a cluster file has it. ``regions``: without, one for each 64 devices, which are divided evenly over them.

    Without a ``seed`` every region has Helix's mix, as closely as its number of devices allows; with one, each
    region's nodes are drawn at random in the same proportions. Raises ``SpecError``.
    """
    if not 1 <= devices <= MAX_GENERATED:
        raise SpecError(f"{devices} devices", where="--devices", remedy=f"from 1 to {MAX_GENERATED}")
    count = max(1, devices // _MIX_DEVICES) if regions is None else regions
    if not 1 <= count <= devices:
        raise SpecError(
            f"{count} regions for {devices} devices", where="--regions", remedy="at least a device each"
        )
    draw = None if seed is None else random.Random(seed)
    nodes: list[Inline] = []
    for region in range(count):
        share = devices * (region + 1) // count - devices * region // count
        mix = _regular(share) if draw is None else _drawn(share, draw)
        nodes += [_entry(kind, f"r{region}", mix[kind.name]) for kind in _KINDS if mix[kind.name]]
    links: dict[str, Any] = {"default": _FAR if count > 1 else _NEAR}
    if count > 1:
        links["regions"] = [Inline(within=f"r{region}", **_NEAR) for region in range(count)]
    return {
        "name": f"scale-{devices}",
        "nodes": nodes,
        "links": links,
        "model": "llama-2-70b",
        "workload": {
            "prompt_tokens": Inline(mean=763.1, max=2047),
            "output_tokens": Inline(mean=232.4, max=1000),
            "rate": "max",
        },
    }


def _entry(kind: _Kind, region: str, repeat: int) -> Inline:
    out = Inline(
        name=f"{kind.name}-{region}-$i", repeat=repeat, region=region, device=kind.device, count=kind.count
    )
    return out if kind.link is None else Inline(out, link=kind.link)


def _regular(devices: int) -> Counter[str]:
    """Whole mixes, then node after node of whichever kind is furthest behind its proportion and still fits."""
    mix = Counter({kind.name: kind.nodes * (devices // _MIX_DEVICES) for kind in _KINDS})
    left = devices % _MIX_DEVICES
    target = {kind.name: kind.nodes * devices / _MIX_DEVICES for kind in _KINDS}
    while left:
        fitting = [kind for kind in _KINDS if kind.count <= left]
        kind = max(fitting, key=lambda kind: target[kind.name] - mix[kind.name])
        mix[kind.name] += 1
        left -= kind.count
    return mix


def _drawn(devices: int, draw: random.Random) -> Counter[str]:
    mix: Counter[str] = Counter()
    left = devices
    while left:
        fitting = [kind for kind in _KINDS if kind.count <= left]
        kind = draw.choices(fitting, weights=[kind.nodes for kind in fitting])[0]
        mix[kind.name] += 1
        left -= kind.count
    return mix


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m hexgen.scheduler.generate", description=__doc__)
    parser.add_argument("--devices", type=int, required=True, help=f"how many, up to {MAX_GENERATED}")
    parser.add_argument("--regions", type=int, help="default: one for each 64 devices")
    parser.add_argument("--seed", type=int, help="draw each region's nodes at random (default: the published mix)")
    parser.add_argument("-o", "--output", type=Path, help="a file (default: standard output)")
    asked = parser.parse_args(arguments)
    try:
        value = cluster_dict(asked.devices, asked.regions, asked.seed)
        options = f"--devices {asked.devices}"
        options += "" if asked.regions is None else f" --regions {asked.regions}"
        options += "" if asked.seed is None else f" --seed {asked.seed}"
        text = yamlfile.write_yaml(
            value,
            f"Made up: python -m hexgen.scheduler.generate {options}\n"
            "The kinds of nodes of Helix's high-heterogeneity cluster (ASPLOS 2025, section 6.5) in its\n"
            "proportions, regions joined as in its distributed clusters.",
        )
        if asked.output is None:
            sys.stdout.write(text)
        else:
            asked.output.write_text(text, encoding="utf-8")
    except HexgenError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {asked.output}: cannot be written: {error.strerror}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
