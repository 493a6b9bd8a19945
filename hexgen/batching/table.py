"""The sequences of one route and the pages they hold: every change of state, no opinion on which to make."""

from __future__ import annotations

from collections import OrderedDict
from itertools import islice

from hexgen.batching.limits import BatchLimits
from hexgen.batching.pages import PagePool
from hexgen.batching.prefix_cache import PrefixCache
from hexgen.batching.segments import Admission, Segment, SegmentKind
from hexgen.batching.sequence import SequenceState


class SequenceTable:
    """Waiting, running, and of the running those that prefill and those ready to decode.

    ``running`` and ``waiting`` are in order of arrival, and everything running arrived before everything waiting:
    ``start`` takes the first of the waiting, ``preempt`` puts the last of the running back in front of them.
    Readers may look at everything here; only the methods change it. Each costs O(pages it moves).
    """

    def __init__(self, limits: BatchLimits) -> None:
        self.page_size = limits.page_size
        self.pool = PagePool(limits.pages, limits.page_size)
        self.cache = PrefixCache(self.pool) if limits.prefix_cache else None
        self.live: dict[int, SequenceState] = {}
        self.waiting: OrderedDict[int, SequenceState] = OrderedDict()
        self.running: dict[int, SequenceState] = {}
        self.prefilling: dict[int, SequenceState] = {}  # running, not all known tokens are computed
        self.ready: dict[int, SequenceState] = {}  # running, a token came back; longest ready first
        self.released: list[int] = []  # the stages have yet to hear of these
        self.waiting_tokens = 0
        self.preemptions = 0
        self.prompt_tokens = 0  # of all sequences ever started
        self.cached_tokens = 0  # those of prompt_tokens that the prefix cache served

    @property
    def first_waiting(self) -> SequenceState | None:
        return next(iter(self.waiting.values()), None)

    @property
    def ready_count(self) -> int:
        return len(self.ready)

    def longest_ready(self, count: int) -> list[SequenceState]:
        return list(islice(self.ready.values(), count))

    def oldest_idle(self) -> SequenceState | None:
        """The oldest running sequence that awaits no token."""
        return next((state for state in self.running.values() if not state.awaiting), None)

    def pages_to_decode(self, count: int) -> int:
        """New pages that the next token of the ``count`` longest ready needs."""
        size = self.page_size
        return sum(s.computed == len(s.pages) * size for s in islice(self.ready.values(), count))

    def enter(self, state: SequenceState) -> None:
        """A new sequence, at the end of the queue."""
        self.live[state.number] = state
        self.waiting[state.number] = state
        self.waiting_tokens += len(state.tokens)

    def cached_pages(self, state: SequenceState) -> list[int]:
        """The pages of its longest cached prefix, not yet referenced."""
        if self.cache is None or state.digests is None:
            return []
        return self.cache.match(state.digests, len(state.tokens))

    def start(self, state: SequenceState, cached: list[int]) -> Admission:
        """The first of the waiting starts to run, holding ``cached`` pages."""
        self.pool.share(cached)
        del self.waiting[state.number]
        self.waiting_tokens -= len(state.tokens)
        self.running[state.number] = state
        self.prefilling[state.number] = state
        state.running = True
        state.pages = cached
        state.registered = len(cached)
        state.computed = len(cached) * self.page_size
        if state.admissions == 0:
            self.prompt_tokens += state.prompt_tokens
            self.cached_tokens += state.computed
        state.admissions += 1
        return Admission(
            sequence=state.number,
            sampling=state.sampling,
            prompt_tokens=state.prompt_tokens,
            pages=tuple(cached),
            history=tuple(state.tokens) if state.sampling.needs_history else (),
            stop_token_ids=state.stop_token_ids,
        )

    def extend(self, state: SequenceState, tokens: int) -> Segment:
        """The segment of the next ``tokens`` tokens of a running sequence, for which pages are available."""
        start = state.computed
        end = start + tokens
        new_pages: tuple[int, ...] = ()
        if end > len(state.pages) * self.page_size:
            new_pages = tuple(self.pool.allocate(self.pool.pages_for(end) - len(state.pages)))
            state.pages.extend(new_pages)
        sample = end == len(state.tokens)
        decode = self.ready.pop(state.number, None) is not None
        if sample and not decode:
            del self.prefilling[state.number]
        state.computed = end
        state.awaiting = sample
        if end // self.page_size > state.registered:
            self._register(state)
        return Segment(
            sequence=state.number,
            kind=SegmentKind.DECODE if decode else SegmentKind.PREFILL,
            start=start,
            tokens=tuple(state.tokens[start:end]),
            new_pages=new_pages,
            sample=sample,
        )

    def decode(self, count: int) -> list[Segment]:
        """A token more for each of the ``count`` longest ready, for which pages are available."""
        return [self.extend(state, 1) for state in self.longest_ready(count)]

    def accept(self, state: SequenceState, token: int) -> None:
        """The token that a live sequence was awaiting, running or preempted meanwhile."""
        state.awaiting = False
        state.tokens.append(token)
        if state.running:
            self.ready[state.number] = state
        else:
            self.waiting_tokens += 1

    def postpone(self, state: SequenceState) -> None:
        """Others that are ready come first the next time."""
        if state.number in self.ready:
            self.ready[state.number] = self.ready.pop(state.number)

    def preempt(self, state: SequenceState) -> None:
        """The last of the running gives up its pages and waits in front, to be computed again."""
        self._withdraw(state)
        self.waiting[state.number] = state
        self.waiting.move_to_end(state.number, last=False)
        self.waiting_tokens += len(state.tokens)
        self.preemptions += 1

    def end(self, state: SequenceState) -> None:
        """Finished or aborted, wherever it stands."""
        state.ended = True
        del self.live[state.number]
        if state.running:
            self._withdraw(state)
        else:
            del self.waiting[state.number]
            self.waiting_tokens -= len(state.tokens)

    def _withdraw(self, state: SequenceState) -> None:
        del self.running[state.number]
        self.ready.pop(state.number, None)
        self.prefilling.pop(state.number, None)
        self.pool.release(state.pages)
        self.released.append(state.number)
        state.running = False
        state.pages = []
        state.registered = 0
        state.computed = 0

    def _register(self, state: SequenceState) -> None:
        """Offer full pages to others at once: steps run in order, and write before they read."""
        if self.cache is None or state.digests is None:
            return
        full = state.computed // self.page_size
        for index in range(state.registered, full):
            self.cache.register(state.pages[index], state.digests[index])
        state.registered = full
