"""Requests through the coordinator: order, ends, queues, and heads that break. The head is scripted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
from scripted_head import ScriptedHead

from hexgen.coordinator.admission import AdmissionLimits
from hexgen.coordinator.answer import Answer
from hexgen.coordinator.coordinator import Coordinator, CoordinatorLimits, ServedModel
from hexgen.coordinator.stream import RequestStream, merge
from hexgen.coordinator.tokenizer import Tokenizer, load_tokenizer
from hexgen.errors import EngineError, QueueFullError, RequestError, UnavailableError
from hexgen.request import RequestOutput, SamplingParams

BUNDLED = Path(__file__).parent.parent / "hexgen" / "bundled" / "demo"
EOS = 199


def in_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        async def bounded() -> None:
            async with asyncio.timeout(30):
                await test(*args, **kwargs)

        asyncio.run(bounded())

    return run


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    found = load_tokenizer(BUNDLED)
    assert found is not None
    return found


@asynccontextmanager
async def running(
    *heads: ScriptedHead, tokenizer: Tokenizer | None = None, waiting: AdmissionLimits | None = None
) -> AsyncIterator[Coordinator]:
    endpoints = []
    for head in heads:
        await head.__aenter__()
        endpoints.append(head.endpoint)
    coordinator = Coordinator(
        endpoints,
        heads[0].secret,
        ServedModel("scripted", vocab_size=4096, eos_token_ids=(EOS,)),
        tokenizer,
        CoordinatorLimits(waiting or AdmissionLimits()),
    )
    try:
        await coordinator.start()
        yield coordinator
    finally:
        await coordinator.close()
        for head in heads:
            await head.__aexit__(None, None, None)


async def finish(stream: RequestStream) -> RequestOutput:
    answer = Answer(stream)
    async for update in stream:
        answer.add(update)
    return answer.output()


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.002)


def ids(tokens: int, **rest: Any) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, **rest)


@in_loop
async def test_tokens_come_in_order_and_end_by_length() -> None:
    async with running(ScriptedHead()) as coordinator:
        output = await finish(await coordinator.submit([5, 6, 7], ids(20)))
        (choice,) = output.outputs
        assert choice.token_ids == tuple(range(8, 28))
        assert (choice.finish_reason, choice.stop_reason, choice.text) == ("length", None, "")
        assert output.prompt_token_ids == (5, 6, 7)
        timing = output.timing
        assert timing is not None
        assert timing.arrived_s <= timing.admitted_s <= timing.first_token_s <= timing.finished_s


@in_loop
async def test_eos_and_stop_ids_reach_the_head_and_come_back() -> None:
    async with running(ScriptedHead()) as coordinator:
        eos = (await finish(await coordinator.submit([195], ids(20)))).outputs[0]
        assert eos.token_ids == (196, 197, 198, 199)
        assert (eos.finish_reason, eos.stop_reason) == ("stop", None)
        own = (await finish(await coordinator.submit([195], ids(20, stop_token_ids=(197,))))).outputs[0]
        assert own.token_ids == (196, 197)
        assert (own.finish_reason, own.stop_reason) == ("stop", 197)
        ignored = (await finish(await coordinator.submit([195], ids(6, ignore_eos=True)))).outputs[0]
        assert ignored.token_ids == (196, 197, 198, 199, 0, 1)


def scripted_text(tokenizer: Tokenizer, text: str) -> ScriptedHead:
    tokens = list(tokenizer.encode(text))
    return ScriptedHead(script=lambda submit: tokens[: submit.sampling.max_tokens])


@in_loop
async def test_a_stop_string_ends_and_cuts(tokenizer: Tokenizer) -> None:
    text = "def add(a, b):\n    return a + b\n\n\nclass Next:\n    pass\n"
    head = scripted_text(tokenizer, text)
    async with running(head, tokenizer=tokenizer) as coordinator:
        stream = await coordinator.submit("x", ids(1000, stop=("\n\n\nclass", "absent")))
        output = (await finish(stream)).outputs[0]
        assert output.text == text[: text.index("\n\n\nclass")]
        assert (output.finish_reason, output.stop_reason) == ("stop", "\n\n\nclass")
        await until(lambda: not head.live)  # told to stop
        whole = (await finish(await coordinator.submit("x", ids(1000, stop="absent")))).outputs[0]
        assert (whole.text, whole.finish_reason) == (text, "length")


@in_loop
async def test_min_tokens_come_before_stop_strings(tokenizer: Tokenizer) -> None:
    text = "ab ab ab ab"
    async with running(scripted_text(tokenizer, text), tokenizer=tokenizer) as coordinator:
        tokens = len(tokenizer.encode(text))
        stream = await coordinator.submit("x", ids(tokens, stop="ab", min_tokens=tokens - 1))
        assert len((await finish(stream)).outputs[0].token_ids) >= tokens - 1


@in_loop
async def test_n_sequences_have_their_own_seeds() -> None:
    head = ScriptedHead()
    async with running(head) as coordinator:
        output = await finish(await coordinator.submit([3], ids(4, n=5, seed=11)))
        assert [c.index for c in output.outputs] == list(range(5))
        assert all(c.token_ids == (4, 5, 6, 7) for c in output.outputs)
        seeds = [s.sampling.seed for s in head.submits]
        assert seeds[0] == 11
        assert len(set(seeds)) == 5
        assert {s.sampling.n for s in head.submits} == {1}
        await finish(await coordinator.submit([3], ids(1)))
        await finish(await coordinator.submit([3], ids(1)))
        assert head.submits[-1].sampling.seed != head.submits[-2].sampling.seed


@in_loop
async def test_a_slow_consumer_gets_fewer_larger_updates() -> None:
    async with running(ScriptedHead()) as coordinator:
        stream = await coordinator.submit([0], ids(100))
        await until(lambda: stream.finished)
        updates = [update async for update in stream]
        assert len(updates) == 1
        assert updates[0].finished
        assert len(updates[0].deltas[0].token_ids) == 100


@in_loop
async def test_leaving_early_aborts() -> None:
    head = ScriptedHead(step_s=0.002)
    async with running(head) as coordinator:
        updates = coordinator.generate([1], ids(1000, ignore_eos=True))
        assert (await anext(updates)).deltas[0].token_ids
        await updates.aclose()
        await until(lambda: head.aborted != [] and not head.live)
        assert coordinator.running == 0


@in_loop
async def test_abort_by_id() -> None:
    head = ScriptedHead(step_s=0.002)
    async with running(head) as coordinator:
        stream = await coordinator.submit([1], ids(1000, ignore_eos=True, n=2), "mine")
        with pytest.raises(RequestError, match="in use"):
            await coordinator.submit([1], ids(1), "mine")
        await until(lambda: stream.first_token_s is not None)
        assert coordinator.abort("mine")
        assert not coordinator.abort("mine")
        assert not coordinator.abort("nobody's")
        assert [c.finish_reason for c in (await finish(stream)).outputs] == ["abort", "abort"]
        await until(lambda: len(head.aborted) == 2)
        await finish(await coordinator.submit([1], ids(1), "mine"))  # the id is free again


@in_loop
async def test_what_finds_no_room_waits_in_order_and_the_queue_is_finite() -> None:
    head = ScriptedHead(max_sequences=2, paused=True)
    limits = AdmissionLimits(max_waiting_requests=3)
    async with running(head, waiting=limits) as coordinator:
        streams = [await coordinator.submit([i], ids(3)) for i in range(5)]
        assert (coordinator.running, coordinator.waiting) == (2, 3)
        with pytest.raises(QueueFullError) as caught:
            await coordinator.submit([9], ids(3))
        assert caught.value.retry_after_s >= 1
        streams[3].abort()  # leaves the queue
        assert coordinator.waiting == 2
        streams.append(await coordinator.submit([10], ids(3)))
        head.paused = False
        for stream in streams:
            await finish(stream)
        assert [s.prompt[0] for s in head.submits] == [0, 1, 2, 4, 10]
        assert head.most_live <= 2


@in_loop
async def test_thousands_may_wait() -> None:
    head = ScriptedHead(max_sequences=64, pages=100_000)
    async with running(head, waiting=AdmissionLimits(10_000, 10**9)) as coordinator:
        streams = [await coordinator.submit([i % 100], ids(1)) for i in range(3000)]
        for stream in streams:
            await finish(stream)
        assert [s.prompt[0] for s in head.submits] == [i % 100 for i in range(3000)]


@in_loop
async def test_pages_limit_what_is_sent() -> None:
    head = ScriptedHead(pages=10, paused=True)
    async with running(head) as coordinator:
        streams = [await coordinator.submit([i] * 40, ids(2)) for i in range(6)]  # 3 pages and 1 each
        assert coordinator.running == 2
        head.paused = False
        for stream in streams:
            await finish(stream)
        assert len(head.submits) == 6


@in_loop
async def test_requests_spread_over_routes_by_weight() -> None:
    heads = [ScriptedHead(route=0, weight=3.0), ScriptedHead(route=1, weight=1.0)]
    async with running(*heads) as coordinator:
        for i in range(40):
            await finish(await coordinator.submit([i], ids(1)))
        assert 26 <= len(heads[0].submits) <= 34


@in_loop
async def test_a_broken_route_fails_its_own_and_the_other_goes_on() -> None:
    heads = [ScriptedHead(route=0, step_s=0.002), ScriptedHead(route=1, step_s=0.002)]
    async with running(*heads) as coordinator:
        streams = [await coordinator.submit([i], ids(150, ignore_eos=True)) for i in range(4)]
        await until(lambda: all(s.first_token_s is not None for s in streams))
        heads[0].break_connection()
        await until(lambda: [s.up for s in coordinator.route_states] == [False, True])
        results = await asyncio.gather(*(finish(s) for s in streams), return_exceptions=True)
        kinds = {s.route: [] for s in streams}
        for stream, result in zip(streams, results, strict=True):
            kinds[stream.route].append(type(result))
        assert kinds == {0: [EngineError] * 2, 1: [RequestOutput] * 2}
        assert coordinator.healthy
        await finish(await coordinator.submit([1], ids(2)))
        await until(lambda: all(s.up for s in coordinator.route_states))  # it connects again


@in_loop
async def test_all_routes_down() -> None:
    head = ScriptedHead(paused=True, max_sequences=1)
    async with running(head) as coordinator:
        streams = [await coordinator.submit([i], ids(5)) for i in range(2)]  # one sent, one waiting
        head.break_connection()
        for stream in streams:
            with pytest.raises(UnavailableError):
                await finish(stream)
        assert not coordinator.healthy
        with pytest.raises(UnavailableError):
            await coordinator.submit([1], ids(5))


@in_loop
async def test_a_refusal_by_the_head_is_one_requests_error() -> None:
    head = ScriptedHead(refuse="too long for this route")
    async with running(head) as coordinator:
        with pytest.raises(RequestError, match="too long for this route"):
            await finish(await coordinator.submit([1], ids(5, n=2)))
        head.refuse = None
        await finish(await coordinator.submit([1], ids(5)))


@in_loop
async def test_the_wrong_secret_is_not_let_in() -> None:
    async with ScriptedHead() as head:
        coordinator = Coordinator([head.endpoint], "wrong", ServedModel("scripted", 4096))
        with pytest.raises(EngineError):
            await coordinator.start()


@in_loop
async def test_draining_lets_finish_what_can_and_aborts_the_rest() -> None:
    head = ScriptedHead(step_s=0.005, script=lambda submit: [1] * submit.sampling.max_tokens)
    async with running(head) as coordinator:
        short = await coordinator.submit([1], ids(3))
        long = await coordinator.submit([1], ids(1_000_000))
        await coordinator.drain(0.3)
        assert (await finish(short)).outputs[0].finish_reason == "length"
        assert (await finish(long)).outputs[0].finish_reason == "abort"
        with pytest.raises(UnavailableError, match="stopping"):
            await coordinator.submit([1], ids(3))


@in_loop
async def test_nothing_is_left_after_many_requests_of_all_kinds(tokenizer: Tokenizer) -> None:
    head = ScriptedHead(max_sequences=8, step_s=0.0005)
    async with running(head, tokenizer=tokenizer) as coordinator:

        async def one(i: int) -> None:
            stream = await coordinator.submit([i % 50 + 1], ids(1 + i % 17, n=1 + i % 3, stop="q"))
            if i % 3 == 0:
                await asyncio.sleep(0.001 * (i % 11))
                stream.abort()
            await finish(stream)

        await asyncio.gather(*(one(i) for i in range(200)))
        await until(lambda: not head.live)
        assert (coordinator.running, coordinator.waiting) == (0, 0)
        (state,) = coordinator.route_states
        assert (state.outstanding, state.starting_pages) == (0, 0)


@in_loop
async def test_several_streams_through_one_loop() -> None:
    async with running(ScriptedHead()) as coordinator:
        streams = [await coordinator.submit([10 * i], ids(5)) for i in range(4)]
        tokens: list[list[int]] = [[] for _ in streams]
        async for position, update in merge(streams):
            tokens[position] += update.deltas[0].token_ids
        assert tokens == [[10 * i + k for k in range(1, 6)] for i in range(4)]


@pytest.mark.parametrize(
    ("prompt", "sampling", "field"),
    [
        ([], ids(1), "prompt"),
        ("text", ids(1), "prompt"),
        ([4096], ids(1), "prompt"),
        ([1] * 1024, ids(1), "prompt"),
        ([1], ids(1, temperature=-1), "temperature"),
        ([1], ids(1, stop="x"), "stop"),
        ([1], ids(1, stop_token_ids=(4096,)), "stop_token_ids"),
        ([1], ids(1, logit_bias={5000: 1.0}), "logit_bias"),
    ],
)
def test_bad_requests_name_their_field(prompt: str | Sequence[int], sampling: SamplingParams, field: str) -> None:
    @in_loop
    async def refused() -> None:
        async with running(ScriptedHead()) as coordinator:
            with pytest.raises(RequestError) as caught:
                await coordinator.submit(prompt, sampling)
            assert caught.value.where == field
            await finish(await coordinator.submit([1], ids(1)))  # nothing is lost for others
            assert b'outcome="invalid"} 1.0' in coordinator.metrics.exposition()

    refused()


def test_a_text_that_cannot_fit_is_not_tokenized(tokenizer: Tokenizer) -> None:
    @in_loop
    async def refused() -> None:
        async with running(ScriptedHead(), tokenizer=tokenizer) as coordinator:
            with pytest.raises(RequestError, match="characters"):
                await coordinator.submit("x" * 10_000_000, ids(1))

    refused()
