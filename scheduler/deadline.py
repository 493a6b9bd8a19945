"""Limits of time, as moments of `time.monotonic`; None: there is none."""

from __future__ import annotations

import time


def passed(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() >= deadline


def part_until(deadline: float | None, share: float) -> float | None:
    """When that share of the time that is left will have passed: now, where none is left."""
    left = seconds_left(deadline)
    return None if left is None else time.monotonic() + left * share


def seconds_left(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic())
