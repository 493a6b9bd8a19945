"""What a request asks for and what comes back: plain data that every layer shares."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Literal

from hexgen.errors import RequestError

MAX_LOGPROBS = 20
MAX_STOPS = 64
MAX_STOP_CHARS = 1024
MAX_LOGIT_BIAS = 1024
MAX_N = 64
MAX_SEED = 2**63 - 1

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens. Names and meanings are vLLM's; ``None`` means off.

    ``temperature`` 0 is greedy. ``seed`` makes the text depend on the prompt and the seed alone, not on the
    batch. ``logprobs`` is the number of alternatives reported beside the chosen token (0: the chosen one only).
    ``stop`` may be given as one string or any sequence, ``stop_token_ids`` as any sequence, ``top_k`` as 0 or -1
    for off. Nothing is checked before ``validate``.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        # What vLLM's users write; everything below the door sees one spelling.
        stop: object = self.stop
        if isinstance(stop, str):
            object.__setattr__(self, "stop", (stop,))
        elif stop is None or isinstance(stop, list):
            object.__setattr__(self, "stop", tuple(stop or ()))
        ids: object = self.stop_token_ids
        if ids is None or isinstance(ids, list):
            object.__setattr__(self, "stop_token_ids", tuple(ids or ()))
        bias: object = self.logit_bias
        if bias is None:
            object.__setattr__(self, "logit_bias", {})
        if self.top_k in (0, -1):
            object.__setattr__(self, "top_k", None)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def needs_history(self) -> bool:
        """Whether the sampler must know the tokens so far."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    def validate(self, vocab_size: int | None = None) -> None:
        """Raise ``RequestError`` whose ``where`` names the first field of a wrong type or out of range."""
        self._check_types()

        def check(ok: bool, name: str, allowed: str) -> None:
            if not ok:
                raise RequestError(f"must be {allowed}, not {_shown(getattr(self, name))}", where=name)

        check(self.max_tokens >= 1, "max_tokens", "at least 1")
        check(
            0 <= self.min_tokens <= self.max_tokens,
            "min_tokens",
            f"between 0 and max_tokens ({self.max_tokens})",
        )
        check(1 <= self.n <= MAX_N, "n", f"between 1 and {MAX_N}")
        check(0 <= self.temperature <= 100, "temperature", "between 0 and 100")
        check(0 < self.top_p <= 1, "top_p", "above 0 and at most 1")
        check(self.top_k is None or self.top_k >= 1, "top_k", "at least 1, or 0, -1 or left out for off")
        check(0 <= self.min_p <= 1, "min_p", "between 0 and 1")
        check(0 < self.repetition_penalty <= 100, "repetition_penalty", "above 0 and at most 100")
        check(-2 <= self.presence_penalty <= 2, "presence_penalty", "between -2 and 2")
        check(-2 <= self.frequency_penalty <= 2, "frequency_penalty", "between -2 and 2")
        check(self.seed is None or 0 <= self.seed <= MAX_SEED, "seed", f"between 0 and {MAX_SEED}")
        check(
            self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS,
            "logprobs",
            f"between 0 and {MAX_LOGPROBS}",
        )
        check(
            len(self.stop) <= MAX_STOPS and all(0 < len(s) <= MAX_STOP_CHARS for s in self.stop),
            "stop",
            f"at most {MAX_STOPS} strings of 1 to {MAX_STOP_CHARS} characters",
        )
        check(len(self.stop_token_ids) <= MAX_STOPS, "stop_token_ids", f"at most {MAX_STOPS} token ids")
        check(
            len(self.logit_bias) <= MAX_LOGIT_BIAS and all(-100 <= v <= 100 for v in self.logit_bias.values()),
            "logit_bias",
            f"at most {MAX_LOGIT_BIAS} entries between -100 and 100",
        )
        if vocab_size is not None:
            for name in ("logit_bias", "stop_token_ids"):
                ids: tuple[int, ...] = tuple(getattr(self, name))
                check(all(0 <= i < vocab_size for i in ids), name, f"token ids between 0 and {vocab_size - 1}")

    def _check_types(self) -> None:
        for name in _INTEGERS:
            value = getattr(self, name)
            if not (_is_int(value) or (value is None and name in ("top_k", "seed", "logprobs"))):
                raise RequestError(f"must be a whole number, not {_shown(value)}", where=name)
        for name in _NUMBERS:
            value = getattr(self, name)
            if not _is_finite(value):
                raise RequestError(f"must be a finite number, not {_shown(value)}", where=name)
        if not isinstance(self.ignore_eos, bool):
            raise RequestError(f"must be true or false, not {_shown(self.ignore_eos)}", where="ignore_eos")
        if not (isinstance(self.stop, tuple) and all(isinstance(s, str) for s in self.stop)):
            raise RequestError(f"must be a string or a list of strings, not {_shown(self.stop)}", where="stop")
        if not (isinstance(self.stop_token_ids, tuple) and all(_is_int(i) for i in self.stop_token_ids)):
            raise RequestError(
                f"must be a list of token ids, not {_shown(self.stop_token_ids)}", where="stop_token_ids"
            )
        if not (
            isinstance(self.logit_bias, dict)
            and all(_is_int(i) and _is_finite(v) for i, v in self.logit_bias.items())
        ):
            raise RequestError("must map token ids to finite numbers", where="logit_bias")


_INTEGERS = ("max_tokens", "min_tokens", "n", "top_k", "seed", "logprobs")
_NUMBERS = (
    "temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
)  # fmt: skip


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    # An int may be too large for a float; comparing it with one never overflows.
    return isinstance(value, int | float) and not isinstance(value, bool) and -_LARGEST <= value <= _LARGEST


_LARGEST = sys.float_info.max


def _shown(value: object) -> str:
    """A short repr for a message: what a client sent may be megabytes."""
    if isinstance(value, str):
        return repr(value[:40]) + ("..." if len(value) > 40 else "")
    if isinstance(value, dict | list | tuple | set):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, int) and abs(value) > 10**30:
        return "a very large number"
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities (natural log, of the model's own distribution, before temperature and penalties)."""

    chosen: float
    top: tuple[tuple[int, float], ...]  # (token id, logprob), most likely first


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One sampled token of one sequence, as it leaves the engine."""

    request: int
    token: int
    logprobs: TokenLogprobs | None
    finish_reason: FinishReason | None  # set on the last event of a sequence


@dataclass(frozen=True, slots=True)
class RequestTiming:
    """Seconds on the server's monotonic clock."""

    arrived_s: float
    admitted_s: float
    first_token_s: float
    finished_s: float

    @property
    def ttft_s(self) -> float:
        return self.first_token_s - self.arrived_s

    def tpot_s(self, output_tokens: int) -> float:
        return (self.finished_s - self.first_token_s) / max(1, output_tokens - 1)


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One of the ``n`` sequences of a request."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    stop_reason: int | str | None = None  # which stop id or string ended it
    logprobs: tuple[TokenLogprobs, ...] | None = None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """The answer to one prompt."""

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    timing: RequestTiming | None = None
