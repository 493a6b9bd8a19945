"""The batching policy, case by case: who goes into the next step, and who gives way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from batching_route import PaperRoute

from hexgen.batching.batcher import Batcher, BatchLimits
from hexgen.batching.policy import PREFILL_CHUNK_FLOOR, PREFILL_ROUNDS
from hexgen.batching.segments import SampledToken, SegmentKind, Step
from hexgen.errors import EngineError, RequestError, SpecError
from hexgen.request import SamplingParams, TokenEvent, TokenLogprobs

LIMITS = BatchLimits(pages=64, page_size=4, token_budget=16, max_sequences=8, max_context=64)
LONG = SamplingParams(max_tokens=40)


def prompt(length: int, first: int = 1) -> tuple[int, ...]:
    return tuple((first + i * i) % 50 for i in range(length))


def step_of(batcher: Batcher) -> Step:
    step = batcher.next_step()
    assert step is not None
    return step


def finish(batcher: Batcher, step: Step, token: int = 9) -> None:
    batcher.complete(step.number, [SampledToken(s.sequence, token) for s in step.sampled])


def decoding(count: int, limits: BatchLimits) -> Batcher:
    """A batcher whose ``count`` sequences of one prompt token have each sampled once."""
    batcher = Batcher(limits)
    for number in range(count):
        batcher.add(number, (number + 1,), LONG)
    while batcher.waiting or batcher.in_flight:
        finish(batcher, step_of(batcher))
    return batcher


# ---- chunks and budgets --------------------------------------------------------------------------------------


def test_a_prompt_longer_than_the_budget_comes_in_chunks_and_samples_once() -> None:
    batcher = Batcher(LIMITS)
    batcher.add(7, prompt(35), LONG)
    steps = [step_of(batcher)]
    finish(batcher, steps[-1])
    while batcher.stats().output_tokens == 0:
        steps.append(step_of(batcher))
        finish(batcher, steps[-1])
    segments = [step.segments[0] for step in steps]
    assert [(s.start, s.end, s.sample) for s in segments] == [(0, 16, False), (16, 32, False), (32, 35, True)]
    assert all(s.kind is SegmentKind.PREFILL for s in segments)
    assert [len(s.new_pages) for s in segments] == [4, 4, 1]
    assert [a.sequence for step in steps for a in step.admitted] == [7]
    decode = step_of(batcher).segments[0]
    assert (decode.kind, decode.start, decode.tokens, decode.sample) == (SegmentKind.DECODE, 35, (9,), True)


def test_chunks_of_one_prompt_follow_each_other_down_a_pipeline() -> None:
    batcher = Batcher(replace(LIMITS, depth=3))
    batcher.add(0, prompt(40), LONG)
    steps = [step_of(batcher), step_of(batcher), step_of(batcher)]
    assert [s.segments[0].start for s in steps] == [0, 16, 32]
    assert batcher.next_step() is None
    assert batcher.in_flight == 3


def test_prefill_gets_what_decodes_leave() -> None:
    batcher = decoding(6, LIMITS)
    batcher.add(100, prompt(30), LONG)
    step = step_of(batcher)
    assert [len(s.tokens) for s in step.segments] == [1] * 6 + [10]


def test_decodes_beyond_the_budget_take_turns_and_leave_a_part_to_prefill() -> None:
    limits = replace(LIMITS, token_budget=4)
    batcher = decoding(6, limits)
    turns: dict[int, int] = dict.fromkeys(range(6), 0)
    for _ in range(6):
        step = step_of(batcher)
        assert len(step.segments) == 4
        for segment in step.segments:
            turns[segment.sequence] += 1
        finish(batcher, step)
    assert set(turns.values()) == {4}
    batcher.add(100, prompt(5), LONG)
    for _ in range(5):
        step = step_of(batcher)
        assert [len(s.tokens) for s in step.segments if s.sequence == 100] == [1]
        assert len(step.segments) == 4
        finish(batcher, step)


def test_a_budget_of_one_token_alternates() -> None:
    batcher = decoding(1, replace(LIMITS, token_budget=1))
    batcher.add(100, prompt(4), LONG)
    kinds = []
    for _ in range(8):
        step = step_of(batcher)
        kinds.append(step.segments[0].kind)
        finish(batcher, step)
    assert kinds.count(SegmentKind.PREFILL) == 4


# ---- pipelines -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("depth", "sizes"), [(1, [7]), (2, [4, 3]), (3, [3, 3, 1]), (4, [2, 2, 2, 1])])
def test_ready_decodes_are_dealt_over_the_stages(depth: int, sizes: list[int]) -> None:
    batcher = decoding(7, replace(LIMITS, depth=depth))
    steps = [step_of(batcher) for _ in range(depth)]
    assert [len(step.segments) for step in steps] == sizes
    assert len({s.sequence for step in steps for s in step.segments}) == 7
    assert batcher.next_step() is None
    finish(batcher, steps[0])
    again = step_of(batcher)
    assert {s.sequence for s in again.segments} == {s.sequence for s in steps[0].segments}


def test_pending_prompts_are_dealt_over_an_idle_pipeline() -> None:
    limits = BatchLimits(pages=400, page_size=16, token_budget=2048, max_sequences=16, max_context=1000, depth=2)
    batcher = Batcher(limits)
    for number in range(8):
        batcher.add(number, prompt(100, number), LONG)
    assert [step_of(batcher).tokens, step_of(batcher).tokens] == [400, 400]


def test_beside_decodes_prompts_are_dealt_over_rounds() -> None:
    """So that what came in a bunch leaves in steps of one size; what is next to nothing waits for nobody."""
    limits = BatchLimits(pages=3000, page_size=16, token_budget=2048, max_sequences=64, max_context=3000, depth=2)
    batcher = decoding(4, limits)
    for number in range(8):
        batcher.add(10 + number, prompt(1000, number), LONG)
    under_way, sizes, pending = [], [], 8000
    while pending > 0:
        if len(under_way) == limits.depth:
            finish(batcher, under_way.pop(0))
        under_way.append(step_of(batcher))
        segments = under_way[-1].segments
        sizes.append(sum(s.end - s.start for s in segments if s.kind is SegmentKind.PREFILL))
        assert sizes[-1] == min(pending, max(PREFILL_CHUNK_FLOOR, -(-pending // (2 * PREFILL_ROUNDS))))
        pending -= sizes[-1]
    assert sizes[0] == 500


def test_small_prompts_are_not_dealt() -> None:
    batcher = Batcher(replace(LIMITS, token_budget=512, depth=2))
    batcher.add(0, prompt(60), LONG)
    assert step_of(batcher).tokens == 60


def test_a_sequence_with_a_token_in_flight_is_not_ready() -> None:
    batcher = decoding(1, replace(LIMITS, depth=2))
    first = step_of(batcher)
    assert batcher.next_step() is None
    finish(batcher, first)
    assert step_of(batcher).segments[0].start == first.segments[0].end


# ---- ends ----------------------------------------------------------------------------------------------------


def test_stop_ids_wait_for_min_tokens() -> None:
    batcher = Batcher(LIMITS)
    batcher.add(0, (1, 2), SamplingParams(max_tokens=5, min_tokens=2), (9,))
    reasons = []
    while not reasons or reasons[-1] is None:
        step = step_of(batcher)
        reasons += [e.finish_reason for e in batcher.complete(step.number, [SampledToken(0, 9)])]
    assert reasons == [None, "stop"]


def test_max_tokens_and_the_context_end_with_length() -> None:
    batcher = Batcher(replace(LIMITS, max_context=8))
    batcher.add(0, prompt(2), SamplingParams(max_tokens=3))
    batcher.add(1, prompt(7), SamplingParams(max_tokens=3))
    batcher.add(2, prompt(6), SamplingParams(max_tokens=30, min_tokens=30))
    outputs: dict[int, list[str | None]] = {0: [], 1: [], 2: []}
    while not batcher.idle:
        step = step_of(batcher)
        for event in batcher.complete(step.number, [SampledToken(s.sequence, 9) for s in step.sampled]):
            outputs[event.request].append(event.finish_reason)
    assert outputs == {0: [None, None, "length"], 1: ["length"], 2: [None, "length"]}


def test_log_probabilities_pass_through() -> None:
    batcher = Batcher(LIMITS)
    batcher.add(0, (1,), LONG)
    logprobs = TokenLogprobs(-0.5, ((9, -0.5), (3, -1.5)))
    step = step_of(batcher)
    (event,) = batcher.complete(step.number, [SampledToken(0, 9, logprobs)])
    assert event.logprobs is logprobs


def test_the_stages_hear_of_the_last_end_in_a_step_without_segments() -> None:
    batcher = Batcher(LIMITS)
    batcher.add(0, (1,), SamplingParams(max_tokens=1))
    finish(batcher, step_of(batcher))
    assert not batcher.idle
    last = step_of(batcher)
    assert (last.released, last.admitted, last.segments) == ((0,), (), ())
    assert batcher.complete(last.number, []) == []
    assert batcher.idle
    assert batcher.next_step() is None


def test_aborts_in_every_state() -> None:
    batcher = Batcher(replace(LIMITS, max_sequences=2, depth=2))
    for number in range(4):
        batcher.add(number, prompt(20, number), LONG)
    first = step_of(batcher)  # a chunk of 0
    second = step_of(batcher)  # the rest of 0, a chunk of 1
    batcher.abort([0, 1, 3, 77])
    finish(batcher, first)
    assert batcher.complete(second.number, [SampledToken(0, 5)]) == []
    third = step_of(batcher)
    assert sorted(third.released) == [0, 1]
    assert [a.sequence for a in third.admitted] == [2]
    batcher.abort([2])
    finish(batcher, third)
    last = step_of(batcher)
    assert last.released == (2,)
    finish(batcher, last)
    assert batcher.idle
    assert batcher.free_pages == batcher.total_pages


def test_a_number_may_live_again_while_its_old_token_is_in_flight() -> None:
    batcher = Batcher(replace(LIMITS, depth=2))
    batcher.add(0, (1,), LONG)
    old = step_of(batcher)
    batcher.abort([0])
    batcher.add(0, (2,), LONG)
    new = step_of(batcher)
    assert new.released == (0,)
    assert [a.sequence for a in new.admitted] == [0]
    assert batcher.complete(old.number, [SampledToken(0, 5)]) == []
    assert [e.token for e in batcher.complete(new.number, [SampledToken(0, 6)])] == [6]


# ---- pages ---------------------------------------------------------------------------------------------------


def test_a_shared_prefix_is_computed_once_from_the_same_step_on() -> None:
    batcher = Batcher(replace(LIMITS, token_budget=64))
    batcher.add(0, (*prompt(16), 1), LONG)
    batcher.add(1, (*prompt(16), 2), LONG)
    step = step_of(batcher)
    first, second = step.segments
    assert step.admitted[1].pages == first.new_pages[:4]
    assert (second.start, second.tokens) == (16, (2,))
    assert batcher.stats().cached_tokens == 16
    assert batcher.stats().prompt_tokens == 34


def test_a_finished_prompt_is_found_again_but_for_its_last_token() -> None:
    batcher = Batcher(LIMITS)
    batcher.add(0, prompt(12), SamplingParams(max_tokens=1))
    finish(batcher, step_of(batcher))
    assert batcher.free_pages == batcher.total_pages
    batcher.add(1, prompt(12), LONG)
    step = step_of(batcher)
    assert len(step.admitted[0].pages) == 2
    assert (step.segments[0].start, len(step.segments[0].tokens)) == (8, 4)


def test_generated_tokens_are_found_again_too() -> None:
    batcher = Batcher(LIMITS)
    batcher.add(0, prompt(6), SamplingParams(max_tokens=6))
    while batcher.running or batcher.waiting:
        finish(batcher, step_of(batcher), 33)
    batcher.add(1, (*prompt(6), *[33] * 6), LONG)
    assert len(step_of(batcher).admitted[0].pages) == 2


def test_variants_do_not_share_prefixes() -> None:
    batcher = Batcher(replace(LIMITS, token_budget=64))
    batcher.add(0, prompt(16), LONG)
    batcher.add(1, prompt(16), LONG, variant=b"tuned")
    assert [a.pages for a in step_of(batcher).admitted] == [(), ()]


def test_the_cache_can_be_off() -> None:
    batcher = Batcher(replace(LIMITS, token_budget=64, prefix_cache=False))
    batcher.add(0, prompt(16), LONG)
    batcher.add(1, prompt(16), LONG)
    assert [a.pages for a in step_of(batcher).admitted] == [(), ()]


def test_admission_leaves_room_for_the_running_to_grow() -> None:
    batcher = Batcher(replace(LIMITS, pages=8, token_budget=64, max_context=32))
    batcher.add(0, prompt(20, 1), LONG)  # 5 pages
    batcher.add(1, prompt(12, 2), LONG)  # 3 pages would fill the pool
    batcher.add(2, prompt(2, 3), LONG)  # would fit, but must not overtake
    step = step_of(batcher)
    assert [a.sequence for a in step.admitted] == [0]
    assert (batcher.running, batcher.waiting) == (1, 2)


def test_the_youngest_gives_way_and_comes_back_first() -> None:
    limits = BatchLimits(pages=6, page_size=4, token_budget=64, max_sequences=4, max_context=24, depth=1)
    route = PaperRoute(limits)
    for number in range(4):
        route.add(number, prompt(7, number), SamplingParams(max_tokens=17, min_tokens=17))
    route.drain()
    assert route.preempted
    assert 0 not in route.preempted
    first_of = {}
    for step in route.formed:
        for admission in step.admitted:
            first_of.setdefault(admission.sequence, step.number)
    assert sorted(first_of, key=lambda n: first_of[n]) == [0, 1, 2, 3]


def results(step: Step, order: Sequence[int]) -> list[SampledToken]:
    """The step's tokens in this order of sequences, which is the order in which they get ready again."""
    return [SampledToken(n, 20 + n) for n in order if n in {s.sequence for s in step.sampled}]


