"""Which shapes are worth a look: the quickest trip for each rate and each KV room, by dynamic programming.

At a given rate every range has a fixed cost in seconds of a decode's trip, and a range either holds the KV room
asked for and lets the rate through, or is out. So for one rate and one room the quickest shape is a shortest path
over layers, kind by kind. All rooms that a range can have are tried at rates around the best one found.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hexgen.scheduler.figures import KV_FILL
from hexgen.scheduler.lanes.kinds import Range, Shape, layouts
from hexgen.scheduler.lanes.model import Stop, stop_limit, stop_times
from hexgen.scheduler.lanes.ways import Space

_MOST_ROOMS = 40
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _Costs:
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
        self.members = [[[number[part] for part in shape] for shape in options] for options in self.options]
        self._room_of = [np.array([min(self.room[i] for i in m) for m in members]) for members in self.members]
        self._total_of = [np.array([sum(p.layers for p in shape) for shape in o]) for o in self.options]

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

    def shapes(self, order: Sequence[int], requests_s: float) -> Iterator[Shape]:
        """The quickest shape for each KV room at this rate; equal ones once."""
        costs = self._costs(requests_s)
        seen: set[Shape] = set()
        for room in self.rooms():
            shape = self._quickest(order, room, costs)
            if shape is not None and shape not in seen:
                seen.add(shape)
                yield shape

    def _costs(self, requests_s: float) -> list[_Costs]:
        hop = min(self._hops(), default=0.0)
        times = [
            stop_times(self._stop(part), self.traffic, requests_s) if limit >= requests_s else None
            for part, limit in zip(self.ranges, self.limit, strict=True)
        ]
        out: list[_Costs] = []
        for shapes, members in zip(self.options, self.members, strict=True):
            rows: list[tuple[float, float, float, float, float]] = []
            for shape, numbers in zip(shapes, members, strict=True):
                base = prompts = passed = ahead = 0.0
                for i in numbers:
                    found = times[i]
                    if found is None or not math.isfinite(found.decode_s):
                        base = math.inf
                        break
                    base += found.decode_s + found.wait_s + hop
                    prompts += found.prompt_s
                    passed += found.prompt_s * math.exp(-(ahead + found.ahead / 2))
                    ahead += found.ahead
                rows.append((base, prompts, passed, ahead, 1 / shape[0].lanes))
            table = np.array(rows, dtype=float).reshape(len(rows), 5)
            out.append(_Costs(*table.T))
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
        costs: Sequence[_Costs],
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
            best: dict[int, int] = {}  # of the layouts of as many layers: the quickest for a typical beginning
            for i in np.flatnonzero(fits).tolist():
                total = int(self._total_of[kind][i])
                if total not in best or value[i] < value[best[total]]:
                    best[total] = i
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
