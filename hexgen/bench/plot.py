"""A run as a picture: how requests were distributed, and how the run went. matplotlib is imported only here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from hexgen.bench.measures import Measures
from hexgen.bench.record import Outcome
from hexgen.errors import SpecError

_DPI = 120
_WINDOWS = 60  # points of the curve over time, at most
_TITLES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2el": "E2EL"}


def write_plot(path: Path, outcome: Outcome, measures: Measures, title: str) -> None:
    """A PNG or SVG, by its suffix (`hexgen.scheduler.picture.check_plot`). ``SpecError`` where it cannot be
    written.
    """
    figure = draw(outcome, measures, title)
    try:
        figure.savefig(path, dpi=_DPI)
    except OSError as error:
        raise SpecError(f"cannot be written: {error.strerror}", where=str(path)) from error


def draw(outcome: Outcome, measures: Measures, title: str) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    figure.suptitle(title, fontsize=10)
    shares, course = figure.subplots(1, 2)
    for name, label in _TITLES.items():
        values = np.sort(measures.times_s[name])
        if values.size:
            shares.plot(
                values * 1e3, np.arange(1, values.size + 1) / values.size, label=label, drawstyle="steps-post"
            )
    shares.set(xscale="log", xlabel="ms", ylabel="share at most this long", ylim=(0, 1))
    shares.grid(alpha=0.3)
    shares.legend(loc="lower right", fontsize=8)
    middles, tokens_s, running = over_time(outcome)
    course.plot(middles, tokens_s, color="tab:blue")
    course.set(xlabel="seconds", ylim=(0, None))
    course.set_ylabel("output tokens/s", color="tab:blue")
    course.grid(alpha=0.3)
    beside = course.twinx()
    beside.plot(middles, running, color="tab:orange")
    beside.set_ylabel("requests under way", color="tab:orange")
    beside.set_ylim(0, None)
    return figure


def over_time(outcome: Outcome) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Middles of equal windows (s), output tokens/s in them, and requests under way at each middle.

    Of completed requests; a piece weighs its share of its request's tokens.
    """
    done = outcome.completed
    edges = np.linspace(0.0, max(outcome.duration_s, 1e-9), _WINDOWS + 1)
    middles = (edges[:-1] + edges[1:]) / 2
    tokens = np.zeros(_WINDOWS)
    running = np.zeros(_WINDOWS)
    for r in done:
        times = np.frombuffer(r.times) - outcome.started_s
        tokens += np.histogram(times, edges)[0] * (r.output_tokens / len(times))
        running += (middles >= r.sent_s - outcome.started_s) & (middles <= times[-1])
    return middles, tokens / np.diff(edges), running
