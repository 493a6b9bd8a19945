"""The engine's batching policy over counts: how many tokens and pages, not which.

`hexgen.batching.policy` decides, as it does in the engine; what differs is the table it decides over. A simulated
token has no value, and page numbers and prefix digests change nothing where every prompt is new, so a sequence is
a few integers here. The tests run this and the engine's own `Batcher` in lockstep.
"""

from __future__ import annotations

import itertools
from collections import deque
from typing import cast

from hexgen.batching.limits import BatchLimits
from hexgen.batching.pages import PagePool
from hexgen.batching.policy import PREFILL_RESERVE, form
from hexgen.batching.segments import Admission, Segment
from hexgen.batching.sequence import SequenceState
from hexgen.batching.table import SequenceTable
from hexgen.request import SamplingParams
from hexgen.scheduler.traffic import StepLoad

_NOTED = Admission(0, SamplingParams(), 0)  # the policy only passes admissions on
Part = tuple["CountedSequence", int, int, bool, bool]  # sequence, first position, end, samples, decodes
Windows = tuple[tuple[int | None, int], ...]  # sliding window, how many layers have it; () for none at all


class CountedSequence(SequenceState):
    """A sequence of ``known`` tokens (prompt and output so far) that ends with ``end`` of them."""

    __slots__ = ("end", "first", "group", "known", "last_s", "request")

    def __init__(self, number: int, prompt: int, end: int, request: int) -> None:
        self.number = number
        self.arrival = number
        self.prompt_tokens = prompt
        self.known = prompt
        self.end = end
        self.request = request
        self.pages = cast(list[int], range(0))  # the policy asks only how many
        self.computed = 0
        self.running = False
        self.awaiting = False
        self.admissions = 0
        self.group: CountedStep | None = None  # the step in flight that repeats with it
        self.last_s = 0.0  # when its last token came
        self.first = True  # no token has come yet

    @property
    def tokens(self) -> range:  # type: ignore[override]
        return range(self.known)

    @property
    def remaining(self) -> int:
        return self.known - self.computed


class _CountedPool(PagePool):
    """Pages as a number."""

    def __init__(self, pages: int, page_size: int) -> None:
        super().__init__(0, page_size)
        self.pages = pages
        self.count = pages

    @property
    def available(self) -> int:
        return self.count


