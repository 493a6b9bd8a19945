"""HexGen's headline in miniature: the chosen plan against the best symmetric one, under the same Poisson arrivals.

The paper asks which latency deadline 99 % of the requests meet (HexGen, ICML 2024, section 5.2): that is the 99th
percentile of the requests' latencies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hexgen.workload import Workload
from labs.plans import Candidate
from labs.site import Site, lengths

LOAD = 0.7  # of what the symmetric plan is predicted to serve
LEAST_REQUESTS = 60


def deadlines(
    site: Site, candidates: Sequence[Candidate], workload: Workload, lab: str, runs: int, seconds: float
) -> list[dict[str, Any]]:
    """Latencies of each request of each run, of both plans; nothing where no symmetric one fits, or it is ours."""
    by_name = {name: candidate for candidate in candidates for name in candidate.names}
    ours, even = by_name["ours"], by_name.get("symmetric")
    if even is None or even is ours:
        return []
    rate = LOAD * even.requests_s
    requests = max(LEAST_REQUESTS, round(rate * seconds))
    found = []
    for name, candidate in (("ours", ours), ("symmetric", even)):
        latencies, medians = [], []
        with site.served(candidate.file):
            for seed in range(runs + 1):
                options = ["--rate", f"{rate:.4f}", *lengths(workload), "--seed", str(100 + seed)]
                against = candidate.file if seed else None
                told, _ = site.bench([*options, "--requests", str(requests if seed else 8)], against)
                if seed:
                    latencies.append([round(e2el, 4) for e2el in told["e2els"] if e2el is not None])
                    medians.append(_medians(told))
        met = [float(np.percentile(values, 99)) for values in latencies]
        print(f"  {name} at {rate:.2f} requests/s: 99 % within {' '.join(f'{m:.2f}' for m in met)} s", flush=True)
        found.append(
            {
                "lab": lab, "name": name, "shape": candidate.shape, "rate": rate, "requests": requests,
                "latencies_s": latencies, "medians": medians,
            }
        )  # fmt: skip
    return found


def _medians(told: dict[str, Any]) -> dict[str, float]:
    """Measured over simulated, under the same arrivals."""
    ratios = {figure["name"]: figure["measured_over_simulated"] for figure in told["against"]["figures"]}
    return {name: ratios[f"p50 {name}"] for name in ("ttft", "tpot", "e2el")}
