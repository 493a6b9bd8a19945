"""Helix's placement (Mei et al., ASPLOS'25): layer ranges of whole machines that let most tokens flow."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

from hexgen.scheduler.baselines.contract import Baseline, best_in_time, score
from hexgen.scheduler.baselines.helix_milp import Placement, best_ranges
from hexgen.scheduler.baselines.petals import petals_ranges
from hexgen.scheduler.baselines.placement import FILLS, Machines, Range, machines_of, max_flow, plans_of
from hexgen.scheduler.baselines.segments import segment_starts
from hexgen.scheduler.baselines.swarm import swarm_ranges
from hexgen.scheduler.task import Task

_PETALS = 4  # orders of joining that give a start
_PROGRAM_SHARE = 0.7  # of the time; the rest goes to judging what was found
_MOST_MACHINES = 96  # with more the program is not even built in the time
SECONDS = 30.0


def helix(task: Task, objective: str, seconds: float | None = SECONDS, given: Sequence[Baseline] = ()) -> Baseline:
    """The program's placement; of it and the placements it may start from, the one that serves most.

    Helix chooses by flow. That a larger flow need not serve more is what its objective leaves out, and is not held
    against it here: ``given``, Petals' and Swarm's results, count as its starts. Half the memory is left to keys
    and values (Helix's rule), less where the layers do not fit so. ``seconds``: None until the optimum is proven.
    """
    deadline = None if seconds is None else time.monotonic() + _PROGRAM_SHARE * seconds
    judging = None if seconds is None else (1 - _PROGRAM_SHARE) * seconds
    best = Baseline("Helix", None, "the machines' memory does not hold every layer once")
    for fill in FILLS:
        kinds = [(machines, starts) for machines in machines_of(task, fill) if (starts := _starts(task, machines))]
        for left, (machines, starts) in zip(range(len(kinds), 0, -1), kinds, strict=True):
            share = None if deadline is None else max(0.1, (deadline - time.monotonic()) / left)
            placement = _place(machines, starts[0], share)
            drafts = (plan for ranges in (placement.ranges, *starts) for plan in plans_of(task, machines, ranges))
            found = best_in_time(task, objective, "Helix", best.reason, drafts, judging)
            if _better(found, best, objective):
                note = "; ".join(filter(None, (_note(placement, share), found.note)))
                best = dataclasses.replace(found, note=note)
        if best.plan is not None:
            break
    for start in given:
        if _better(start, best, objective):
            note = "; ".join(
                filter(None, (f"the start from {start.name} serves more than what it finds", best.note))
            )
            best = dataclasses.replace(start, name="Helix", note=note)
    return best


def _better(one: Baseline, other: Baseline, objective: str) -> bool:
    if one.plan is None or other.plan is None:
        return one.plan is not None
    return score(one.plan, objective) > score(other.plan, objective)


def _starts(task: Task, machines: Machines) -> list[list[Range]]:
    """Placements by Swarm, Petals and segments that let anything through, the largest flow first."""
    candidates = [*segment_starts(machines)]
    candidates += [petals_ranges(machines, seed) for seed in range(task.seed, task.seed + _PETALS)]
    swarm = swarm_ranges(machines)
    if swarm is not None:
        candidates.append(swarm)
    flows = [max_flow(machines, ranges).tokens_s for ranges in candidates]
    order = sorted(range(len(candidates)), key=lambda n: (-flows[n], n))
    return [candidates[n] for n in order if flows[n] > 0]


def _place(machines: Machines, start: list[Range], seconds: float | None) -> Placement:
    if len(machines.groups) > _MOST_MACHINES:
        value = max_flow(machines, start).tokens_s
        text = f"{len(machines.groups)} machines are too many for the program: the heuristic it would start from"
        return Placement(tuple(start), value, value, False, text)
    return best_ranges(machines, start, seconds)


def _note(placement: Placement, share: float | None) -> str:
    flow = f"largest flow found {placement.tokens_s:,.0f} tokens/s"
    if placement.failed:
        return f"{flow}; {placement.failed}"
    if placement.proven:
        return f"{flow}, proven to be the most"
    gap = placement.bound_tokens_s / placement.tokens_s - 1
    return f"{flow}; program cut after {share:.0f} s, with up to {gap:.0%} more not ruled out"