class _CountedTable(SequenceTable):
    """As the engine's: which lists a sequence is on. ``blocked``: the first of the waiting found no place when
    last tried, and nothing has been given back since.
    """

    def __init__(self, limits: BatchLimits) -> None:
        super().__init__(BatchLimits(1, 2, 1, 1, 2, prefix_cache=False))
        self.page_size = limits.page_size
        self.pool = self.counted = _CountedPool(limits.pages, limits.page_size)
        self.blocked = False

    def enter(self, state: SequenceState) -> None:
        if not self.waiting:
            self.blocked = False
        super().enter(state)

    def start(self, state: SequenceState, cached: list[int]) -> Admission:
        del self.waiting[state.number]
        self.waiting_tokens -= len(state.tokens)
        self.running[state.number] = state
        self.prefilling[state.number] = state
        state.running = True
        state.admissions += 1
        self.blocked = False
        return _NOTED

    def extend(self, state: SequenceState, tokens: int) -> Segment:
        start = state.computed
        end = state.computed = start + tokens
        pages = -(-end // self.page_size)
        held = len(state.pages)
        if pages > held:
            self.counted.count -= pages - held
            state.pages = cast(list[int], range(pages))
        counted = cast(CountedSequence, state)
        sample = end == counted.known
        decode = self.ready.pop(state.number, None) is not None
        if sample and not decode:
            del self.prefilling[state.number]
        state.awaiting = sample
        return cast(Segment, (state, start, end, sample, decode))

    def accept(self, state: SequenceState, token: int) -> None:
        state.awaiting = False
        cast(CountedSequence, state).known += 1
        if state.running:
            self.ready[state.number] = state
        else:
            self.waiting_tokens += 1

    def preempt(self, state: SequenceState) -> None:
        group = cast(CountedSequence, state).group
        if group is not None:
            self.settle(group)
        super().preempt(state)
        self.blocked = False

    def _withdraw(self, state: SequenceState) -> None:
        number = state.number
        del self.running[number]
        self.ready.pop(number, None)
        self.prefilling.pop(number, None)
        self.counted.count += len(state.pages)
        self.released.append(number)
        state.running = False
        state.pages = cast(list[int], range(0))
        state.computed = 0
        self.blocked = False

    def settle(self, group: CountedStep) -> None:
        """Write into the sequences how often their step was repeated; from here on they are on their own."""
        rounds, page = group.rounds, self.page_size
        for state in group.sampled:
            state.group = None
            if rounds:
                state.known += rounds
                state.computed += rounds
                state.last_s = group.last_s
                state.pages = cast(list[int], range(-(-state.computed // page)))
        group.repeats = False


class CountedStep:
    """A step in flight. ``seen``: positions that its tokens attend to, summed, averaged over sliding windows.

    One that only decodes may come back and leave again many times as it is: ``rounds`` counts them, and its
    sequences hear of it when they are settled.
    """

    __slots__ = (
        "kv_read", "last_s", "left", "number", "parts", "plain", "prompts", "repeats", "residues", "rounds",
        "sampled", "seconds", "seen", "segments", "tokens",
    )  # fmt: skip

    def __init__(self, number: int, parts: list[Part], windows: Windows) -> None:
        self.number = number
        self.parts = parts
        self.sampled: list[CountedSequence] = []
        self.tokens = 0
        self.segments = len(parts)
        self.rounds = 0
        self.last_s = 0.0  # when it last came back, or was formed
        self.seconds: list[float] = []  # on each stage of the route
        seen = read = 0.0
        # Of them, what longer segments bring: tokens, positions seen, KV read, sequences. A prompt's lone last
        # token is a decode to a stage.
        chunk_tokens = chunks = 0
        chunk_seen = chunk_read = 0.0
        for state, start, end, samples, _ in parts:
            self.tokens += end - start
            if samples:
                self.sampled.append(state)
            if end == start + 1:
                context = end if not windows else _windowed(end, windows)
                seen += context
                read += context
            else:
                chunk_tokens += end - start
                chunks += 1
                chunk_seen += _attended(start, end, windows)
                chunk_read += end if not windows else _windowed(end, windows)
        self.seen, self.kv_read = seen + chunk_seen, read + chunk_read
        self.prompts = (float(chunk_tokens), chunk_seen, chunk_read, float(chunks))
        # One token of each sequence: its cost is that of decodes, also where one is a prompt's last.
        self.plain = self.tokens == len(self.sampled) == len(parts) > 0
        self.repeats = False
        self.left = 0
        self.residues: list[int] = []

    @property
    def load(self) -> StepLoad:
        return StepLoad(
            float(self.tokens),
            self.seen,
            self.kv_read,
            float(self.segments),
            float(len(self.sampled)),
            *self.prompts,
        )


class CountedBatcher:
    """One route's `Batcher` over counts: the same calls, the same order, no token values."""

    def __init__(self, limits: BatchLimits, windows: Windows = (), *, repeat: bool = True) -> None:
        self.limits = limits
        self.table = _CountedTable(limits)
        self.in_flight: deque[CountedStep] = deque()
        self.steps = 0
        self.repeated = 0  # of them, without asking the policy
        self._windows = windows
        self._numbers = itertools.count()
        # Below this many sequences the budget never cuts a step of decodes, whatever is kept for prefill.
        self._uncut = limits.token_budget - max(1, int(limits.token_budget * PREFILL_RESERVE))
        self._may_repeat = repeat and not windows and limits.token_budget > 1

    @property
    def free_pages(self) -> int:
        return self.table.counted.count

    def add(self, prompt: int, output: int, request: int) -> CountedSequence:
        """A request joins the queue; its prompt must be shorter than the context."""
        number = next(self._numbers)
        state = CountedSequence(number, prompt, min(prompt + output, self.limits.context), request)
        self.table.enter(state)
        return state

    def next_step(self) -> CountedStep | None:
        """As ``Batcher.next_step``."""
        if len(self.in_flight) >= self.limits.depth:
            return None
        table = self.table
        _, segments = form(table, self.limits, len(self.in_flight), self.steps)
        if not segments and (self.in_flight or not table.released):
            return None
        parts = cast(list[Part], segments)
        step = CountedStep(self.steps, parts, self._windows)
        table.released.clear()
        self.steps += 1
        self.in_flight.append(step)
        if all(part[4] for part in parts):
            if table.waiting and not next(iter(table.waiting.values())).awaiting:
                table.blocked = True
            if parts and self._may_repeat:
                self._open(step)
        return step

    def complete(self) -> list[tuple[CountedSequence, bool]]:
        """The oldest step is back: each sequence that got a token, and whether it ends with it."""
        step = self.in_flight.popleft()
        table = self.table
        if step.repeats:
            table.settle(step)
        done: list[tuple[CountedSequence, bool]] = []
        for state in step.sampled:
            table.accept(state, 0)
            ends = state.known >= state.end
            if ends:
                table.end(state)
            done.append((state, ends))
        return done

    def repeat(self) -> CountedStep | None:
        """Where the oldest step is back, nobody in it ends, and the policy would send the very same decodes again:
        do so, and return it. None where the policy must be asked (``complete``, then ``next_step``).

        It would, because nothing else is ready or in prefill, whoever waits was refused with more room than there
        is now, the step is no larger than a micro-batch, and there are pages.
        """
        step, table = self.in_flight[0], self.table
        if not step.repeats or step.rounds + 1 >= step.left:
            return None
        size = len(step.sampled)
        if (
            table.ready
            or table.prefilling
            or (table.waiting and not table.blocked)
            or size > self._uncut
            or size > -(-len(table.running) // self.limits.depth)
        ):
            return None
        step.rounds += 1
        pages = step.residues[(1 - step.rounds) % self.limits.page_size]
        if pages > table.counted.count:
            step.rounds -= 1
            return None
        table.counted.count -= pages
        table.released.clear()
        step.seen += size
        step.kv_read = step.seen
        self.in_flight.rotate(-1)
        self.steps += 1
        self.repeated += 1
        return step

    def _open(self, step: CountedStep) -> None:
        """Note what `repeat` asks of a step of decodes."""
        page = self.limits.page_size
        residues = [0] * page
        left = self.limits.context
        for state in step.sampled:
            state.group = step
            residues[state.computed % page] += 1
            left = min(left, state.end - state.known)
        step.residues, step.left, step.repeats = residues, left, True


def _windowed(context: int, windows: Windows) -> float:
    layers = sum(n for _, n in windows)
    return sum(n * (context if w is None else min(context, w)) for w, n in windows) / layers


def _attended(start: int, end: int, windows: Windows) -> float:
    """Positions attended to by the tokens at [start, end), each to itself and all before it, windows averaged."""
    if not windows:
        return (end - start) * (start + end + 1) / 2
    layers = sum(n for _, n in windows)
    return sum(n * _attended_within(start, end, w) for w, n in windows) / layers


def _attended_within(start: int, end: int, window: int | None) -> float:
    if window is None or end <= window:
        return (end - start) * (start + end + 1) / 2
    growing = max(0, window - start)  # tokens whose whole past is inside the window
    return growing * (start + start + growing + 1) / 2 + (end - start - growing) * window
