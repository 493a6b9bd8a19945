"""The simulator's batching over counts does what the engine's batcher does, step by step."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from hexgen.batching.batcher import Batcher
from hexgen.batching.limits import BatchLimits
from hexgen.batching.segments import SampledToken, SegmentKind
from hexgen.request import SamplingParams
from hexgen.scheduler.simulation.counted import CountedBatcher, CountedStep

Seen = list[tuple[int, int, int, bool, bool]]  # sequence, start, end, samples, decodes


@dataclass
class Lockstep:
    """Both batchers, given the same events in the same order."""

    limits: BatchLimits
    repeat: bool  # as the simulator does where it can

    def __post_init__(self) -> None:
        self.real = Batcher(self.limits)
        self.counted = CountedBatcher(self.limits)
        self.sent: list[tuple[int, tuple[int, ...]]] = []  # real steps in flight, and who samples
        self.added = 0
        self.ended: list[int] = []

    def add(self, prompt: int, output: int) -> None:
        if prompt >= self.limits.context:
            return
        sampling = SamplingParams(max_tokens=output, ignore_eos=True)
        first = self.added * 10_000  # no prefix in common
        self.real.add(self.added, tuple(range(first, first + prompt)), sampling)
        self.counted.add(prompt, output, self.added)
        self.added += 1
        self.form()

    def form(self) -> None:
        """All the steps that may leave now are the same."""
        while True:
            real, counted = self.real.next_step(), self.counted.next_step()
            assert (real is None) == (counted is None)
            if real is None or counted is None:
                break
            expected = [
                (s.sequence, s.start, s.end, s.sample, s.kind == SegmentKind.DECODE)
                for s in sorted(real.segments, key=lambda s: s.kind != SegmentKind.DECODE)
            ]
            assert _parts(counted) == expected
            assert counted.tokens == sum(end - start for _, start, end, _, _ in expected)
            assert counted.attended == sum(
                (end - start) * (start + end + 1) / 2 for _, start, end, _, _ in expected
            )
            self.sent.append((real.number, tuple(s.sequence for s in real.sampled)))
        self.same_state()

    def back(self) -> None:
        """The oldest step comes back."""
        if not self.sent:
            return
        number, sampled = self.sent.pop(0)
        events = self.real.complete(number, [SampledToken(s, 1) for s in sampled])
        if not self.repeat or self.counted.repeat(0.0) is None:
            back = self.counted.complete(0.0)
            assert back.tokens == len(events)
            assert sorted(s.number for s in back.ended) == sorted(
                e.request for e in events if e.finish_reason is not None
            )
            assert all(s.known == s.end for s in back.ended)
            assert sum(count for _, count in back.gaps) + len(back.began) == len(events)
            self.ended += [s.number for s in back.ended]
            self.form()
            return
        # The real one sends the same decodes again, and nothing else.
        repeated = self.counted.in_flight[-1]
        assert all(e.finish_reason is None for e in events)
        step = self.real.next_step()
        assert step is not None
        assert [(s.sequence, s.kind) for s in step.segments] == [
            (number, SegmentKind.DECODE) for number, *_ in _parts(repeated)
        ]
        assert repeated.attended == sum(s.end for s in step.segments)
        assert self.real.next_step() is None
        self.sent.append((step.number, tuple(s.sequence for s in step.sampled)))
        self.same_state()

    def same_state(self) -> None:
        table = self.counted.table
        assert self.real.free_pages == self.counted.free_pages
        assert (self.real.running, self.real.waiting) == (self.counted.running, self.counted.waiting)
        assert self.real.stats().preemptions == table.preemptions
        assert self.real.in_flight == len(self.counted.in_flight)


def test_prompts_are_told_from_decodes() -> None:
    """What stages are charged for; a prompt's lone last token is a decode to them."""
    batcher = CountedBatcher(BatchLimits(200, 16, 512, 16, 1000, depth=1, prefix_cache=False))
    for prompt in (10, 20):
        batcher.add(prompt, 5, 0)
    first = batcher.next_step()
    assert first is not None
    load = first
    assert (load.tokens, load.prefill_tokens, load.prefill_sequences) == (30, 30, 2)
    assert load.prefill_attended == load.attended == 55 + 210
    batcher.complete(0.0)
    batcher.add(40, 5, 0)
    second = batcher.next_step()
    assert second is not None
    load = second
    assert (load.tokens, load.sequences, load.samples) == (42, 3, 3)
    assert (load.prefill_tokens, load.prefill_attended, load.prefill_kv_read) == (40, 820, 40)
    assert (load.prefill_sequences, load.attended - load.prefill_attended) == (1, 11 + 21)
    batcher.complete(0.0)
    batcher.add(1, 5, 0)
    third = batcher.next_step()
    assert third is not None
    assert third.plain
    assert third.prefill_tokens == 0


def _parts(step: CountedStep) -> Seen:
    """In the order of the policy: where pages are short, by arrival."""
    cohort = step.cohort
    decodes = [] if cohort is None else [(s, s.base + cohort.rounds - 1, s.base + cohort.rounds) for s in cohort]
    parts = [(s.number, start, end, True, True) for s, start, end in decodes]
    parts += [(s.number, *rest) for s, *rest in step.chunks]  # type: ignore[misc]
    return parts


limits = st.builds(
    BatchLimits,
    pages=st.integers(4, 60),
    page_size=st.sampled_from([1, 2, 4, 16]),
    token_budget=st.sampled_from([1, 2, 16, 64, 512]),
    max_sequences=st.integers(1, 12),
    max_context=st.integers(8, 400),
    depth=st.integers(1, 5),
    prefix_cache=st.just(False),
)
events = st.lists(
    st.one_of(
        st.tuples(st.integers(1, 60), st.integers(1, 40)),  # a request: prompt, output
        st.integers(1, 30),  # so many steps come back
    ),
    min_size=4,
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(limits, events, st.booleans())
def test_counts_follow_the_engine(limits: BatchLimits, events: list[tuple[int, int] | int], repeat: bool) -> None:
    pair = Lockstep(limits, repeat)
    for event in events:
        if isinstance(event, tuple):
            pair.add(*event)
        else:
            for _ in range(event):
                pair.back()
    for _ in range(100_000):
        if not pair.sent:
            break
        pair.back()
    assert sorted(pair.ended) == list(range(pair.added))
    assert pair.counted.free_pages == limits.pages


def test_steady_decodes_are_repeated() -> None:
    pair = Lockstep(BatchLimits(200, 16, 512, 16, 1000, depth=4, prefix_cache=False), repeat=True)
    for _ in range(8):
        pair.add(20, 100)
    while pair.sent:
        pair.back()
    assert len(pair.ended) == 8
    assert pair.counted.repeated > 0.8 * pair.counted.steps
