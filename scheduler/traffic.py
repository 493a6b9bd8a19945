"""What a workload asks of one route, and what one step of it carries."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

from hexgen.batching.policy import PREFILL_CHUNK_FLOOR, PREFILL_ROUNDS
from hexgen.model import ModelSpec
from hexgen.plan import EngineOptions
from hexgen.scheduler.lengths import mean_age
from hexgen.workload import Slo, Workload


@dataclass(frozen=True, slots=True)
class StepLoad:
    """What one step carries through a stage. Averages, so not always whole numbers.

    ``attended``: summed over the new tokens, how many positions each attends to (decides FLOPs). ``kv_read``:
    summed over the sequences, how many tokens of KV are read (decides bytes). Both are already averaged over the
    layers' sliding windows. ``samples``: rows of logits. The ``prefill_`` figures are the prompts' part of these:
    attention works through prompts and decodes one after the other, and each may be bound by something else.
    """

    tokens: float
    attended: float
    kv_read: float
    sequences: float
    samples: float
    prefill_tokens: float = 0.0
    prefill_attended: float = 0.0
    prefill_kv_read: float = 0.0
    prefill_sequences: float = 0.0

    def plus(self, other: StepLoad) -> StepLoad:
        return StepLoad(
            self.tokens + other.tokens,
            self.attended + other.attended,
            self.kv_read + other.kv_read,
            self.sequences + other.sequences,
            self.samples + other.samples,
            self.prefill_tokens + other.prefill_tokens,
            self.prefill_attended + other.prefill_attended,
            self.prefill_kv_read + other.prefill_kv_read,
            self.prefill_sequences + other.prefill_sequences,
        )


@dataclass(frozen=True, slots=True)
class Traffic:
    """A workload as one route sees it; lengths in tokens. ``prompt`` and ``output`` are means over requests, the
    other two over tokens, where long requests count for more (`hexgen.scheduler.lengths.mean_age`).
    """

    prompt: float
    output: float
    prompt_seen: float  # of its prompt that a prompt's token attends to
    output_age: float  # how many tokens a running request has put out
    rate: float | None  # requests/s of the whole cluster; None: as many as are served
    slo: Slo
    token_budget: int
    max_sequences: int
    page_size: int
    windows: tuple[tuple[int | None, int], ...]  # (sliding window, how many layers have it)

    @property
    def peak_tokens(self) -> int:
        """KV tokens of one mean request at its end, in whole pages: the least a route must hold."""
        return math.ceil((self.prompt + self.output) / self.page_size) * self.page_size

    @property
    def resident_tokens(self) -> float:
        """KV tokens that one running request holds (half of its last page is empty), averaged over all that run.

        By Little's law E[prompt x output + output^2 / 2] / E[output]: how long a request stays says nothing of its
        prompt, but of its age.
        """
        return self.prompt + self.output_age + self.page_size / 2

    @property
    def of_mean_lengths(self) -> Traffic:
        """The same if every request had the mean lengths."""
        return replace(self, prompt_seen=self.prompt / 2, output_age=self.output / 2)

    @property
    def chunks(self) -> int:
        """Steps that one prompt takes."""
        return max(1, math.ceil(self.prompt / self.token_budget))

    def chunk(self, depth: int) -> float:
        """Prompt tokens that a step takes while sequences decode and prompts come one at a time.

        As `hexgen.batching.policy` has it: on one stage all that fit beside the decodes; on a pipeline a prompt is
        dealt over rounds of ``depth`` steps, in chunks not below the policy's floor.
        """
        steps = depth * PREFILL_ROUNDS
        dealt = self.prompt if depth == 1 else max(PREFILL_CHUNK_FLOOR, self.prompt / steps)
        return min(float(self.token_budget), self.prompt, dealt)

    @property
    def decodes(self) -> float:
        """Decode steps of one request; its first token comes from the prompt's last chunk."""
        return max(0.0, self.output - 1)

    def decode_load(self, sequences: float) -> StepLoad:
        seen = self._windowed(self.prompt + self.output_age)
        return StepLoad(sequences, sequences * seen, sequences * seen, sequences, sequences)

    def prefill_load(self, tokens: float, piece: float | None = None) -> StepLoad:
        """``tokens`` prompt tokens in a step, of as many prompts as they make; in chunks of ``piece`` at most."""
        if tokens <= 0:
            return StepLoad(0.0, 0.0, 0.0, 0.0, 0.0)
        chunk = min(self.prompt, tokens if piece is None else piece)
        prompts = tokens / chunk
        # A chunk sits on average in the middle of its prompt, and most tokens are those of long prompts.
        attended = tokens * self._windowed(self.prompt_seen)
        read = prompts * self._windowed((self.prompt + chunk) / 2)
        return StepLoad(tokens, attended, read, prompts, tokens / self.prompt, tokens, attended, read, prompts)

    def _windowed(self, context: float) -> float:
        if not self.windows:
            return context
        layers = sum(n for _, n in self.windows)
        return sum(n * (context if w is None else min(context, w)) for w, n in self.windows) / layers