def test_the_oldest_moves_though_the_one_whose_turn_it_is_lacks_a_page() -> None:
    limits = BatchLimits(
        pages=4, page_size=2, token_budget=2, max_sequences=2, max_context=8, depth=2, prefix_cache=False
    )
    batcher = Batcher(limits)
    batcher.add(0, (1,), LONG)
    batcher.add(1, (2,), LONG)
    step = step_of(batcher)
    batcher.complete(step.number, results(step, [1, 0]))
    turns = []
    for _ in range(3):  # micro-batches of one, the younger first; then both have filled two pages of four
        flying = [step_of(batcher), step_of(batcher)]
        for step in flying:
            turns.append(step.segments[0].sequence)
            finish(batcher, step)
    assert turns == [1, 0] * 3
    assert batcher.free_pages == 0
    step = step_of(batcher)
    assert [s.sequence for s in step.segments] == [0]
    assert step.released == (1,)


def test_one_that_waits_for_a_page_does_not_take_the_turns_of_others() -> None:
    limits = BatchLimits(pages=6, page_size=16, token_budget=64, max_sequences=3, max_context=96)
    batcher = Batcher(limits)
    for number, length in enumerate((16, 16, 31)):
        batcher.add(number, prompt(length, number), LONG)
    finish(batcher, step_of(batcher))  # 4 pages of 6
    finish(batcher, step_of(batcher))  # 0 and 1 take one more each, 2 fills its last
    assert (batcher.running, batcher.free_pages) == (3, 0)
    batcher.limits = replace(limits, token_budget=1)
    turns = []
    for _ in range(12):
        step = step_of(batcher)
        turns.append(step.segments[0].sequence)
        finish(batcher, step)
    assert 2 not in turns
    assert turns.count(1) >= 4


