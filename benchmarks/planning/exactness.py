"""The engines against brute force over all plans of small clusters, through the public evaluator.

The brute force is the tests' own (`tests/test_scheduler_search.py`): every way to group, order and divide. The
clusters are drawn here by a seeded generator, of the kinds that the tests draw.
"""

from __future__ import annotations

import random
import sys
from dataclasses import asdict, dataclass

from hexgen.cluster import Cluster, Link, RegionLink
from hexgen.errors import InfeasibleError
from hexgen.scheduler import plan
from hexgen.scheduler.task import Engine
from planning.report import Grid, Report, number, ratio
from planning.settings import ROOT, Settings

sys.path.insert(0, str(ROOT / "tests"))

import scheduler_clusters as small
import test_scheduler_search as oracle

ENGINES: tuple[Engine, ...] = ("exact", "auto", "heuristic")
_NEAR = Link(1e9, 1e-4)
_EXACT = 1e-5


@dataclass(frozen=True, slots=True)
class Instance:
    """``ratios``: each engine's tokens/s over the best of all plans."""

    devices: int
    layers: int
    best_tokens_s: float
    ratios: dict[str, float]


def drawn(rng: random.Random, most_devices: int) -> Cluster:
    """A few nodes of CPU workers or GPUs of drawn memory and speed, in one or two regions."""
    kind = rng.choice(["cpu", "cuda"])
    left = rng.randint(1, most_devices)
    nodes = []
    while left > 0:
        count = rng.randint(1, left)
        memory, speed = round(rng.uniform(1.2, 6.0), 1), rng.choice([0.05, 0.1, 0.3])
        nodes.append((small.device_type(kind, memory, speed), count))
        left -= count
    return small.cluster_of(
        *nodes,
        link=rng.choice([_NEAR, Link(1e7, 2e-3), Link(1e6, 2e-2)]),
        inside=rng.choice([small.BUS, Link(300e9, 1e-6)]),
        regions=tuple(rng.choice(["east", "west"]) for _ in nodes),
        region_links=(RegionLink(("east", "east"), _NEAR), RegionLink(("west", "west"), _NEAR)),
    )


def compare(cluster: Cluster, layers: int) -> Instance | None:
    """None where no plan fits, and every engine says so. Where only brute force finds one, the ratio is 0."""
    model = small.tiny_model(layers)
    values = oracle.best_pipelines(cluster, model, "throughput")
    best = oracle.best_partition(values, frozenset(device.id for device in cluster.devices())) if values else 0.0
    ratios: dict[str, float] = {}
    for engine in ENGINES:
        try:
            made = plan(cluster, model, small.WORKLOAD, engine=engine, options=oracle.OPTIONS)
        except InfeasibleError:
            ratios[engine] = 0.0 if values else 1.0
            continue
        served = made.predicted.tokens_s if made.predicted else 0.0
        ratios[engine] = served / best if values else float("inf")
    if not values and all(value == 1.0 for value in ratios.values()):
        return None
    return Instance(len(cluster.devices()), layers, best, ratios)


def run(settings: Settings) -> Report:
    count, most_devices, most_layers = (6, 3, 4) if settings.quick else (150, 4, 6)
    rng = random.Random(0)
    found = [compare(drawn(rng, most_devices), rng.randint(1, most_layers)) for _ in range(count)]
    instances = [instance for instance in found if instance is not None]
    rows = []
    for engine in ENGINES:
        ratios = sorted(instance.ratios[engine] for instance in instances)
        exact = sum(abs(value - 1) <= _EXACT for value in ratios)
        rows.append(
            (
                engine,
                str(len(ratios)),
                str(exact),
                ratio(min(ratios, default=None)),
                number(sum(ratios) / len(ratios), 4) if ratios else "-",
                number(max(ratios, default=None), 4),
            )
        )
    title = f"Tokens/s over the best of all plans: up to {most_devices} devices, up to {most_layers} layers"
    grid = Grid(title, ("engine", "instances", "equal", "worst", "mean", "largest"), tuple(rows))
    above = [i for i in instances if max(i.ratios.values()) > 1 + _EXACT]
    short = [i for i in instances if i.ratios["exact"] < 1 - _EXACT]
    findings = [
        f"{count} drawn, of which {count - len(instances)} cannot hold the model, as every engine says.",
        f"Goal, the exact engine equals brute force: {'met' if not short else f'missed on {len(short)}'}.",
    ]
    if above:
        findings.append(f"{len(above)} plans are better than all that brute force looks at.")
    return Report("exact", (grid,), tuple(findings), {"instances": [asdict(instance) for instance in instances]})