def traffic_of(model: ModelSpec, workload: Workload, engine: EngineOptions) -> Traffic:
    counts: dict[int | None, int] = {}
    for window in model.sliding_windows:
        counts[window] = counts.get(window, 0) + 1
    prompt, output = (max(1.0, lengths.mean) for lengths in (workload.prompt_tokens, workload.output_tokens))
    return Traffic(
        prompt=prompt,
        output=output,
        prompt_seen=max(prompt / 2, mean_age(workload.prompt_tokens)),
        output_age=max(output / 2, mean_age(workload.output_tokens)),
        rate=None if workload.rate == "max" else float(workload.rate),
        slo=workload.slo,
        token_budget=engine.token_budget,
        max_sequences=engine.max_sequences,
        page_size=engine.page_size,
        windows=tuple(sorted(counts.items(), key=lambda item: (item[0] is None, item[0] or 0))),
    )


@dataclass(frozen=True, slots=True, eq=False)
class Mix:
    """The steps of a route in steady state: plain ones, and a share of them that also carries prompt tokens.

    Equal only to itself: `mix_of` gives one object for equal arguments, and caches are keyed by it.
    """

    plain: StepLoad
    mixed: StepLoad
    mixed_share: float
    held_share: float  # of all steps that go at the pace of a mixed one (`_held`)
    steps_in_flight: float
    cycles: float  # that one request stays: chunks of its prompt, then its decodes
    running: float  # sequences that move; more than the token budget feeds only wait

    @property
    def mean_tokens(self) -> float:
        return self.plain.tokens + self.mixed_share * (self.mixed.tokens - self.plain.tokens)

    def mean_s(self, seconds: Callable[[StepLoad], float]) -> float:
        """Seconds from one step to the next, of a stage that takes so long for a step."""
        plain = seconds(self.plain)
        return plain + self.held_share * (seconds(self.mixed) - plain)


@lru_cache(maxsize=1 << 10)
def alone_mix(traffic: Traffic) -> Mix:
    """The steps of one request by itself: its decodes plain, its (first) chunk as the mixed one."""
    traffic = traffic.of_mean_lengths
    chunk = min(traffic.prompt, float(traffic.token_budget))
    return Mix(
        traffic.decode_load(1.0), traffic.prefill_load(chunk), 0.0, 0.0, 1.0, traffic.chunks + traffic.decodes, 1.0
    )


@lru_cache(maxsize=1 << 16)
def mix_of(traffic: Traffic, concurrency: float, depth: int) -> Mix:
    """How ``concurrency`` sequences fill the steps of a route of ``depth`` stages."""
    in_flight = max(1.0, min(float(depth), concurrency))
    dealt = traffic.chunk(depth)
    # Chunks of one prompt follow each other in successive steps, not after a round trip.
    cycles = 1 + (traffic.prompt / dealt - 1) / in_flight + traffic.decodes
    # No step exceeds the token budget: beyond that, sequences wait for their prefill.
    tokens_a_sequence = (traffic.decodes + traffic.prompt) / cycles
    running = min(concurrency, traffic.token_budget * in_flight / tokens_a_sequence)
    decoding = running / in_flight * traffic.decodes / cycles
    prompt_tokens = running / in_flight * traffic.prompt / cycles
    # More prompts than one at a time are dealt out together: then every step carries some of them. What decodes
    # leave of the budget is the most.
    chunk = min(traffic.token_budget - decoding, max(dealt, prompt_tokens))
    plain = traffic.decode_load(decoding)
    # A chunk that the budget cuts short counts as its part of a whole one. It reads its prompt's keys once more,
    # which is a percent or two; but so more sequences could serve less by as much, and bounds need that none does.
    mixed = plain.plus(traffic.prefill_load(chunk, max(chunk, dealt)))
    share = min(1.0, prompt_tokens / chunk)
    return Mix(plain, mixed, share, _held(share, in_flight), in_flight, cycles, running)


@lru_cache(maxsize=1 << 16)
def best_mix(traffic: Traffic, low: int, high: int, depth: int) -> Mix:
    """Steps whose stage times are optimistic for every number of sequences from ``low`` to ``high``.

    With more sequences a step costs less for each. Only where there are fewer than stages, each step has one, and
    with more of them in flight more are held up: there the fewest are held up least.
    """
    mix = mix_of(traffic, float(high), depth)
    if low >= min(depth, high):
        return mix
    return replace(mix, held_share=_held(mix.mixed_share, float(max(1, low))))


def _held(share: float, in_flight: float) -> float:
    """A pipeline goes at the pace of the longest step in it: while that travels from stage to stage, each of the
    others waits for it somewhere, and ``in_flight`` steps take as long as if all were like it.

    Long steps come at random, one in 1 / ``share``: after a round that one of them held up, the next is
    1 / share - 1 steps off on average. (A lower bound of a last-passage time: the path that waits at a stage for
    the next long step and then goes with it. With equal stages simulations are within some percent of it.)
    """
    return share * in_flight / (1 + share * (in_flight - 1))
