"""A route that runs the batcher's steps on paper: page tables, and what each slot of each page holds.

Every step is executed in order when its results are due, as late as the batcher allows, and every position that a
segment would attend to is compared with what the sequence, alone, would have put there.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from hexgen.batching.batcher import Batcher, BatchLimits
from hexgen.batching.segments import SampledToken, SegmentKind, Step
from hexgen.request import SamplingParams

VOCABULARY = 11


@dataclass(eq=False)
class Client:
    """One sequence as its client sees it, and the digests of all its prefixes."""

    number: int
    order: int
    prompt: tuple[int, ...]
    sampling: SamplingParams
    stops: tuple[int, ...]
    tokens: list[int] = field(default_factory=list)
    digests: list[int] = field(default_factory=list)  # of tokens[: i + 1]
    reason: str | None = None
    aborted: bool = False

    def __post_init__(self) -> None:
        for token in self.prompt:
            self.append(token)

    def append(self, token: int) -> None:
        self.tokens.append(token)
        self.digests.append(hash((self.digests[-1] if self.digests else 0, token)))


def model(digest: int) -> int:
    """The next token, from all the tokens so far."""
    return (digest >> 7) % VOCABULARY


def alone(client: Client, context: int) -> tuple[list[int], str]:
    """What the client would get with the whole route to itself: all tokens, and why they end."""
    twin = Client(client.number, 0, client.prompt, client.sampling, client.stops)
    while True:
        token = model(twin.digests[-1])
        twin.append(token)
        outputs = len(twin.tokens) - len(twin.prompt)
        if token in client.stops and outputs >= client.sampling.min_tokens:
            return twin.tokens, "stop"
        if outputs == client.sampling.max_tokens or len(twin.tokens) == context:
            return twin.tokens, "length"


class PaperRoute:
    """Drives a ``Batcher``; raises AssertionError at the first thing that is not as it must be."""

    def __init__(self, limits: BatchLimits) -> None:
        self.limits = limits
        self.batcher = Batcher(limits)
        self.clients: dict[int, Client] = {}  # live, by number
        self.done: list[Client] = []
        self.steps: deque[tuple[Step, dict[int, Client]]] = deque()
        self.head_running: dict[int, Client] = {}  # as of the last step formed
        self.tables: dict[int, tuple[Client, list[int]]] = {}  # as of the last step executed
        self.slots: dict[tuple[int, int], int] = {}  # (page, offset) -> digest of the prefix that ends there
        self.preempted: list[int] = []
        self.formed: list[Step] = []
        self._orders = 0

    def add(
        self, number: int, prompt: tuple[int, ...], sampling: SamplingParams, stops: tuple[int, ...] = ()
    ) -> Client:
        client = Client(number, self._orders, prompt, sampling, stops)
        self.batcher.add(number, prompt, sampling, stops)
        self._orders += 1
        self.clients[number] = client
        return client

    def abort(self, number: int) -> None:
        self.batcher.abort([number])
        client = self.clients.pop(number, None)
        if client is not None:
            client.aborted = True

    # ---- forming ---------------------------------------------------------------------------------------------

    def form(self) -> Step | None:
        """Ask for the next step; what it says of itself is checked now, what it computes when it is executed."""
        before = dict(self.head_running)
        step = self.batcher.next_step()
        if step is None:
            return None
        assert step.route == self.batcher.route
        assert step.number == (self.formed[-1].number + 1 if self.formed else 0)
        assert step.tokens <= self.limits.token_budget
        assert step.segments or step.released
        assert len({s.sequence for s in step.segments}) == len(step.segments)
        victims: list[Client] = []
        for number in step.released:
            client = self.head_running.pop(number)
            if client.reason is None and not client.aborted:
                victims.append(client)
        for admission in step.admitted:
            assert admission.sequence not in self.head_running
            queue = [c.order for n, c in self.clients.items() if n not in self.head_running]
            assert self.clients[admission.sequence].order == min(queue), "somebody jumped the queue"
            self.head_running[admission.sequence] = self.clients[admission.sequence]
        self._check_victims(before, victims)
        self.preempted.extend(client.number for client in victims)
        assert len(self.head_running) <= self.limits.max_sequences
        assert all(s.sequence in self.head_running for s in step.segments)
        self.steps.append((step, {a.sequence: self.clients[a.sequence] for a in step.admitted}))
        assert len(self.steps) == self.batcher.in_flight <= self.limits.depth
        self.formed.append(step)
        return step

    def _check_victims(self, before: dict[int, Client], victims: list[Client]) -> None:
        """Only the youngest give way, and never the oldest."""
        if not victims:
            return
        alive = [c for c in before.values() if c.reason is None and not c.aborted]
        stayed = [c.order for c in alive if c not in victims]
        assert stayed, "everything was preempted"
        assert min(c.order for c in victims) > max(stayed)

    # ---- executing -------------------------------------------------------------------------------------------

    def complete(self) -> bool:
        """Execute the oldest step in flight and hand its tokens back; False where there is none."""
        if not self.steps:
            return False
        step, admitted = self.steps.popleft()
        sampled = self._execute(step, admitted)
        for event in self.batcher.complete(step.number, sampled):
            client = self.clients[event.request]
            assert event.token == model(client.digests[-1])
            client.append(event.token)
            client.reason = event.finish_reason
            if event.finish_reason is not None:
                self.done.append(self.clients.pop(client.number))
        return True

    def _execute(self, step: Step, admitted: dict[int, Client]) -> list[SampledToken]:
        for number in step.released:
            del self.tables[number]
        for admission in step.admitted:
            client = admitted[admission.sequence]
            assert admission.sequence not in self.tables
            assert admission.prompt_tokens == len(client.prompt)
            assert admission.stop_token_ids == client.stops
            assert len(admission.pages) * self.limits.page_size < len(client.tokens)
            if client.sampling.needs_history:
                assert list(admission.history) == client.tokens
            else:
                assert admission.history == ()
            self.tables[admission.sequence] = (client, list(admission.pages))
        assert len(self.tables) <= self.limits.max_sequences
        size = self.limits.page_size
        written: set[tuple[int, int]] = set()
        for segment in step.segments:
            client, pages = self.tables[segment.sequence]
            pages.extend(segment.new_pages)
            assert len(set(pages)) == len(pages) == -(-segment.end // size)
            assert all(0 <= page < self.limits.pages for page in segment.new_pages)
            assert tuple(client.tokens[segment.start : segment.end]) == segment.tokens != ()
            for position in range(segment.start, segment.end):
                slot = (pages[position // size], position % size)
                assert slot not in written, "two segments write one slot in one step"
                written.add(slot)
                self.slots[slot] = client.digests[position]
        sampled: list[SampledToken] = []
        for segment in step.segments:
            client, pages = self.tables[segment.sequence]
            for position in range(segment.end):
                assert self.slots[pages[position // size], position % size] == client.digests[position]
            if segment.kind is SegmentKind.DECODE:
                assert len(segment.tokens) == 1
                assert segment.sample
            assert segment.sample == (segment.end == len(client.tokens))
            if segment.sample:
                sampled.append(SampledToken(segment.sequence, model(client.digests[segment.end - 1])))
        return sampled

    # ---- to the end ------------------------------------------------------------------------------------------

    def drain(self) -> None:
        """Run until nothing is left; everything must finish, with the tokens it would get alone."""
        while True:
            while self.form() is not None:
                pass
            if not self.complete():
                break
        assert not self.clients, f"never finished: {sorted(self.clients)}"
        assert self.batcher.idle
        assert self.batcher.running == self.batcher.waiting == self.batcher.in_flight == 0
        assert self.batcher.free_pages == self.batcher.total_pages
        assert not self.tables, "the stages were not told of everything that ended"
        self.batcher.check()
        assert self.batcher._table.waiting_tokens == 0
        for client in self.done:
            assert (client.tokens, client.reason) == alone(client, self.limits.context)
