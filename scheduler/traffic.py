"""What a workload asks of one route, and what one step of it carries."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hexgen.model import ModelSpec
from hexgen.plan import EngineOptions
from hexgen.workload import Slo, Workload


@dataclass(frozen=True, slots=True)
class StepLoad:
    """What one step carries through a stage. Averages, so not always whole numbers.

    ``attended``: summed over the new tokens, how many positions each attends to (decides FLOPs). ``kv_read``:
    summed over the sequences, how many tokens of KV are read (decides bytes). Both are already averaged over the
    layers' sliding windows. ``samples``: rows of logits.
    """

    tokens: float
    attended: float
    kv_read: float
    sequences: float
    samples: float

    def plus(self, other: StepLoad) -> StepLoad:
        return StepLoad(
            self.tokens + other.tokens,
            self.attended + other.attended,
            self.kv_read + other.kv_read,
            self.sequences + other.sequences,
            self.samples + other.samples,
        )


@dataclass(frozen=True, slots=True)
class Traffic:
    """A workload as one route sees it; lengths are means, in tokens."""

    prompt: float
    output: float
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
        """KV tokens that one running request holds on average over its life (half of the last page is empty)."""
        return self.prompt + self.output / 2 + self.page_size / 2

    @property
    def chunks(self) -> int:
        """Steps that one prompt takes."""
        return max(1, math.ceil(self.prompt / self.token_budget))

    @property
    def decodes(self) -> float:
        """Decode steps of one request; its first token comes from the prompt's last chunk."""
        return max(0.0, self.output - 1)

    def decode_load(self, sequences: float) -> StepLoad:
        seen = self._windowed(self.prompt + self.output / 2)
        return StepLoad(sequences, sequences * seen, sequences * seen, sequences, sequences)

    def prefill_load(self, tokens: float) -> StepLoad:
        """``tokens`` prompt tokens in one step, of as many prompts as they make."""
        if tokens <= 0:
            return StepLoad(0.0, 0.0, 0.0, 0.0, 0.0)
        chunk = min(self.prompt, tokens)
        prompts = tokens / chunk
        # A chunk sits on average in the middle of its prompt.
        attended = tokens * self._windowed(self.prompt / 2)
        read = prompts * self._windowed((self.prompt + chunk) / 2)
        return StepLoad(tokens, attended, read, prompts, tokens / self.prompt)

    def _windowed(self, context: float) -> float:
        if not self.windows:
            return context
        layers = sum(n for _, n in self.windows)
        return sum(n * (context if w is None else min(context, w)) for w, n in self.windows) / layers


def traffic_of(model: ModelSpec, workload: Workload, engine: EngineOptions) -> Traffic:
    counts: dict[int | None, int] = {}
    for window in model.sliding_windows:
        counts[window] = counts.get(window, 0) + 1
    return Traffic(
        prompt=max(1.0, workload.prompt_tokens.mean),
        output=max(1.0, workload.output_tokens.mean),
        rate=None if workload.rate == "max" else float(workload.rate),
        slo=workload.slo,
        token_budget=engine.token_budget,
        max_sequences=engine.max_sequences,
        page_size=engine.page_size,
        windows=tuple(sorted(counts.items(), key=lambda item: (item[0] is None, item[0] or 0))),
    )
