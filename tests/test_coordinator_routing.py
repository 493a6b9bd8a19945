"""Which route takes a request, and what is refused at the door. Plain data, no sockets."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hexgen.coordinator.admission import AdmissionLimits, AdmissionQueue, FinishRate, check_prompt
from hexgen.coordinator.dispatcher import derive_seed
from hexgen.errors import QueueFullError, RequestError
from hexgen.request import MAX_SEED
from hexgen.routing import Need, Router, RouteState

FEW = settings(deadline=None, max_examples=150)


def route(number: int, weight: float = 1.0, **rest: int | bool) -> RouteState:
    fields = {
        "max_context": 1024, "total_pages": 100, "page_size": 16, "max_sequences": 8, "free_pages": 100, **rest,
    }  # fmt: skip
    return RouteState(route=number, weight=weight, **fields)  # type: ignore[arg-type]


routes = st.lists(
    st.builds(
        RouteState,
        route=st.just(0),
        weight=st.floats(0.01, 100),
        max_context=st.integers(1, 2000),
        total_pages=st.just(100),
        page_size=st.sampled_from([1, 16]),
        max_sequences=st.integers(1, 8),
        up=st.booleans(),
        free_pages=st.integers(0, 100),
        waiting=st.integers(0, 9),
        outstanding=st.integers(0, 9),
        starting_pages=st.integers(0, 60),
    ),
    max_size=5,
)


@FEW
@given(states=routes, tokens=st.integers(1, 2000), sequences=st.integers(1, 8), blocked=st.sets(st.integers(0, 4)))
def test_never_a_route_without_room_or_down(
    states: list[RouteState], tokens: int, sequences: int, blocked: set[int]
) -> None:
    for number, state in enumerate(states):
        state.route = number
    need = Need(tokens, sequences)
    chosen = Router(states).choose(need, blocked)
    open_routes = [s for s in states if s.has_room(need) and s.route not in blocked]
    if chosen is None:
        assert not open_routes
        return
    state = states[chosen]
    assert state in open_routes
    assert state.up
    assert tokens < state.max_context
    if state.outstanding:
        assert state.outstanding + sequences <= state.max_sequences
        assert state.starting_pages + -(-tokens // state.page_size) + sequences <= state.free_pages


@FEW
@given(weights=st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_idle_routes_are_used_by_weight(weights: list[int]) -> None:
    router = Router([route(i, float(w)) for i, w in enumerate(weights)])
    rounds = 3 * sum(weights)
    counts = Counter(router.choose(Need(10)) for _ in range(rounds))
    assert [counts[i] for i in range(len(weights))] == [3 * w for w in weights]


def test_smooth_not_in_bursts() -> None:
    router = Router([route(0, 2.0), route(1, 1.0)])
    assert [router.choose(Need(1)) for _ in range(6)] == [0, 1, 0, 0, 1, 0]


@FEW
@given(weights=st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=9), requests=st.integers(1, 300))
def test_each_route_has_had_its_share_at_every_moment(weights: list[float], requests: int) -> None:
    """Tijdeman's bound: after any number of requests, less than one request from the share."""
    router = Router([route(i, w) for i, w in enumerate(weights)])
    bound = 1 - 1 / (2 * len(weights) - 2)
    counts = [0] * len(weights)
    for n in range(1, requests + 1):
        chosen = router.choose(Need(1))
        assert chosen is not None
        counts[chosen] += 1
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count - n * weight / sum(weights)) <= bound + 1e-6


def test_the_largest_credit_alone_would_not_keep_the_bound() -> None:
    """Why the rule is not plain smooth weighted round robin: there a route comes to be a whole request off."""
    weights = [11, 1, 4, 39, 39]
    credit, counts, worst = [0.0] * 5, [0] * 5, 0.0
    for n in range(1, 301):
        credit = [c + w / sum(weights) for c, w in zip(credit, weights, strict=True)]
        best = max(range(5), key=lambda i: (credit[i], -i))
        credit[best] -= 1
        counts[best] += 1
        worst = max(worst, *(abs(counts[i] - n * w / sum(weights)) for i, w in enumerate(weights)))
    assert worst > 1


