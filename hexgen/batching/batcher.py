"""The batcher of one route: takes requests and results, gives steps.

It runs on the head, the leader of the route's first stage. The workers run the steps it forms, the simulator
replays them.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterable, Sequence

from hexgen.batching.limits import BatchLimits, BatchStats
from hexgen.batching.policy import form
from hexgen.batching.prefix_cache import PageDigests
from hexgen.batching.segments import SampledToken, Step
from hexgen.batching.sequence import SequenceState
from hexgen.batching.table import SequenceTable
from hexgen.errors import EngineError, RequestError
from hexgen.request import SamplingParams, TokenEvent

__all__ = ["BatchLimits", "BatchStats", "Batcher"]


class Batcher:
    """Forms the steps of one route and takes their results back, in the same order.

    Not thread-safe: one loop owns it. Every step that ``next_step`` returns must travel the route first in, first
    out, and come back through ``complete``, also where it samples nothing.
    """

    def __init__(self, limits: BatchLimits, route: int = 0) -> None:
        self.limits = limits
        self.route = route
        self._table = SequenceTable(limits)
        # Step number, and the sequences that it samples for. Not their numbers: one may live again after an abort.
        self._in_flight: deque[tuple[int, dict[int, SequenceState]]] = deque()
        self._arrivals = 0
        self._steps = 0
        self._output_tokens = 0

    # ---- state -----------------------------------------------------------------------------------------------

    @property
    def running(self) -> int:
        return len(self._table.running)

    @property
    def waiting(self) -> int:
        return len(self._table.waiting)

    @property
    def in_flight(self) -> int:
        """Steps formed and not completed."""
        return len(self._in_flight)

    @property
    def free_pages(self) -> int:
        """Pages that nobody references, cached ones included."""
        return self._table.pool.available

    @property
    def total_pages(self) -> int:
        return self._table.pool.pages

    @property
    def idle(self) -> bool:
        """Nothing lives, nothing is in flight, and the stages have forgotten everything."""
        return not (self._table.live or self._in_flight or self._table.released)

    def stats(self) -> BatchStats:
        table = self._table
        return BatchStats(
            running=self.running,
            waiting=self.waiting,
            in_flight=self.in_flight,
            free_pages=self.free_pages,
            total_pages=self.total_pages,
            steps=self._steps,
            preemptions=table.preemptions,
            cached_tokens=table.cached_tokens,
            prompt_tokens=table.prompt_tokens,
            output_tokens=self._output_tokens,
        )

    def check(self) -> None:
        """``EngineError`` where a page is lost, or held though nothing runs. Walks the whole pool."""
        pool = self._table.pool
        pool.check()
        if not self._table.running and pool.available != pool.pages:
            raise EngineError(
                f"{pool.pages - pool.available} KV pages are held though nothing runs",
                where=f"route {self.route}",
                remedy="this is a defect in the batching policy; please report it",
            )

    # ---- requests --------------------------------------------------------------------------------------------

    def add(
        self,
        sequence: int,
        prompt: tuple[int, ...],
        sampling: SamplingParams,
        stop_token_ids: tuple[int, ...] = (),
        variant: bytes = b"",
    ) -> None:
        """A sequence joins the end of the queue. ``RequestError`` where it can never run; nothing changes then.

        ``stop_token_ids`` end it (the request's own and, unless ignored, the model's end of text). A prompt and
        ``max_tokens`` that pass the context together are fine: it finishes with "length" at the context's end.
        ``variant`` keeps prefixes that were computed with different weights apart.
        """
        where = f"sequence {sequence}"
        if sequence in self._table.live:
            raise RequestError("a sequence of this number is running already", where=where)
        tokens = _prompt_tokens(prompt, self.limits.context, where)
        state = SequenceState(
            number=sequence,
            arrival=self._arrivals,
            tokens=tokens,
            prompt_tokens=len(tokens),
            sampling=sampling,
            stop_token_ids=stop_token_ids,
            stops=frozenset(stop_token_ids),
            digests=PageDigests(tokens, self.limits.page_size, variant) if self.limits.prefix_cache else None,
        )
        self._arrivals += 1
        self._table.enter(state)

    def abort(self, sequences: Iterable[int]) -> None:
        """Forget these; unknown numbers are those that finished meanwhile. Their tokens in flight are dropped."""
        for number in sequences:
            state = self._table.live.get(number)
            if state is not None:
                self._table.end(state)

    # ---- steps -----------------------------------------------------------------------------------------------

    def next_step(self) -> Step | None:
        """The next step, or None where nothing can run now or ``depth`` steps are in flight.

        Sequences that ended are ``released`` with the next step there is. A step without segments carries them
        where nothing can run and no other step is in flight, whose return would soon bring the next.
        """
        if len(self._in_flight) >= self.limits.depth:
            return None
        table = self._table
        admitted, segments = form(table, self.limits, len(self._in_flight), self._steps)
        if not segments and (self._in_flight or not table.released):
            return None
        step = Step(self.route, self._steps, tuple(table.released), tuple(admitted), tuple(segments))
        table.released.clear()
        self._steps += 1
        self._in_flight.append((step.number, {s.sequence: table.running[s.sequence] for s in step.sampled}))
        return step

    def complete(self, step: int, sampled: Sequence[SampledToken]) -> list[TokenEvent]:
        """Take back the oldest step in flight, with one token for each of its sampling segments, in any order.

        Returns the tokens that clients should see; those of aborted sequences are dropped. ``EngineError`` where
        the step or its tokens are not the ones expected; nothing changes then.
        """
        where = f"route {self.route}, step {step}"
        expected, asked = self._in_flight[0] if self._in_flight else (None, {})
        if step != expected:
            raise EngineError(f"results came out of turn; those of step {expected} are due", where=where)
        if len(sampled) != len(asked) or {result.sequence for result in sampled} != asked.keys():
            raise EngineError("the tokens are not those of the step's sampling segments", where=where)
        self._in_flight.popleft()
        events: list[TokenEvent] = []
        context = self.limits.context
        for result in sampled:
            state = asked[result.sequence]
            if state.ended:
                continue
            self._table.accept(state, result.token)
            self._output_tokens += 1
            reason = state.finish_reason(context)
            if reason is not None:
                self._table.end(state)
            events.append(TokenEvent(state.number, result.token, result.logprobs, reason))
        return events


def _prompt_tokens(prompt: tuple[int, ...], context: int, where: str) -> array[int]:
    """The prompt as 4-byte integers; ``RequestError`` where it is empty, too long, or not of token ids."""
    if not prompt:
        raise RequestError("the prompt is empty", where=where, remedy="send at least one token")
    if len(prompt) >= context:
        raise RequestError(
            f"the prompt has {len(prompt)} tokens; at most {context - 1} leave room for an answer",
            where=where,
            remedy="shorten the prompt",
        )
    try:
        tokens = array("i", prompt)
    except (OverflowError, TypeError) as error:
        raise RequestError("the prompt holds something that is no token id", where=where) from error
    if min(tokens) < 0:
        raise RequestError("the prompt holds a negative token id", where=where)
    return tokens
