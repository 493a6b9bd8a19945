"""The engine's batching policy over counts: how many tokens and pages, not which.

`hexgen.batching.policy` decides, as it does in the engine; what differs is the table it decides over. A simulated
token has no value, and page numbers and prefix digests change nothing where every prompt is new, so sequences are
a few integers, and those that decode together are counted together (`cohort.py`). The tests run this and the
engine's own `Batcher` in lockstep.
"""

from __future__ import annotations

from collections import deque
from typing import cast

from hexgen.batching.limits import BatchLimits
from hexgen.batching.pages import PagePool
from hexgen.batching.policy import PREFILL_RESERVE, form
from hexgen.batching.segments import Admission, Segment
from hexgen.batching.table import SequenceTable
from hexgen.request import SamplingParams
from hexgen.scheduler.simulation.cohort import Cohort, CountedSequence, Part
from hexgen.scheduler.simulation.step import CountedStep, Returned, Windows

_NOTED = Admission(0, SamplingParams(), 0)  # the policy only passes admissions on


class _CountedPool(PagePool):
    """Pages as a number."""

    def __init__(self, pages: int, page_size: int) -> None:
        super().__init__(0, page_size)
        self.pages = pages
        self.count = pages

    @property
    def available(self) -> int:
        return self.count


class CountedTable(SequenceTable):
    """As the engine's: which lists a sequence is on. Ready sequences stand in cohorts, longest ready first; where
    pages are short, each stands for itself in ``loose`` until the step is formed.

    ``blocked``: the first of the waiting found no place when last tried, and nothing has been given back since.
    """

    def __init__(self, limits: BatchLimits) -> None:
        super().__init__(BatchLimits(1, 2, 1, 1, 2, prefix_cache=False))
        self.page_size = limits.page_size
        self.pool = self.counted = _CountedPool(limits.pages, limits.page_size)
        self.blocked = False
        self.queue: deque[Cohort] = deque()
        self.loose: dict[int, CountedSequence] = {}
        self._ready = 0

    # ---- ready sequences -------------------------------------------------------------------------------------

    @property
    def ready_count(self) -> int:
        return self._ready

    def returned(self, cohort: Cohort) -> None:
        """Its step is back, and its members are ready."""
        self.queue.append(cohort)
        self._ready += cohort.size

    def pages_to_decode(self, count: int) -> int:
        if count == 0:
            return 0
        self._front(count)
        return self.queue[0].pages

    def decode(self, count: int) -> list[Segment]:
        if count == 0:
            return []
        cohort = self.queue.popleft()  # `pages_to_decode` has cut it to size
        self._ready -= count
        cohort.sent = True
        self.counted.count -= cohort.advance()
        return [cast(Segment, cohort)]

    def _front(self, count: int) -> None:
        """The first cohort has ``count`` members from here on."""
        queue = self.queue
        first = queue.popleft()
        while first.size < count:
            first = first.merged(queue.popleft())
        if first.size > count:
            first, rest = first.split(count)
            queue.appendleft(rest)
        queue.appendleft(first)

    def longest_ready(self, count: int) -> list[CountedSequence]:  # type: ignore[override]
        self._loosen()
        return list(self.loose.values())[:count]

    def oldest_idle(self) -> CountedSequence | None:
        self._loosen()
        return cast(CountedSequence | None, super().oldest_idle())

    def _loosen(self) -> None:
        while self.queue:
            for state in self.queue.popleft().dissolve():
                self.loose[state.number] = state
                state.pages = self._pages(state)

    def gather(self) -> None:
        """Whoever was not chosen is ready as before."""
        if self.loose:
            self.queue.append(Cohort.of(self.loose.values(), self.page_size, sent=False))
            self.loose.clear()

    def postpone(self, state: CountedSequence) -> None:  # type: ignore[override]
        if state.number in self.loose:
            self.loose[state.number] = self.loose.pop(state.number)

    def _pages(self, state: CountedSequence) -> list[int]:
        return cast(list[int], range(-(-state.computed // self.page_size)))  # the policy asks only how many

    # ---- all others ------------------------------------------------------------------------------------------

    def enter(self, state: CountedSequence) -> None:  # type: ignore[override]
        if not self.waiting:
            self.blocked = False
        self.waiting[state.number] = state
        self.waiting_tokens += state.known

    def start(self, state: CountedSequence, cached: list[int]) -> Admission:  # type: ignore[override]
        number = state.number
        del self.waiting[number]
        self.waiting_tokens -= state.known
        self.running[number] = state
        self.prefilling[number] = state
        state.running = True
        state.pages = cached
        self.blocked = False
        return _NOTED

    def extend(self, state: CountedSequence, tokens: int) -> Segment:  # type: ignore[override]
        start = state.computed
        end = state.computed = start + tokens
        pages = state.pages = self._pages(state)
        self.counted.count -= len(pages) - -(-start // self.page_size)
        sample = end == state.known
        decode = bool(self.loose) and self.loose.pop(state.number, None) is not None
        if decode:
            self._ready -= 1
        elif sample:
            del self.prefilling[state.number]
        state.waits = sample
        return cast(Segment, (state, start, end, sample, decode))

    def accept(self, state: CountedSequence, token: int) -> None:  # type: ignore[override]
        """A token of a sequence in no cohort: its first since it was admitted, or the last before it left."""
        state.waits = False
        state.known += 1
        if not state.running:
            self.waiting_tokens += 1

    def preempt(self, state: CountedSequence) -> None:  # type: ignore[override]
        if state.cohort is not None:  # in flight: those that are ready stand for themselves by now
            state.cohort.orphan(state)
        self.withdraw(state)
        self.waiting[state.number] = state
        self.waiting.move_to_end(state.number, last=False)
        self.waiting_tokens += state.known
        self.preemptions += 1

    def end(self, state: CountedSequence) -> None:  # type: ignore[override]
        if state.running:
            self.withdraw(state)
        else:
            del self.waiting[state.number]
            self.waiting_tokens -= state.known

    def withdraw(self, state: CountedSequence) -> None:
        number = state.number
        del self.running[number]
        if self.loose.pop(number, None) is not None:
            self._ready -= 1
        self.prefilling.pop(number, None)
        self.counted.count += -(-state.computed // self.page_size)
        self.released.append(number)
        state.running = False
        state.pages = []
        state.computed = 0
        self.blocked = False


class CountedBatcher:
    """One route's `Batcher` over counts: the same calls, the same order, no token values."""

    def __init__(self, limits: BatchLimits, windows: Windows = ()) -> None:
        self.limits = limits
        self.table = CountedTable(limits)
        self.in_flight: deque[CountedStep] = deque()
        self.steps = 0
        self.repeated = 0  # of them, without asking the policy
        self._windows = windows
        self._context = limits.context
        self._added = 0
        # Below this many sequences the budget never cuts a step of decodes, whatever is kept for prefill.
        self._uncut = limits.token_budget - max(1, int(limits.token_budget * PREFILL_RESERVE))
        self._may_repeat = not windows and limits.token_budget > 1

    @property
    def free_pages(self) -> int:
        return self.table.counted.count

    @property
    def running(self) -> int:
        return len(self.table.running)

    @property
    def waiting(self) -> int:
        return len(self.table.waiting)

    @property
    def preemptions(self) -> int:
        return self.table.preemptions

    def add(self, prompt: int, output: int, request: int) -> None:
        """A request joins the queue; its prompt must be shorter than the context."""
        self.table.enter(CountedSequence(self._added, prompt, min(prompt + output, self._context), request))
        self._added += 1

    def next_step(self) -> CountedStep | None:
        """As ``Batcher.next_step``."""
        in_flight, table = self.in_flight, self.table
        if len(in_flight) >= self.limits.depth:
            return None
        _, segments = form(table, self.limits, len(in_flight), self.steps)
        table.gather()
        if not segments and (in_flight or not table.released):
            return None
        step = CountedStep(cast("list[Cohort | Part]", segments), table.page_size, self._windows)
        table.released.clear()
        self.steps += 1
        in_flight.append(step)
        if table.waiting and not step.chunks and not next(iter(table.waiting.values())).awaiting:
            table.blocked = True
        return step

    def complete(self, now_s: float) -> Returned:
        """The oldest step is back."""
        step, table = self.in_flight.popleft(), self.table
        cohort = step.cohort
        gaps: list[tuple[float, int]] = []
        began: list[CountedSequence] = []
        ended: list[CountedSequence] = []
        if cohort is not None:
            gaps = cohort.arrive(now_s)
            ended = cohort.ended()
            for state in ended:
                table.end(state)
        singles = step.finishing if cohort is None or not cohort.orphans else [*cohort.orphans, *step.finishing]
        for state in singles:
            table.accept(state, 0)
            if state.first:
                state.first = False
                began.append(state)
            else:
                gaps.append((now_s - state.last_s, 1))
            state.last_s = now_s
            if state.known >= state.end:
                table.end(state)
                ended.append(state)
            elif state.running:
                if cohort is None:
                    cohort = Cohort(table.page_size, now_s)
                cohort.join(state, now_s)
        if cohort is not None:
            cohort.orphans.clear()
            if step.order is not None:
                cohort = cohort.ordered(step.order)
            if cohort.size:
                table.returned(cohort)
        return Returned(step.samples, gaps, began, ended)

    def repeat(self, now_s: float) -> list[tuple[float, int]] | None:
        """Where the oldest step is back, nobody in it ends, and the policy would send the very same decodes again:
        do so, and return the gaps as `complete` does. None where the policy must be asked (``complete``, then
        ``next_step``).

        It would, because nothing else is ready or in prefill, whoever waits was refused with more room than there
        is now, the step is no larger than a micro-batch, and there are pages.
        """
        step, table = self.in_flight[0], self.table
        cohort = step.cohort
        if cohort is None or not self.may_repeat(step, cohort):
            return None
        pages = cohort.pages
        if cohort.left <= 0 or pages > table.counted.count:
            return None
        gaps = cohort.arrive(now_s)
        cohort.sent = True
        cohort.advance()
        table.counted.count -= pages
        table.released.clear()
        step.attended = step.kv_read = float(cohort.total)
        self.in_flight.rotate(-1)
        self.steps += 1
        self.repeated += 1
        return gaps

    def may_repeat(self, step: CountedStep, cohort: Cohort) -> bool:
        """Whether the step would go again as it is, as far as ends and pages do not matter."""
        table = self.table
        return not (
            step.chunks
            or table.ready_count
            or table.prefilling
            or (table.waiting and not table.blocked)
            or cohort.orphans
            or cohort.size > self._uncut
            or cohort.size > -(-len(table.running) // self.limits.depth)
            or not self._may_repeat
        )
