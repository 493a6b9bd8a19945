"""A benchmark from the first look at the server to its figures."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from hexgen.bench.asks import SAFE_VOCABULARY, Ask
from hexgen.bench.client import AnswerError, Client, ServerFacts, ServerState
from hexgen.bench.drive import OnDone, drive
from hexgen.bench.measures import Measures, measures_of
from hexgen.bench.record import Outcome, Record
from hexgen.errors import UnavailableError
from hexgen.workload import Slo

T = TypeVar("T")
MOST_OPEN = 1024  # connections, or streams of one
_WARM_UP_TOKENS = 16  # of each answer that is not measured
_LATE_S = 0.02
_SETTLE_S = 0.25  # heads tell their counts ten times a second
_BUSY = 0.7  # of a core
_REASONS = 3  # told where nothing else is


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """How the load is sent; what it is comes with the asks."""

    concurrency: int | None = None  # None: an open loop, every request when it is due
    warm_ups: int = 1
    timeout_s: float = 600.0
    most_open: int = MOST_OPEN
    slo: Slo = field(default_factory=Slo)


@dataclass(frozen=True, slots=True)
class Bench:
    """What was found. ``before`` and ``after`` are the server's own counts around the run."""

    facts: ServerFacts
    outcome: Outcome
    measures: Measures
    before: ServerState
    after: ServerState
    client_busy: float  # cores that this client kept busy
    load: float  # that other work put on each core of the server's machine before the run; 0: not known
    remarks: tuple[str, ...]


async def run_bench(
    client: Client,
    asks_for: Callable[[ServerFacts], list[Ask]],
    options: BenchOptions,
    *,
    check: Callable[[ServerFacts, ServerState], None] | None = None,
    stop: asyncio.Event | None = None,
    on_done: OnDone | None = None,
) -> Bench:
    """Look at the server, ask it a few things unmeasured, then send the load and measure.

    Setting ``stop`` ends the run with what was measured by then; before that, ``KeyboardInterrupt``.

    ``check`` may refuse the server before anything is measured. Raises ``UnavailableError`` where no server
    answers, where a first request fails, or where every request did: there are no figures of nothing.
    """
    stop = stop or asyncio.Event()
    facts, asks, before = await _unless(stop, _begin(client, asks_for, options))
    if check is not None:
        check(facts, before)
    load = _load_before(client.where)
    busy_s, began_s = time.process_time(), time.perf_counter()
    outcome = await drive(
        client,
        asks,
        concurrency=options.concurrency,
        most_open=options.most_open,
        timeout_s=options.timeout_s,
        stop=stop,
        on_done=on_done,
    )
    busy = (time.process_time() - busy_s) / max(1e-9, time.perf_counter() - began_s)
    await asyncio.sleep(_SETTLE_S)
    after = await client.state()
    measures = measures_of(outcome, options.slo)
    if not measures.completed and measures.failed:
        reasons = "; ".join(f"{n} of them: {reason}" for reason, n in list(measures.reasons.items())[:_REASONS])
        raise UnavailableError(f"none of {measures.failed} requests was answered; {reasons}", where=client.where)
    remarks = _remarks(facts, outcome, measures, busy, load)
    return Bench(facts, outcome, measures, before, after, busy, load, remarks)


def _load_before(where: str) -> float:
    """The load average a core, where the server is on this machine."""
    host = where.partition("://")[2] or where
    if not host.startswith(("127.", "localhost", "[::1]")):
        return 0.0
    return os.getloadavg()[0] / (os.cpu_count() or 1)


async def _begin(
    client: Client, asks_for: Callable[[ServerFacts], list[Ask]], options: BenchOptions
) -> tuple[ServerFacts, list[Ask], ServerState]:
    facts = await client.look()
    asks = asks_for(facts)
    await _warm_up(client, asks, options, facts)
    await asyncio.sleep(_SETTLE_S)
    return facts, asks, await client.state()


async def _unless(stop: asyncio.Event, work: Coroutine[Any, Any, T]) -> T:
    task, stopping = asyncio.create_task(work), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((task, stopping), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise KeyboardInterrupt
        return task.result()
    finally:
        for each in (task, stopping):
            each.cancel()
        await asyncio.gather(task, stopping, return_exceptions=True)


async def _warm_up(client: Client, asks: list[Ask], options: BenchOptions, facts: ServerFacts) -> None:
    """Requests as long as the first, of other tokens: the measured one must not find its prompt in a cache."""
    first = asks[0]
    random = np.random.default_rng(len(asks))
    for number in range(options.warm_ups):
        prompt = first.prompt
        if not isinstance(prompt, str):
            prompt = random.integers(0, facts.vocab_size or SAFE_VOCABULARY, len(prompt), dtype=np.int32)
        ask = replace(first, prompt=prompt, output_tokens=min(first.output_tokens, _WARM_UP_TOKENS))
        record = Record(ask, time.perf_counter())
        try:
            async with asyncio.timeout(options.timeout_s):
                await client.answer(record)
        except (AnswerError, TimeoutError) as error:
            reason = str(error) or f"no end within {options.timeout_s:g} s"
            raise UnavailableError(
                f"request {number + 1} of the warm-up failed: {reason}",
                where=client.where,
                remedy="is the model's name right, and do the lengths fit into its context?",
            ) from error


def _remarks(
    facts: ServerFacts, outcome: Outcome, measures: Measures, busy: float, load: float
) -> tuple[str, ...]:
    """What whoever reads the figures should know."""
    found = []
    if outcome.stopped:
        found.append(f"ended early: {measures.unfinished} requests are in no figure, and their tokens neither")
    if measures.failed:
        found.append(f"{measures.failed} requests failed; they are in no figure but this")
    if facts.max_context is not None:
        longest = max((r.ask.prompt_tokens or 0) + r.ask.output_tokens for r in outcome.records)
        if longest > facts.max_context:
            found.append(f"the longest request has {longest} tokens, the server's context {facts.max_context}")
    late_s = float(np.percentile(measures.late_s, 99)) if measures.late_s.size else 0.0
    if late_s > _LATE_S:
        found.append(f"1 % of the requests were sent {late_s * 1e3:.0f} ms late or more: this client was busy")
    if load > 1:
        found.append(f"this machine had {load:.1f} times as much to do as it has cores before the run began")
    if busy > _BUSY:
        found.append(f"this client kept {busy:.0%} of a core busy: it may be what was measured")
    short = sum(1 for r in outcome.completed if r.output_tokens < r.ask.output_tokens)
    if short:
        found.append(f"{short} answers ended before their length limit (the model's end token, or the context)")
    return tuple(found)
