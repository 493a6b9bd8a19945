"""How many requests `hexgen simulate` gets through in a second, on one core.

python benchmarks/simulator.py [--requests 1000000] [--only short,chat,saturated,pipeline]
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

from hexgen.cluster import Cluster, load_cluster
from hexgen.cluster_file import parse_cluster
from hexgen.model import load_model
from hexgen.scheduler import evaluate, plan
from hexgen.scheduler.simulation import requests_of, simulate
from hexgen.workload import Lengths, Workload

SPECS = Path(__file__).parent.parent / "cluster_specs"
LOAD = 0.8  # of what the plan is predicted to serve, but for `saturated`


def lone(device: str, model: str) -> Cluster:
    told = {"name": device, "nodes": [{"name": "a", "device": device, "count": 1}], "model": model}
    return parse_cluster(told, "lone")


def cases() -> dict[str, tuple[Cluster, Workload, bool]]:
    """Cluster, workload, whether all requests are there from the start."""
    helix = load_cluster(SPECS / "helix-single24.yaml")
    short = Workload(Lengths(64, max=200), Lengths(16, max=64))
    return {
        "short": (lone("A100-80G", "llama-2-13b"), short, False),
        "chat": (lone("A100-80G", "llama-2-13b"), Workload(), False),
        "saturated": (lone("H100", "llama-2-7b"), Workload(), True),
        "pipeline": (helix, helix.workload or Workload(), False),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--only", help="cases, separated by commas (default: all)")
    asked = parser.parse_args()
    found = cases()
    print(
        "| case | stages on a route | requests | steps | CPU seconds | requests/s |\n|---|---|---:|---:|---:|---:|"
    )
    for name in asked.only.split(",") if asked.only else found:
        cluster, workload, at_once = found[name]
        model = load_model(cluster.model or "")
        made = plan(cluster, model, workload, time_limit_s=10)
        rate = LOAD * evaluate(made, cluster, model, replace(workload, rate="max")).requests_s
        drawn = requests_of(workload, asked.requests, 1, rate=rate)
        started = time.process_time()
        result = simulate(made, cluster, model, drawn.at_once() if at_once else drawn)
        took_s = time.process_time() - started
        stages = ", ".join(str(len(route.path)) for route in made.routes)
        each = asked.requests / took_s
        print(
            f"| {name} | {stages} | {asked.requests:,} | {result.steps:,} | {took_s:.1f} | {each:,.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