def test_a_preempted_sequence_takes_its_token_in_flight_before_it_returns() -> None:
    limits = BatchLimits(
        pages=7, page_size=2, token_budget=8, max_sequences=3, max_context=14, depth=4, prefix_cache=False
    )
    batcher = Batcher(limits)
    for number, length in enumerate((2, 3, 3)):
        batcher.add(number, prompt(length, number), SamplingParams(max_tokens=9, presence_penalty=0.5))
    step = step_of(batcher)
    batcher.complete(step.number, results(step, [2, 1, 0]))
    for step in [step_of(batcher) for _ in range(3)]:
        finish(batcher, step, 30)
    youngest = step_of(batcher)
    assert [s.sequence for s in youngest.segments] == [2]
    older = step_of(batcher)
    assert ([s.sequence for s in older.segments], older.released) == ([1], (2,))
    batcher.abort([0])  # room enough for 2, but its token is not back
    assert batcher.free_pages == 4
    while (step := batcher.next_step()) is not None:
        assert not step.admitted
    (event,) = batcher.complete(youngest.number, [SampledToken(2, 40)])
    assert event == TokenEvent(2, 40, None, None)
    step = step_of(batcher)
    assert step.released == (0,)
    assert [a.history for a in step.admitted] == [(*prompt(3, 2), 22, 30, 40)]
    assert step.admitted[0].prompt_tokens == 3
    assert step.segments[0].tokens == step.admitted[0].history
    assert step.segments[0].sample


