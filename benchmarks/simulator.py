"""How many requests `hexgen simulate` gets through in a second, on one core.

python benchmarks/simulator.py [--requests 1000000] [--python 20000] [--only short,azure,three,helix]

Each case is run by the compiled loop, and with fewer requests by the loop in Python (``--python 0``: not), whose
times must be the same. Seconds are of the CPU, and of `simulate` alone: plans and requests are made before.
"""

from __future__ import annotations

import argparse
import resource
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from hexgen.cluster import Cluster, load_cluster
from hexgen.cluster_file import parse_cluster
from hexgen.model import ModelSpec, load_model
from hexgen.plan import Plan
from hexgen.scheduler import evaluate, plan
from hexgen.scheduler.simulation import Requests, SimulationResult, requests_of, simulate
from hexgen.workload import Lengths, Workload

SPECS = Path(__file__).parent.parent / "cluster_specs"
LOAD = 0.8  # of what the plan is predicted to serve, but for `saturated`


def lone(device: str, model: str, count: int = 1) -> Cluster:
    """Machines of one GPU each."""
    node = {"name": "a-$i", "repeat": count, "device": device, "count": 1}
    links = {"default": {"bandwidth": "1GB/s", "latency": "1ms"}}
    return parse_cluster({"name": device, "nodes": [node], "links": links, "model": model}, "lone")


def cases() -> dict[str, tuple[Cluster, Workload, bool]]:
    """Cluster, workload, whether all requests are there from the start."""
    helix = load_cluster(SPECS / "helix-single24.yaml")
    azure = helix.workload or Workload()
    return {
        "short": (lone("A100-80G", "llama-2-13b"), Workload(Lengths(64, max=200), Lengths(16, max=64)), False),
        "chat": (lone("A100-80G", "llama-2-13b"), Workload(), False),
        "saturated": (lone("H100", "llama-2-7b"), Workload(), True),
        "azure": (lone("A100-80G", "llama-2-13b"), azure, False),
        "three": (lone("A100-80G", "llama-2-70b", 3), azure, False),
        "helix": (helix, azure, False),
    }


def measured(
    name: str, made: Plan, cluster: Cluster, model: ModelSpec, requests: Requests, compiled: bool
) -> SimulationResult:
    """Prints a row of the table."""
    started = time.process_time()
    result = simulate(made, cluster, model, requests, compiled=compiled)
    took_s = time.process_time() - started
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3  # the most so far
    stages = ", ".join(str(len(route.path)) for route in made.routes)
    loop, count = "compiled" if compiled else "Python", len(requests)
    print(
        f"| {name} | {stages} | {loop} | {count:,} | {result.steps:,} | {took_s:.1f} "
        f"| {count / took_s:,.0f} | {memory:,.0f} |",
        flush=True,
    )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--python", type=int, default=20_000, help="requests for the loop in Python")
    parser.add_argument("--only", help="cases, separated by commas (default: all)")
    asked = parser.parse_args()
    found = cases()
    print("| case | stages on a route | loop | requests | steps | CPU seconds | requests/s | memory MB |")
    print("|---|---|---|---:|---:|---:|---:|---:|")
    for name in asked.only.split(",") if asked.only else found:
        cluster, workload, at_once = found[name]
        model = load_model(cluster.model or "")
        made = plan(cluster, model, workload, time_limit_s=10)
        rate = LOAD * evaluate(made, cluster, model, replace(workload, rate="max")).requests_s
        drawn = [requests_of(workload, count, 1, rate=rate) for count in (10, asked.python or 1, asked.requests)]
        few, some, all_of_them = (one.at_once() for one in drawn) if at_once else drawn
        simulate(made, cluster, model, few, compiled=True)  # which compiles it
        if asked.python:
            slow, quick = (measured(name, made, cluster, model, some, compiled) for compiled in (False, True))
            if not np.array_equal(slow.latency_s, quick.latency_s, equal_nan=True) or slow.steps != quick.steps:
                raise SystemExit(f"{name}: the loops do not agree")
        measured(name, made, cluster, model, all_of_them, compiled=True)


if __name__ == "__main__":
    main()
