"""Which shapes are worth a look: the quickest trip for each rate and each KV room, by dynamic programming.

At a given rate every range has a fixed cost in seconds of a decode's trip, and a range either holds the KV room
asked for and lets the rate through, or is out. So for one rate and one room the quickest shape is a shortest path
over layers, kind by kind. All rooms that a range can have are tried at rates around the best one found.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import numpy.typing as npt

from hexgen.scheduler.figures import KV_FILL
from hexgen.scheduler.lanes.kinds import Range, Shape, layouts
from hexgen.scheduler.lanes.model import Stop, stop_limit, stop_times
from hexgen.scheduler.lanes.ways import Space

_MOST_ROOMS = 24
_RUNS = 3  # of equal ranges, that a layout consists of
_SMALL = 1e-9
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Costs:
    """Of each layout of one kind. A decode's trip takes ``base + prompts - exp(-E) passed`` seconds there, where
    E is what it brings along (`hexgen.scheduler.lanes.model`), thinned to the layout's ``share``; to that it adds
    ``ahead``.
    """

    base: Floats
    prompts: Floats
    passed: Floats
    ahead: Floats
    share: Floats


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
        self._runs, self._counts, self._shares, self._room_of, self._total_of = [], [], [], [], []
        for options in self.options:
            runs = np.zeros((len(options), _RUNS), dtype=np.int64)
            counts = np.zeros((len(options), _RUNS), dtype=np.int64)
            for row, shape in enumerate(options):
                for slot, (part, same) in enumerate(groupby(shape)):
                    runs[row, slot], counts[row, slot] = number[part], len(list(same))
            self._runs.append(runs)
            self._counts.append(counts)
            self._shares.append(np.array([1 / shape[0].lanes for shape in options]))
            rooms = np.where(counts > 0, self.room[runs], np.inf)
            self._room_of.append(rooms.min(axis=1) if len(options) else np.zeros(0))
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
        hop = min(self._hops(), default=0.0)
        times = [
            stop_times(self._stop(part), self.traffic, requests_s) if limit >= requests_s else None
            for part, limit in zip(self.ranges, self.limit, strict=True)
        ]
        out: list[Costs] = []
        known = np.array(
            [
                (t.decode_s + t.wait_s + hop, t.prompt_s, t.ahead)
                if t is not None and math.isfinite(t.decode_s)
                else (np.inf, 0.0, 0.0)
                for t in times
            ]
        ).reshape(len(times), 3)
        for runs, counts, share in zip(self._runs, self._counts, self._shares, strict=True):
            base, prompts, passed, ahead = (np.zeros(len(share)) for _ in range(4))
            for slot in range(runs.shape[1]):
                number = counts[:, slot]
                own, prompt, adds = (known[runs[:, slot], column] for column in range(3))
                base += number * np.where(number > 0, own, 0.0)
                prompts += number * prompt
                # Of the stages of a run, the k-th is met with exp(-(ahead + (k + 1/2) adds)): a geometric series.
                ratio = np.exp(-adds)
                series = np.where(adds > _SMALL, (1 - ratio**number) / np.maximum(1 - ratio, _SMALL), number)
                passed += prompt * np.exp(-(ahead + adds / 2)) * series
                ahead += number * adds
            out.append(Costs(base, prompts, passed, ahead, share))
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
        end = self.layers + 1
        trip = np.full(end, np.inf)
        trip[0] = 0.0
        ahead, share = np.zeros(end), np.ones(end)
        chosen: list[npt.NDArray[np.int64]] = []
        for kind in order:
            cost = costs[kind]
            fits = (self._room_of[kind] >= room) & np.isfinite(cost.base)
            typical = math.exp(-float(ahead[np.isfinite(trip)].mean()))
            value = cost.base + cost.prompts - typical * cost.passed
            # Of the layouts of as many layers: the quickest for a typical beginning.
            usable = np.flatnonzero(fits)
            totals = self._total_of[kind][usable]
            ranked = usable[np.lexsort((value[usable], totals))]
            firsts = np.unique(self._total_of[kind][ranked], return_index=True)
            best = dict(zip(firsts[0].tolist(), ranked[firsts[1]].tolist(), strict=True))
            new_trip, new_ahead, new_share = trip.copy(), ahead.copy(), share.copy()
            picks = np.full(end, -1)
            for total, i in best.items():
                kept = ahead[: end - total] * np.minimum(1.0, cost.share[i] / share[: end - total])
                found = trip[: end - total] + cost.base[i] + cost.prompts[i] - np.exp(-kept) * cost.passed[i]
                better = found < new_trip[total:]
                new_trip[total:][better] = found[better]
                new_ahead[total:][better] = kept[better] + cost.ahead[i]
                new_share[total:][better] = cost.share[i]
                picks[total:][better] = i
            trip, ahead, share = new_trip, new_ahead, new_share
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