def test_a_request_is_as_long_as_the_pool_at_most() -> None:
    limits = BatchLimits(pages=3, page_size=4, token_budget=8, max_sequences=4, max_context=1000, depth=2)
    route = PaperRoute(limits)
    for number in range(3):
        route.add(number, prompt(5, number), SamplingParams(max_tokens=900, min_tokens=900))
    route.drain()
    assert [len(client.tokens) for client in route.done] == [12, 12, 12]


# ---- bad input -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [(), prompt(64), prompt(1000), (1, -1), (1, 2**31), (1, "x"), (1.5,)])
def test_bad_prompts_are_refused_and_leave_nothing(bad: tuple[int, ...]) -> None:
    batcher = Batcher(LIMITS)
    with pytest.raises(RequestError):
        batcher.add(0, bad, LONG)
    assert batcher.idle
    assert batcher.next_step() is None


def test_a_live_number_cannot_be_added_twice() -> None:
    batcher = Batcher(LIMITS)
    batcher.add(0, (1,), LONG)
    with pytest.raises(RequestError, match="running already"):
        batcher.add(0, (2,), LONG)
    assert batcher.waiting == 1


@pytest.mark.parametrize(
    "results", [[], [SampledToken(1, 5)], [SampledToken(0, 5)] * 2, [SampledToken(0, 5), SampledToken(1, 5)]]
)
def test_results_of_another_step_are_an_engine_error(results: list[SampledToken]) -> None:
    batcher = Batcher(LIMITS)
    batcher.add(0, (1,), LONG)
    step = step_of(batcher)
    with pytest.raises(EngineError):
        batcher.complete(step.number, results)
    with pytest.raises(EngineError, match="out of turn"):
        batcher.complete(step.number + 1, [SampledToken(0, 5)])
    assert len(batcher.complete(step.number, [SampledToken(0, 5)])) == 1


@pytest.mark.parametrize("name", ["pages", "page_size", "token_budget", "max_sequences", "max_context", "depth"])
def test_limits_are_positive(name: str) -> None:
    with pytest.raises(SpecError, match=name):
        replace(LIMITS, **{name: 0})


def test_a_pool_of_one_token_is_refused() -> None:
    with pytest.raises(SpecError, match="single token"):
        replace(LIMITS, pages=1, page_size=1)
