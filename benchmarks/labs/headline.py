"""HexGen's headline in miniature: the chosen plan against the best symmetric one, under the same Poisson arrivals.

The paper asks which latency deadline 99 % of the requests meet (HexGen, ICML 2024, section 5.2): that is the 99th
percentile of the requests' latencies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hexgen.workload import Workload
from labs.plans import Candidate
from labs.site import Site, lengths

LEAST_REQUESTS = 60


@dataclass(frozen=True, slots=True)
class Asked:
    """``seconds``: that a run should take at the least."""

    lab: str
    workload: Workload
    runs: int
    seconds: float


def deadlines(
    site: Site, plans: Mapping[str, tuple[Path, str]], rate: float, asked: Asked
) -> list[dict[str, Any]]:
    """Latencies of each request of each run, of ``plans`` (`labs.plans.for_deadlines`), under ``rate``."""
    requests = max(LEAST_REQUESTS, round(rate * asked.seconds))
    found = []
    for name, (file, shape) in plans.items():
        latencies, medians = [], []
        with site.served(file):
            for seed in range(asked.runs + 1):
                options = ["--rate", f"{rate:.4f}", *lengths(asked.workload), "--seed", str(100 + seed)]
                told, _ = site.bench(
                    [*options, "--requests", str(requests if seed else 8)], file if seed else None
                )
                if seed:
                    latencies.append([round(e2el, 4) for e2el in told["e2els"] if e2el is not None])
                    medians.append(_medians(told))
        met = [float(np.percentile(values, 99)) for values in latencies]
        print(
            f"  {name} [{shape}] at {rate:.2f} requests/s: 99 % within {' '.join(f'{m:.2f}' for m in met)} s; "
            f"measured over simulated {medians}",
            flush=True,
        )
        found.append(
            {
                "lab": asked.lab, "name": name, "shape": shape, "rate": rate, "requests": requests,
                "latencies_s": latencies, "medians": medians,
            }
        )  # fmt: skip
    return found


def rate_for(candidates: Sequence[Candidate], load: float) -> float | None:
    """``load``: of what the best symmetric plan is predicted to serve. None where no such plan fits."""
    even = next((candidate for candidate in candidates if "symmetric" in candidate.names), None)
    return None if even is None else load * even.requests_s


def _medians(told: dict[str, Any]) -> dict[str, float]:
    """Measured over simulated, under the same arrivals."""
    ratios = {figure["name"]: figure["measured_over_simulated"] for figure in told["against"]["figures"]}
    return {name: ratios[f"p50 {name}"] for name in ("ttft", "tpot", "e2el")}
