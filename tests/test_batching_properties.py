"""Any mix of arrivals, aborts, limits and delays: everyone gets the tokens they would get alone."""

from __future__ import annotations

import random

import pytest
from batching_route import VOCABULARY, PaperRoute
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from hexgen.batching.batcher import BatchLimits
from hexgen.request import SamplingParams

# Prompts start with a part of one of these, so that prefixes are shared by chance, whole pages and not.
TEMPLATES = tuple(tuple(random.Random(seed).choices(range(VOCABULARY), k=64)) for seed in range(2))


@st.composite
def limits(draw: st.DrawFn) -> BatchLimits:
    page_size = draw(st.sampled_from([1, 2, 4, 16]))
    pages = draw(st.integers(max(2, 8 // page_size), max(3, 64 // page_size)))
    return BatchLimits(
        pages=pages,
        page_size=page_size,
        token_budget=draw(st.sampled_from([1, 2, 3, 5, 8, 17, 64])),
        max_sequences=draw(st.integers(1, 8)),
        max_context=draw(st.sampled_from([8, 20, 64])),
        depth=draw(st.integers(1, 4)),
        prefix_cache=draw(st.booleans()),
    )


class AnyTraffic(RuleBasedStateMachine):
    route: PaperRoute

    @initialize(limits=limits())
    def start(self, limits: BatchLimits) -> None:
        self.route = PaperRoute(limits)
        self.count = 0

    @rule(
        template=st.sampled_from(TEMPLATES),
        shared=st.integers(0, 64),
        own=st.lists(st.integers(0, VOCABULARY - 1), max_size=6),
        max_tokens=st.integers(1, 40),
        min_tokens=st.integers(0, 3),
        stops=st.sampled_from([(), (3,), (3, 5)]),
        penalty=st.sampled_from([1.0, 1.1]),
        reuse=st.booleans(),
    )
    def arrive(
        self,
        template: tuple[int, ...],
        shared: int,
        own: list[int],
        max_tokens: int,
        min_tokens: int,
        stops: tuple[int, ...],
        penalty: float,
        reuse: bool,
    ) -> None:
        prompt = (template[:shared] + tuple(own))[: self.route.limits.context - 1] or (1,)
        number = 0 if reuse and 0 not in self.route.clients else self.count
        self.count += 1
        if number in self.route.clients:
            return
        sampling = SamplingParams(
            max_tokens=max_tokens, min_tokens=min(min_tokens, max_tokens), repetition_penalty=penalty
        )
        self.route.add(number, prompt, sampling, stops)

    @rule(pick=st.integers(0, 100))
    def abort(self, pick: int) -> None:
        live = sorted(self.route.clients)
        self.route.abort(live[pick % len(live)] if live else pick)

    @rule()
    def form(self) -> None:
        self.route.form()

    @rule()
    def complete(self) -> None:
        self.route.complete()

    @rule(turns=st.integers(1, 12), ahead=st.integers(1, 4))
    def run(self, turns: int, ahead: int) -> None:
        """Some turns of the loop, with fewer or more steps under way."""
        for _ in range(turns):
            while len(self.route.steps) < ahead and self.route.form() is not None:
                pass
            self.route.complete()

    @invariant()
    def pages_add_up(self) -> None:
        if hasattr(self, "route"):
            self.route.batcher.check()
            stats = self.route.batcher.stats()
            assert stats.preemptions >= len(self.route.preempted)
            assert stats.running + stats.waiting == len(self.route.clients)

    def teardown(self) -> None:
        if hasattr(self, "route"):
            self.route.drain()


AnyTraffic.TestCase.settings = settings(
    max_examples=100,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestAnyTraffic = AnyTraffic.TestCase


def traffic(route: PaperRoute, chance: random.Random, requests: int, longest: int) -> None:
    """``requests`` arrivals, a third of them aborted some time later, with turns of the loop in between."""
    doomed: list[int] = []
    hurry = chance.choice([0.5, 2, 6])
    room = route.limits.context - 1
    for number in range(requests):
        shared = chance.choice(TEMPLATES)[: chance.randint(0, longest)]
        prompt = shared + tuple(chance.choices(range(VOCABULARY), k=chance.randint(1, 6)))
        sampling = SamplingParams(
            max_tokens=chance.randint(1, longest), presence_penalty=chance.choice([0.0, 0.5])
        )
        route.add(number, prompt[:room], sampling, chance.choice([(), (3,)]))
        if chance.random() < 1 / 3:
            doomed.append(number)
        for _ in range(int(chance.random() * hurry)):
            if chance.random() < 0.5:
                route.form()
            else:
                route.complete()
        if doomed and chance.random() < 1 / 3:
            route.abort(doomed.pop(chance.randrange(len(doomed))))
    route.drain()


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_a_thousand_requests_a_third_aborted(depth: int) -> None:
    """Pages for about five of up to sixteen sequences: long enough for rare orders of events to occur."""
    route = PaperRoute(
        BatchLimits(pages=40, page_size=4, token_budget=24, max_sequences=16, max_context=48, depth=depth)
    )
    traffic(route, random.Random(depth), 1000, 24)
    assert route.preempted
    assert route.batcher.stats().cached_tokens > 0
    assert len(route.done) >= 600


@settings(deadline=None, max_examples=100)
@given(seed=st.integers(0, 2**32))
def test_crowds_in_narrow_places(seed: int) -> None:
    """Few pages, small budgets, several steps under way: everybody is in somebody's way."""
    chance = random.Random(seed)
    page_size = chance.choice([1, 2, 4])
    route = PaperRoute(
        BatchLimits(
            pages=chance.randint(4, 24),
            page_size=page_size,
            token_budget=chance.choice([1, 2, 3, 4, 6, 9, 40]),
            max_sequences=chance.randint(2, 8),
            max_context=chance.choice([10, 30]),
            depth=chance.randint(1, 4),
            prefix_cache=chance.random() < 0.5,
        )
    )
    traffic(route, chance, 30, chance.choice([4, 12, 24]))