def test_a_full_route_keeps_its_place_but_saves_nothing_up() -> None:
    """A route without room loses no credit; when it has room again it gets its share, not what it missed."""
    router = Router([route(0), route(1), route(2)])
    router.routes[1].outstanding = 8  # of 8
    assert {router.choose(Need(1)) for _ in range(30)} == {0, 2}
    assert router.routes[1].full
    assert not router.routes[0].full
    router.routes[1].outstanding = 0
    assert not router.routes[1].full
    counts = Counter(router.choose(Need(1)) for _ in range(30))
    assert [counts[i] for i in range(3)] == [10, 10, 10]


def test_full_routes_get_less() -> None:
    router = Router([route(0), route(1, free_pages=25)])
    counts = Counter(router.choose(Need(1)) for _ in range(100))
    assert counts[0] == 80


def test_a_queue_before_the_head_counts() -> None:
    router = Router([route(0, waiting=3), route(1)])
    counts = Counter(router.choose(Need(1)) for _ in range(100))
    assert counts[1] == 80


def test_an_idle_route_takes_what_exceeds_its_pages() -> None:
    router = Router([route(0, free_pages=1, max_sequences=2)])
    assert router.choose(Need(500, sequences=9)) == 0
    router.routes[0].outstanding = 1
    assert router.choose(Need(500)) is None


def test_long_prompts_go_where_they_fit() -> None:
    router = Router([route(0, 100.0, max_context=64), route(1)])
    assert [router.choose(Need(64)) for _ in range(3)] == [1, 1, 1]
    assert router.able(Need(1024)) == set()
    assert router.max_context == 1024


@dataclass(frozen=True)
class Item:
    need: Need


def test_the_queue_is_finite_in_requests_and_tokens() -> None:
    queue: AdmissionQueue[Item] = AdmissionQueue(AdmissionLimits(max_waiting_requests=3, max_waiting_tokens=100))
    items = [Item(Need(40)), Item(Need(60))]
    for item in items:
        queue.push(item, 0.0)
    with pytest.raises(QueueFullError, match="2 requests with 100 prompt tokens"):
        queue.push(Item(Need(1)), 0.0)
    assert queue.remove(items[0])
    assert not queue.remove(items[0])
    queue.push(Item(Need(1)), 0.0)
    queue.push(Item(Need(1)), 0.0)
    with pytest.raises(QueueFullError) as caught:
        queue.push(Item(Need(1)), 0.0)
    assert caught.value.retry_after_s >= 1
    assert len(queue) == 3


def test_a_prompt_above_the_token_limit_waits_alone() -> None:
    queue: AdmissionQueue[Item] = AdmissionQueue(AdmissionLimits(3, max_waiting_tokens=10))
    queue.push(Item(Need(50)), 0.0)
    with pytest.raises(QueueFullError):
        queue.push(Item(Need(1)), 0.0)


def test_retry_after_follows_the_rate() -> None:
    rate = FinishRate()
    assert rate.wait_s(10, 0.0) == 1
    for i in range(200):
        rate.finished(i * 0.5)
    assert rate.wait_s(10, 99.5) == pytest.approx(5, rel=0.01)
    assert rate.wait_s(1000, 99.5) == 60
    assert rate.wait_s(1, 99.5 + 1000) == 60  # nothing has finished for long: the figure is old


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ((), "is empty"),
        (tuple(range(10)), "has 10 tokens"),
        ((1, 100), "100 is not a token id between 0 and 99"),
        ((-1,), "-1 is not a token id"),
        ((10**50,), "very large number"),
        ((1, 1.5), "whole numbers"),
        ((True,), "whole numbers"),
        (("1",), "whole numbers"),
        ((None,), "whole numbers"),
    ],
)
def test_prompts_that_no_route_could_run(prompt: tuple[int, ...], message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        check_prompt(prompt, vocab_size=100, max_context=10)
    assert caught.value.where == "prompt"


def test_a_prompt_may_leave_room_for_one_token() -> None:
    check_prompt(tuple(range(9)), vocab_size=100, max_context=10)


@FEW
@given(seed=st.integers(0, MAX_SEED))
def test_seeds_of_n_are_distinct_and_in_range(seed: int) -> None:
    seeds = [derive_seed(seed, i) for i in range(64)]
    assert seeds[0] == seed
    assert len(set(seeds)) == 64
    assert all(0 <= s <= MAX_SEED for s in seeds)
    assert seeds == [derive_seed(seed, i) for i in range(64)]
