"""Where requests come from: random arrivals, all at once, or a trace. The same seed gives the same requests."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hexgen.errors import SpecError
from hexgen.scheduler.simulation.lengths import draw
from hexgen.scheduler.simulation.requests import Floats, Requests
from hexgen.workload import Workload
from hexgen.workload_file import read_trace


def requests_of(
    workload: Workload, count: int, seed: int = 0, *, rate: float | None = None, burstiness: float = 1.0
) -> Requests:
    """``count`` requests as the workload describes them; ``rate`` (requests/s) instead of the workload's.

    At rate ``"max"`` all are there from the start. Gaps, prompts and outputs are drawn from streams of their own,
    so that another rate or another burstiness meets the same lengths (common random numbers).
    """
    if count < 1:
        raise SpecError(f"{count} requests cannot be simulated", where="requests", remedy="ask for at least one")
    gaps, prompts, outputs = np.random.SeedSequence(seed).spawn(3)
    asked = workload.rate if rate is None else rate
    arrivals = np.zeros(count) if asked == "max" else gamma_arrivals(asked, count, burstiness, gaps)
    return Requests(
        arrivals,
        draw(workload.prompt_tokens, count, np.random.default_rng(prompts), "workload: prompt_tokens"),
        draw(workload.output_tokens, count, np.random.default_rng(outputs), "workload: output_tokens"),
    )


def gamma_arrivals(rate: float, count: int, burstiness: float, seed: np.random.SeedSequence) -> Floats:
    """Arrival times in seconds: gaps of mean ``1 / rate`` from a gamma distribution of shape ``burstiness``.

    1 is Poisson, less is burstier, more is more even: as `vllm bench serve --burstiness` defines it.
    """
    for name, value in (("rate", rate), ("burstiness", burstiness)):
        if not (np.isfinite(value) and value > 0):
            raise SpecError(f"must be a positive number, not {value:g}", where=name)
    with np.errstate(over="ignore"):
        gaps = np.random.default_rng(seed).gamma(burstiness, 1.0, count) / (burstiness * rate)
        times: Floats = np.cumsum(gaps)
    if not np.isfinite(times[-1]):
        raise SpecError(f"at {rate:g} requests/s the last one comes after the end of time", where="rate")
    return times


def replay(path: str | Path, *, limit: int | None = None, rate: float | None = None) -> Requests:
    """The requests of a trace file, from its first arrival on; ``rate`` stretches or squeezes time to that mean.

    Rows of no prompt or output tokens are requests that failed, and are left out. Raises ``SpecError`` naming the
    row where the file is malformed, or lacks a column.
    """
    trace = read_trace(Path(path))
    prompts = np.asarray(trace.prompt_tokens, dtype=np.float64)
    outputs = np.asarray(trace.output_tokens, dtype=np.float64)
    if trace.arrival_s is None:
        raise SpecError(
            "the trace has no column of times", where=str(path), remedy="add one, like timestamp in seconds"
        )
    times = np.asarray(trace.arrival_s, dtype=np.float64)
    kept = (prompts >= 1) & (outputs >= 1)
    if not kept.any():
        raise SpecError("no row of the trace has prompt and output tokens", where=str(path))
    order = np.argsort(times[kept], kind="stable")[:limit]
    times = times[kept][order]
    found = Requests(
        times - times[0],
        np.rint(prompts[kept][order]).astype(np.int64),
        np.rint(outputs[kept][order]).astype(np.int64),
    )
    if rate is None:
        return found
    if not np.isfinite(found.rate):
        raise SpecError("the trace's requests all come at one time: no rate can be given", where=str(path))
    return found.at_rate(rate)
