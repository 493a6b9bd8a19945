"""What the commands that measure or simulate a load share: its options, and figures that may be missing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from hexgen.errors import SpecError

BurstinessOption = Annotated[
    float,
    typer.Option(
        "--burstiness",
        help="Of arrivals: 1 is Poisson, below it they come in bursts, above it evenly (vLLM's figure).",
    ),
]
ConcurrencyOption = Annotated[
    int | None,
    typer.Option(
        "--concurrency", help="A closed loop: so many requests at a time, each next one when one has ended."
    ),
]
TraceOption = Annotated[
    Path | None, typer.Option("--trace", help="Replay this .csv: arrival times, prompt tokens, output tokens.")
]


def rate_of(text: str) -> float | Literal["max"]:
    """``--rate`` as requests/s. Raises ``SpecError``."""
    if text == "max":
        return "max"
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise SpecError(
            f"must be a positive number of requests per second, or max, not {text[:40]!r}", where="--rate"
        )
    return value


def without_nan(value: Any) -> Any:
    """The same with None for figures that nothing was measured for: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
