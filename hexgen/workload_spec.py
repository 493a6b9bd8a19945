"""What the cluster will be asked to do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens: a mean, and optionally a 99th percentile, a maximum, and the trace file they were read from."""

    mean: float
    p99: float | None = None
    max: int | None = None
    trace: str | None = None


@dataclass(frozen=True, slots=True)
class Slo:
    """Limits in seconds; ``None`` is no limit."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    latency_s: float | None = None


@dataclass(frozen=True, slots=True)
class Workload:
    """Prompt and output lengths, requests per second (``"max"``: as many as are served), limits."""

    prompt_tokens: Lengths = field(default_factory=lambda: Lengths(mean=512, p99=2048))
    output_tokens: Lengths = field(default_factory=lambda: Lengths(mean=256, p99=1024))
    rate: float | Literal["max"] = "max"
    slo: Slo = field(default_factory=Slo)
