"""Which shapes are worth a look: the quickest trip for each rate and each KV room, by dynamic programming.

At a given rate every range has a fixed cost in seconds of a decode's trip, and a range either holds the KV room
asked for and lets the rate through, or is out. So for one rate and one room the quickest shape is a shortest path
over layers, kind by kind. What a decode has ahead of it when it comes to a kind decides a part of its time there:
layouts are priced for several such beginnings. All rooms that a range can have are tried at rates around the best.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hexgen.scheduler.figures import KV_FILL
from hexgen.scheduler.lanes.kinds import Range, Shape, layouts
from hexgen.scheduler.lanes.model import SPREAD, Stop, StopTimes, stop_limit, stop_times
from hexgen.scheduler.lanes.ways import Space

_MOST_ROOMS = 24
_MOST_LAYOUTS = 512  # of one kind that are tried one by one on each beginning
Floats = npt.NDArray[np.float64]
# What a decode may bring along: costs between these points are interpolated, and beyond the last everybody waits.
_AHEAD: Floats = np.array([0.0, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0])


@dataclass(frozen=True, slots=True)
class Costs:
    """Of each layout of one kind, for each of `_AHEAD`: what a decode's trip takes there, and what it then brings
    along (``E`` of `hexgen.scheduler.lanes.model`). Both layouts x points.
    """

    trip: Floats
    ahead: Floats


def _between(values: Floats, at: npt.NDArray[np.int64], part: Floats) -> Floats:
    """Rows of ``values`` at ``part`` of the way from each point to the next."""
    return values[:, at] * (1 - part) + values[:, at + 1] * part


class Program:
    """Shortest paths over layers for one order of kinds."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self.layers = space.solver.cost.model.layers
        self.traffic = space.solver.traffic
        self.options = [
            layouts(i, len(kind.groups), kind.most_layers, self.layers) for i, kind in enumerate(space.kinds)
        ]
        ranges = sorted(
            {part for options in self.options for shape in options for part in shape},
            key=lambda part: (part.kind, part.layers, part.lanes),
        )
        self.ranges = ranges
        number = {part: i for i, part in enumerate(ranges)}
        self.room = np.array([self._room(part) for part in ranges], dtype=float)
        self.limit = np.array([stop_limit(self._stop(part), self.traffic) for part in ranges], dtype=float)
        self._limits: dict[Range, float] = {}
        self._costs: dict[float, list[Costs]] = {}  # by rate
        self._thin = np.array([*(1 / part.lanes for part in ranges), 1.0])
        self._stages, self._room_of, self._total_of = [], [], []
        for options in self.options:
            # Shorter layouts end in a range that costs nothing: the number after the last.
            stages = np.full((len(options), max(map(len, options), default=0)), len(ranges), dtype=np.int64)
            for row, shape in enumerate(options):
                stages[row, : len(shape)] = [number[part] for part in shape]
            self._stages.append(stages)
            self._room_of.append(np.array([min(self.room[number[p]] for p in shape) for shape in options]))
            self._total_of.append(np.array([sum(p.layers for p in shape) for shape in options], dtype=np.int64))

    def rooms(self) -> list[float]:
        """KV rooms (tokens) worth asking for: those that ranges have, thinned evenly where there are many."""
        found = sorted({float(room) for rooms in self._room_of for room in rooms if room > 0})
        least = self.traffic.peak_tokens
        found = [room for room in found if room >= least]
        if len(found) <= _MOST_ROOMS:
            return found
        steps = np.geomspace(found[0], found[-1], _MOST_ROOMS)
        return sorted({found[int(np.searchsorted(found, step * (1 - 1e-9)))] for step in steps})

    def limit_of(self, part: Range) -> float:
        """Requests/s of the whole plan that a range lets through; 0 where its machines cannot hold it."""
        if part not in self._limits:
            held = self._room(part) > 0
            self._limits[part] = stop_limit(self._stop(part), self.traffic) if held else 0.0
        return self._limits[part]

    def most_at_once(self, room: float) -> float:
        return KV_FILL * room / self.traffic.resident_tokens

    def shapes(self, order: Sequence[int], costs: Sequence[Costs]) -> Iterator[Shape]:
        """The quickest shape for each KV room at the rate of ``costs``; equal ones once."""
        seen: set[Shape] = set()
        for room in self.rooms():
            shape = self._quickest(order, room, costs)
            if shape is not None and shape not in seen:
                seen.add(shape)
                yield shape

    def costs(self, requests_s: float) -> list[Costs]:
        """What each kind's layouts cost at this rate, in the same order for `shapes`."""
        if requests_s not in self._costs:
            self._costs[requests_s] = self._priced(requests_s)
        return self._costs[requests_s]

    def _priced(self, requests_s: float) -> list[Costs]:
        hop = min(self._hops(), default=0.0)
        times = [
            stop_times(self._stop(part), self.traffic, requests_s) if limit >= requests_s else None
            for part, limit in zip(self.ranges, self.limit, strict=True)
        ]
        known = np.array(
            [
                (t.decode_s + t.wait_s + hop, t.prompt_s, t.ahead)
                if t is not None and math.isfinite(t.decode_s)
                else (np.inf, 0.0, 0.0)
                for t in [*times, StopTimes(-hop, 0.0, 0.0, 0.0)]
            ]
        )
        own, prompts, adds = known.T
        out: list[Costs] = []
        for stages in self._stages:
            ahead = np.tile(_AHEAD, (len(stages), 1))
            trip = np.zeros_like(ahead)
            for i, stage in enumerate(stages.T):
                # Dealt out anew among the range's lanes, a decode keeps one in so many of the prompts before it.
                if i == 0 or self.space.merges:
                    ahead *= self._thin[stage][:, None]
                behind = 1 - np.exp(-SPREAD * (ahead + adds[stage][:, None] / 2))
                trip += own[stage][:, None] + prompts[stage][:, None] * behind
                ahead += adds[stage][:, None]
            out.append(Costs(trip, ahead))
        return out

    def _hops(self) -> Iterator[float]:
        solver = self.space.solver
        for kind in self.space.kinds:
            for other in self.space.kinds:
                link = solver.topology.link(kind.groups[-1].place, other.groups[0].place)
                edge = solver.cost.edge(kind.profile, other.profile, link)
                yield edge.delay_s + edge.token_s

    def _quickest(
        self,
        order: Sequence[int],
        room: float,
        costs: Sequence[Costs],
    ) -> Shape | None:
        """One label a number of layers: the quickest way there, and what it brings along."""
        end = self.layers + 1
        trip = np.full(end, np.inf)
        trip[0] = 0.0
        ahead = np.zeros(end)
        chosen: list[npt.NDArray[np.int64]] = []
        for kind in order:
            cost, totals = costs[kind], self._total_of[kind]
            labels = np.flatnonzero(np.isfinite(trip))
            at = np.clip(np.searchsorted(_AHEAD, ahead[labels], side="right") - 1, 0, len(_AHEAD) - 2)
            part = np.clip((ahead[labels] - _AHEAD[at]) / (_AHEAD[at + 1] - _AHEAD[at]), 0.0, 1.0)
            usable = np.flatnonzero((self._room_of[kind] >= room) & np.isfinite(cost.trip[:, 0]))
            if len(usable) > _MOST_LAYOUTS:
                # Of those of as many layers, the quickest for a typical beginning.
                ranked = usable[np.lexsort((cost.trip[usable, int(np.median(at))], totals[usable]))]
                usable = ranked[np.unique(totals[ranked], return_index=True)[1]]
            picks = np.full(end, -1)
            if len(usable):
                goal = totals[usable][:, None] + labels[None, :]
                rows, columns = np.nonzero(goal < end)
                found, brings = np.full((len(usable), end), np.inf), np.zeros((len(usable), end))
                ends = goal[rows, columns]
                taken = trip[labels][None, :] + _between(cost.trip[usable], at, part)
                found[rows, ends] = taken[rows, columns]
                brings[rows, ends] = _between(cost.ahead[usable], at, part)[rows, columns]
                first, every = found.argmin(axis=0), np.arange(end)
                better = found[first, every] < trip
                picks[better] = usable[first][better]
                trip = np.where(better, found[first, every], trip)
                ahead = np.where(better, brings[first, every], ahead)
            chosen.append(picks)
        if not math.isfinite(trip[self.layers]):
            return None
        left = self.layers
        parts: list[tuple[Range, ...]] = []
        for kind, picks in zip(reversed(order), reversed(chosen), strict=True):
            pick = int(picks[left])
            if pick >= 0:
                parts.append(self.options[kind][pick])
                left -= int(self._total_of[kind][pick])
        return tuple(part for shape in reversed(parts) for part in shape)

    def _room(self, part: Range) -> int:
        return part.lanes * self.space.kinds[part.kind].profile.kv_tokens(part.layers, False, False)

    def _stop(self, part: Range) -> Stop:
        return Stop(self.space.kinds[part.kind].profile, part.layers, False, False, 1 / part.lanes)
