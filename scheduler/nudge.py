"""Layers moved back towards where they were, as far as the plan serves as much: fewer bytes to load.

A stage whose layers began at 20 and now begin at 18 loads two layers that its neighbour may as well keep. Each
boundary between stages is tried where the old plan had one, and one layer to either side, as long as bytes fall.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from hexgen.model import ModelSpec
from hexgen.plan import Hop, Plan, Route, Stage
from hexgen.scheduler.moves import Holding, common_bytes, held_by
from hexgen.scheduler.repair import as_written
from hexgen.scheduler.solver import RouteSolver

_ROUNDS = 8


def nudged(plan: Plan, held: dict[str, Holding], solver: RouteSolver, slack: float) -> Plan:
    """The plan with fewer bytes to load; no route loses more than ``slack`` (relative) of its value.

    Only plans whose routes share no stage are changed.
    """
    hops = [hop.stage for route in plan.routes for hop in route.path]
    if len(set(hops)) != len(hops) or slack <= 0:
        return plan
    stages = {stage.name: stage for stage in plan.stages}
    for route in plan.routes:
        moved = _nudged_route([stages[hop.stage] for hop in route.path], held, solver, slack)
        stages.update({stage.name: stage for stage in moved})
    return dataclasses.replace(
        plan,
        stages=tuple(stages[stage.name] for stage in plan.stages),
        routes=tuple(
            Route(
                tuple(Hop(hop.stage, stages[hop.stage].layers) for hop in route.path),
                route.weight,
                route.kv_tokens,
            )
            for route in plan.routes
        ),
    )


def _nudged_route(
    members: list[Stage], held: dict[str, Holding], solver: RouteSolver, slack: float
) -> list[Stage]:
    base = as_written(solver, members)
    if base is None:
        return members
    least = base.value - slack * abs(base.value)
    model, dtype = solver.cost.model, solver.cost.dtype

    def loads(pair: Sequence[Stage], at: int) -> int:
        """Bytes that two neighbours, from place ``at`` on, must load."""
        last = len(members) - 1
        wanted = [held_by(stage, model, dtype, at + i == 0, at + i == last) for i, stage in enumerate(pair)]
        return sum(_missing(model, held, wants) for wants in wanted)

    for _ in range(_ROUNDS):
        before = list(members)
        for i in range(len(members) - 1):
            now = loads(members[i : i + 2], i)
            options = [_cut_at(members, i, cut) for cut in _cuts(members, i, held)]
            for bytes_, pair in sorted(((loads(pair, i), pair) for pair in options), key=lambda o: o[0]):
                if bytes_ >= now:
                    break
                trial = [*members[:i], *pair, *members[i + 2 :]]
                found = as_written(solver, trial)
                if found is not None and found.value >= least:
                    members = trial
                    break
        if members == before:
            break
    return members


def _missing(model: ModelSpec, held: dict[str, Holding], wanted: dict[str, Holding]) -> int:
    return sum(
        common_bytes(model, wants, wants) - common_bytes(model, held.get(device), wants)
        for device, wants in wanted.items()
    )


def _cuts(members: Sequence[Stage], i: int, held: dict[str, Holding]) -> list[int]:
    """Where the boundary after stage ``i`` could be: where the old plan had one, or a layer further."""
    first, now, end = members[i].layers[0], members[i].layers[1], members[i + 1].layers[1]
    devices = (*members[i].devices, *members[i + 1].devices)
    places = {edge for device in devices if device in held for edge in held[device].layers}
    return sorted(cut for cut in places | {now - 1, now + 1} if first < cut < end and cut != now)


def _cut_at(members: Sequence[Stage], i: int, cut: int) -> tuple[Stage, Stage]:
    a, b = members[i], members[i + 1]
    return dataclasses.replace(a, layers=(a.layers[0], cut)), dataclasses.replace(b, layers=(cut, b.layers[1]))
