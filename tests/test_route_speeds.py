"""Routes that are faster or slower than predicted: which weights follow, and how fast."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from hexgen.route_speeds import LEAST_S, MOST, STEP_A_S, RouteSpeeds
from hexgen.routing import Need, Router, RouteState

OUTPUT = 20  # tokens of an answer
SLOTS = 8  # sequences at once


class Routes:
    """A small cluster in steps of 0.1 s: a route's running sequences share its tokens/s, each at most its own."""

    def __init__(self, real_tokens_s: list[float], predicted_tokens_s: list[float] | None, seed: int = 0) -> None:
        weights = predicted_tokens_s or [1.0] * len(real_tokens_s)
        self.router = Router(
            RouteState(i, w, 4096, 10_000, 16, SLOTS, free_pages=10_000) for i, w in enumerate(weights)
        )
        known = None if predicted_tokens_s is None else dict(enumerate(predicted_tokens_s))
        self.speeds = RouteSpeeds(dict(enumerate(weights)), known)
        self.real = list(real_tokens_s)
        self.work: list[list[float]] = [[] for _ in real_tokens_s]  # tokens left of each running sequence
        self.done = [0.0] * len(real_tokens_s)
        self.waiting = 0
        self.now_s = 0.0
        self.random = random.Random(seed)

    def run(self, seconds: float, requests_s: float) -> Counter[int]:
        chosen: Counter[int] = Counter()
        for _ in range(round(seconds * 10)):
            self.now_s += 0.1
            self.waiting += sum(self.random.random() < requests_s / 100 for _ in range(10))
            while self.waiting and (route := self.router.choose(Need(16))) is not None:
                self.waiting -= 1
                chosen[route] += 1
                self.work[route].append(self.random.uniform(0.5, 1.5) * OUTPUT)
                self.router.routes[route].outstanding += 1
            for route, work in enumerate(self.work):
                self._step(route, work)
        return chosen

    def _step(self, route: int, work: list[float]) -> None:
        each = min(self.real[route] * 0.1 / max(1, len(work)), self.real[route] * 0.1 / 4)
        self.done[route] += sum(min(each, left) for left in work)
        work[:] = [left - each for left in work if left > each]
        state = self.router.routes[route]
        state.outstanding = len(work)
        self.speeds.observe(route, self.now_s, int(self.done[route]), state.full)
        state.speed = self.speeds.factor(route)


def shares(chosen: Counter[int]) -> list[float]:
    return [chosen[i] / chosen.total() for i in sorted(chosen)]


def test_a_route_at_half_its_predicted_speed_ends_with_half_the_share() -> None:
    routes = Routes(real_tokens_s=[50, 100], predicted_tokens_s=[100, 100])
    demand = 130 / OUTPUT  # of 150 that there are: by the plan's weights the slow route would drown
    assert shares(routes.run(100, 1))[0] == pytest.approx(0.5, abs=0.02)
    routes.run(300, demand)
    assert routes.speeds.factor(0) / routes.speeds.factor(1) == pytest.approx(0.5, rel=0.15)
    assert shares(routes.run(300, demand))[0] == pytest.approx(1 / 3, abs=0.04)
    assert shares(routes.run(100, 1))[0] == pytest.approx(1 / 3, abs=0.04)  # by weight alone: both have room


def test_a_route_that_recovers_gets_its_share_back() -> None:
    routes = Routes(real_tokens_s=[50, 100], predicted_tokens_s=[100, 100])
    routes.run(300, 8)
    assert routes.speeds.factor(0) < 0.6 * routes.speeds.factor(1)
    routes.real[0] = 100
    routes.run(600, 10.5)  # more than there is: both are full
    assert routes.speeds.factor(0) == pytest.approx(routes.speeds.factor(1), rel=0.15)


def test_what_slows_all_routes_alike_moves_no_share() -> None:
    """The plan was made for another workload: everything serves a third of what was predicted."""
    routes = Routes(real_tokens_s=[30, 60], predicted_tokens_s=[100, 200])
    routes.run(400, 6)
    assert shares(routes.run(200, 6))[0] == pytest.approx(1 / 3, abs=0.04)
    assert routes.speeds.factor(0) == pytest.approx(routes.speeds.factor(1), rel=0.15)


def test_without_a_prediction_routes_are_compared_with_each_other() -> None:
    routes = Routes(real_tokens_s=[50, 100], predicted_tokens_s=None)
    routes.run(400, 10)
    assert routes.speeds.factor(0) / routes.speeds.factor(1) == pytest.approx(0.5, rel=0.15)


def test_an_idle_cluster_says_nothing_about_speed() -> None:
    routes = Routes(real_tokens_s=[50, 100], predicted_tokens_s=[100, 100])
    routes.run(300, 0.5)
    assert routes.speeds.factor(0) == routes.speeds.factor(1) == 1.0
    assert routes.speeds.measured_tokens_s(0) is None


@pytest.mark.parametrize("seed", range(5))
def test_noise_moves_no_weight(seed: int) -> None:
    """Answers between half and one and a half of their mean; both routes exactly as predicted, always full."""
    routes = Routes(real_tokens_s=[100, 200], predicted_tokens_s=[100, 200], seed=seed)
    routes.run(300, 20)
    assert routes.speeds.factor(0) == routes.speeds.factor(1) == 1.0
    assert routes.speeds.measured_tokens_s(0) == pytest.approx(100, rel=0.05)


def test_a_weight_moves_smoothly_and_within_bounds() -> None:
    speeds = RouteSpeeds({0: 1.0, 1: 1.0}, {0: 100.0, 1: 100.0})
    before, moved = 1.0, []
    for tenth in range(6000):
        speeds.observe(0, tenth / 10, 0, True)  # full, and nothing comes out
        after = speeds.factor(0)
        assert 1 - 2 * STEP_A_S / 10 <= after / before <= 1
        moved.append(after < before)
        before = after
    assert before == pytest.approx(1 / MOST, rel=0.03)
    assert not any(moved[: round(LEAST_S * 10)])


def test_a_route_that_starts_again_is_counted_from_there() -> None:
    speeds = RouteSpeeds({0: 1.0}, {0: 100.0})
    for second in range(200):
        speeds.observe(0, second, 100 * second, True)
    speeds.lost(0)
    for second in range(300, 500):
        speeds.observe(0, second, 100 * (second - 300), True)
    assert speeds.measured_tokens_s(0) == pytest.approx(100, rel=1e-6)
    assert speeds.factor(0) == 1.0
