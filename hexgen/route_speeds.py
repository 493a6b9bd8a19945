"""How fast each route really is, against what the plan predicted; and the weights that follow from it.

A plan's weights are predicted capacities. A route's capacity shows only while it is full: then its output tokens a
second are what it can do, whereas an idle route's are what it was asked for. Each route's rate while full is
averaged over time, compared with its prediction, and the ratio scales its weight. Moving load from a full route
to one that is not is right whatever the reason; once both are full both are measured, and what slows all of them
alike (a workload of longer prompts) cancels out, since only the ratio of weights matters.

Plain data in, factors out; the clock is the caller's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

# The average forgets with this time constant, counted in seconds spent full: long against one request (seconds to
# tens of seconds), so that a run of long answers is no change of speed; short against a card that stays throttled.
AVERAGE_S = 60.0
# Not believed before this many seconds of being full: a few requests' worth.
LEAST_S = 10.0
# Differences below this are noise, of lengths above all: no weight moves for them.
NOISE = 0.10
# A moving weight ends this near its target; below NOISE, so that it does not stop where it would start again.
SETTLED = 0.02
# A second moves a weight by at most this: requests under way finish while the shares shift.
STEP_A_S = 0.05
# The most that a measurement can do: beyond, a route is broken rather than slow, which is no weight's matter.
MOST = 4.0


@dataclass(slots=True)
class _Measured:
    predicted: float | None  # output tokens/s when full
    weight: float  # by the plan
    last_s: float | None = None
    last_tokens: int = 0
    was_full: bool = False
    tokens: float = 0.0  # decayed sums: their ratio is the average
    seconds: float = 0.0
    factor: float = 1.0  # in force
    moving: bool = False


class RouteSpeeds:
    """``factor(route)`` scales a route's weight; 1 until it is known to differ."""

    def __init__(
        self, weights: Mapping[int, float], predicted_tokens_s: Mapping[int, float] | None = None
    ) -> None:
        """``weights``: the plan's. ``predicted_tokens_s``: of each route when it is full; where it is missing,
        the routes that were measured are only compared with each other."""
        known = predicted_tokens_s or {}
        self._routes = {route: _Measured(known.get(route), weight) for route, weight in weights.items()}

    def observe(self, route: int, now_s: float, output_tokens: int, full: bool) -> None:
        """What a route says of itself: tokens since its start, and whether it has all the work it can take."""
        state = self._routes[route]
        if state.last_s is not None and output_tokens >= state.last_tokens:
            elapsed_s = max(0.0, now_s - state.last_s)
            if full and state.was_full and elapsed_s > 0:
                kept = math.exp(-elapsed_s / AVERAGE_S)
                state.tokens = state.tokens * kept + (output_tokens - state.last_tokens)
                state.seconds = state.seconds * kept + elapsed_s
            self._move(state, elapsed_s)
        state.last_s, state.last_tokens, state.was_full = now_s, output_tokens, full

    def lost(self, route: int) -> None:
        """The route went down: what comes next is counted from its start."""
        state = self._routes[route]
        state.last_s, state.was_full = None, False

    def factor(self, route: int) -> float:
        return self._routes[route].factor

    def measured_tokens_s(self, route: int) -> float | None:
        """Output tokens/s of the route when full; None where that is not known."""
        state = self._routes[route]
        return state.tokens / state.seconds if state.seconds >= LEAST_S else None

    def _target(self, state: _Measured) -> float:
        if state.seconds < LEAST_S:
            return 1.0
        predicted = state.predicted or state.weight * self._tokens_s_a_weight()
        return min(MOST, max(1 / MOST, state.tokens / state.seconds / predicted)) if predicted > 0 else 1.0

    def _tokens_s_a_weight(self) -> float:
        known = [s for s in self._routes.values() if s.seconds >= LEAST_S]
        return sum(s.tokens / s.seconds for s in known) / sum(s.weight for s in known)

    def _move(self, state: _Measured, elapsed_s: float) -> None:
        away = math.log(self._target(state) / state.factor)
        if abs(away) > math.log1p(NOISE):
            state.moving = True
        if not state.moving:
            return
        step = min(abs(away), STEP_A_S * min(elapsed_s, 1.0))
        state.factor *= math.exp(math.copysign(step, away))
        state.moving = abs(away) - step > math.log1p(SETTLED)
