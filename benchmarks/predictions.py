"""How true the planner's closed form is: simulated over predicted tokens/s of saturated plans, as a table.

python benchmarks/predictions.py cluster_specs/mixed.yaml cluster_specs/llmpq-1.yaml ...
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from hexgen.cluster import load_cluster
from hexgen.model import load_model
from hexgen.scheduler import evaluate, plan
from hexgen.scheduler.simulation import served
from hexgen.scheduler.task import default_workload
from hexgen.workload import Lengths, Slo, Workload


def row(path: Path, lives: float, seed: int, seconds: float | None) -> str:
    """The plan for throughput of one cluster: all requests of mean lengths, and lengths as distributed."""
    cluster = load_cluster(path)
    model = load_model(cluster.model or "llama-2-70b")
    asked = replace(cluster.workload or default_workload(model.max_context), rate="max", slo=Slo())
    means = Workload(Lengths(asked.prompt_tokens.mean), Lengths(asked.output_tokens.mean))
    made = plan(cluster, model, asked, seed=seed, time_limit_s=seconds)
    ratios = [
        served(made, cluster, model, workload, seed=seed, lives=lives).tokens_s
        / evaluate(made, cluster, model, workload).tokens_s
        for workload in (means, asked)
    ]
    stages = ", ".join(map(str, sorted({len(route.path) for route in made.routes})))
    return f"| {cluster.name} | {stages} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("clusters", nargs="+", type=Path)
    parser.add_argument("--lives", type=float, default=20, help="of a request, that are simulated")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, help="time limit of each plan (default: none)")
    asked = parser.parse_args()
    print("| cluster | stages on a route | all requests of mean lengths | lengths as distributed |")
    print("|---|---|---|---|")
    for path in asked.clusters:
        print(row(path, asked.lives, asked.seed, asked.seconds), flush=True)


if __name__ == "__main__":
    main()
