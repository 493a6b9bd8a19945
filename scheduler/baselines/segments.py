"""A start for Helix's program: layers cut into segments, each held by machines of one class and place alone.

The program's first solutions decide what a solver without hours finds, and Petals' and Swarm's let little through
where machines differ. Here, for a flow F, each of m equal machines that share a segment carries F/m, so that the
segment may be as long as their throughput allows; how a class's machines are best put together to cover most
layers is an unbounded knapsack, and the largest F whose layers suffice is found by bisection. Links are not looked
at (the flow through the result counts them). This start is ours, not Helix's: it makes the baseline stronger.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hexgen.scheduler.baselines.helix_milp import compute_bound
from hexgen.scheduler.baselines.placement import Machines, Range

_STEPS = 40  # of bisection


@dataclass(frozen=True, slots=True)
class _Segment:
    members: tuple[int, ...]
    layers: int


def segment_starts(machines: Machines) -> list[list[Range]]:
    """Ranges by segments through all machines, and within each area that holds the model by itself."""
    everything = _ranges(machines, range(len(machines.groups)))
    found = [everything] if everything is not None else []
    areas: dict[str, list[int]] = {}
    for i, group in enumerate(machines.groups):
        areas.setdefault(machines.solver.topology.areas[group.place], []).append(i)
    if len(areas) > 1:
        parts = [ranges for members in areas.values() if (ranges := _ranges(machines, members)) is not None]
        if parts:
            found.append([max(choices) for choices in zip(*parts, strict=True)])  # (0, 0) but in its own area
    return found


def _ranges(machines: Machines, members: Sequence[int]) -> list[Range] | None:
    low, high = 0.0, compute_bound(machines)
    best = None
    for _ in range(_STEPS):
        flow = (low + high) / 2
        segments = _cover(machines, members, flow)
        if segments is None:
            high = flow
        else:
            low, best = flow, segments
    if best is None:
        return None
    ranges: list[Range] = [(0, 0)] * len(machines.groups)
    start = 0
    for segment in best:
        for i in segment.members:
            ranges[i] = (start, start + segment.layers)
        start += segment.layers
    return ranges


def _cover(machines: Machines, members: Sequence[int], flow: float) -> list[_Segment] | None:
    """Segments that cover every layer exactly once and let ``flow`` through; None where they do not reach."""
    classes: dict[tuple[str, int], list[int]] = {}
    for i in members:
        group = machines.groups[i]
        profile = machines.solver.cost.profile(group.shape)
        classes.setdefault((machines.solver.topology.areas[group.place], profile.id), []).append(i)
    segments: list[_Segment] = []
    for equal in classes.values():
        segments.extend(_of_class(machines, equal, flow))
    segments = [s for s in segments if s.layers > 0]
    if not segments:
        return None
    left = sum(segment.layers for segment in segments) - machines.layers
    limits = [segment.layers for segment in segments]
    limits[0] = min(limits[0], machines.most_layers(segments[0].members[0], True, len(segments) == 1))
    limits[-1] = min(limits[-1], machines.most_layers(segments[-1].members[0], len(segments) == 1, True))
    left -= sum(s.layers for s in segments) - sum(limits)
    if left < 0:
        return None
    # What is too much comes off the longest, layer by layer; a segment may vanish.
    while left > 0:
        n = max(range(len(limits)), key=lambda n: (limits[n], -n))
        limits[n] -= 1
        left -= 1
    found = [_Segment(s.members, n) for s, n in zip(segments, limits, strict=True) if n > 0]
    alone = len(found) == 1  # others may have vanished, and left the ends to segments that were in the middle
    first, last = found[0], found[-1]
    fits = first.layers <= machines.most_layers(first.members[0], True, alone)
    return found if fits and last.layers <= machines.most_layers(last.members[0], alone, True) else None


def _of_class(machines: Machines, equal: Sequence[int], flow: float) -> list[_Segment]:
    """The segments of one class that together cover most layers."""
    count = len(equal)
    most = machines.most_layers(equal[0], False, False)
    lengths = [0] * (count + 1)  # of a segment that m machines share
    for m in range(1, count + 1):
        fitting = (n for n in range(most, 0, -1) if machines.tokens_s(equal[0], n) * m >= flow)
        lengths[m] = next(fitting, 0)
    covered, chosen = [0] * (count + 1), [0] * (count + 1)
    for n in range(1, count + 1):
        covered[n], chosen[n] = max((lengths[m] + covered[n - m], m) for m in range(1, n + 1))
    segments: list[_Segment] = []
    left = count
    while left > 0:
        m = chosen[left]
        segments.append(_Segment(tuple(equal[left - m : left]), lengths[m]))
        left -= m
    return segments
