"""What would help: the next best changes to the cluster, each priced by a quick re-plan."""

from __future__ import annotations

import time
from dataclasses import replace

from hexgen.scheduler.explain.changes import Candidate, candidates
from hexgen.scheduler.explain.facts import Bottleneck, Change, DeviceUse, LinkUse, WhatIf
from hexgen.scheduler.explain.quick import Replanner
from hexgen.scheduler.explain.value import value_of

DEFAULT_BUDGET_S = 5.0
WORTH = 0.01  # gains below are summed up


def what_if(
    replanner: Replanner,
    used: tuple[DeviceUse, ...],
    links: tuple[LinkUse, ...],
    bottleneck: Bottleneck,
    budget_s: float,
) -> WhatIf:
    """Priced within about ``budget_s`` seconds: what comes late, or was cut short, is named in ``untried``.

    Both sides of a gain come from the same quick search, so that what it finds beyond the plan is not taken for an
    effect of the change; that surplus itself is ``missed``.
    """
    deadline = time.monotonic() + budget_s
    replanner = replace(replanner, deadline=deadline)
    cluster, own = replanner.task.cluster, value_of(replanner.plan, replanner.objective)
    base = max(own, replanner.value(cluster) or 0.0)
    changes: list[Change] = []
    untried: list[str] = []
    for candidate in candidates(cluster, used, links, bottleneck, chosen=replanner.chosen):
        smaller: Candidate | None = candidate
        while smaller is not None:
            change = _priced(replanner, smaller, base) if time.monotonic() < deadline else None
            if change is None or time.monotonic() > deadline:
                untried.append(smaller.text)
                break
            changes.append(change)
            smaller = smaller.then if (change.gain or 0.0) >= WORTH else None
    ordered = sorted(changes, key=lambda change: -(change.gain if change.gain is not None else -1.0))
    return WhatIf(base, tuple(ordered), tuple(untried), base / own - 1 if base > own * (1 + WORTH / 10) else 0.0)


def _priced(replanner: Replanner, candidate: Candidate, base: float) -> Change:
    value = replanner.value(candidate.cluster, candidate.nodes if candidate.kind == "add node" else ())
    return Change(
        kind=candidate.kind,
        text=candidate.text,
        nodes=candidate.nodes,
        value=value,
        gain=None if value is None else value / base - 1,
        price_usd_h=candidate.price_usd_h,
        alike=candidate.alike,
    )
