"""What a decode step costs as the batch grows, and what this machine's memory allows."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch

from peers.ours import Engine


@dataclass(frozen=True, slots=True)
class StepCost:
    """Medians over the rounds of one decode step of the first rank."""

    batch: int
    step_s: float  # on the wall, as a client sees it
    model_s: float  # layers, embedding, output head
    host_s: float  # batching, headers, page tables, sampling, answering


@dataclass(frozen=True, slots=True)
class StageCost:
    """Means of a step of one stage of a pipeline while it works at its fullest."""

    stage: str
    model_s: float
    transfer_s: float  # passing on, until the kernel has it
    host_s: float
    idle_s: float  # nothing to do: what the other stage has not sent yet


def stage_costs(engine: Engine, prompts: list[list[int]], tokens: int, rounds: int) -> list[StageCost]:
    before = engine.reports()
    for _ in range(rounds):
        engine.generate(prompts, tokens)
    costs = []
    for name, after in engine.reports().items():
        steps = after.steps - before[name].steps
        spent = {kind: (s - before[name].seconds[kind]) / steps for kind, s in after.seconds.items()}
        costs.append(StageCost(name, spent["compute"], spent["transfer"], spent["host"], spent["wait"]))
    return costs


def step_costs(
    engine: Engine, prompts: list[list[int]], batches: list[int], tokens: int, rounds: int
) -> list[StepCost]:
    """Batches interleaved. What ``tokens`` tokens take more than one token takes is the decode steps'."""
    found: dict[int, list[tuple[float, float, float]]] = {batch: [] for batch in batches}
    for _ in range(rounds):
        for batch in batches:
            least, all_ = (_costs(engine, prompts[:batch], n) for n in (1, tokens))
            wall, model, host = ((b - a) / (tokens - 1) for a, b in zip(least, all_, strict=True))
            found[batch].append((wall, model, host))
    return [StepCost(batch, *map(statistics.median, zip(*rows, strict=True))) for batch, rows in found.items()]


def _costs(engine: Engine, prompts: list[list[int]], tokens: int) -> tuple[float, float, float]:
    before, began = next(iter(engine.reports().values())).seconds, time.perf_counter()
    engine.generate(prompts, tokens)
    wall = time.perf_counter() - began
    after = next(iter(engine.reports().values())).seconds
    return wall, after["compute"] - before["compute"], after["host"] - before["host"]


def read_gb_s(threads: int, rounds: int = 9) -> float:
    """What ``threads`` threads read from memory at best, by a sum that does little else."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    values = torch.ones(64 * 2**20)
    least = float("inf")
    for _ in range(rounds):
        began = time.perf_counter()
        values.sum()
        least = min(least, time.perf_counter() - began)
    torch.set_num_threads(before)
    return values.nbytes / least / 1e9
