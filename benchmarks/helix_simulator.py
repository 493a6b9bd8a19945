"""Plans and published placements in Helix's own simulator: an outside judge of what a placement serves.

    python benchmarks/helix_simulator.py --helix DIR --placement helix petals swarm --cluster single24 --offline
    python benchmarks/helix_simulator.py --helix DIR --plan plan.yaml --rate 0.9 --seeds 3 --json

DIR is a checkout of Helix (ASPLOS'25, https://github.com/xogusrns123/Helix-ASPLOS25); nothing of it is copied.
Its max-flow scheduler routes the requests, and a plan is also run by its own weights. Every placement gets the
same arrivals: Helix's conversation lengths, drawn by the seed. `--offline` launches as Helix does, new requests
while its expected use of KV room is below 0.8; it drops a request that finds no room on its way, long prompts
first, so look at `rejected` and the mean prompt served. `--rate R` draws Poisson arrivals, and who finds no room
waits. Latencies are Helix's: from the coordinator's sending a prompt or a token to its coming back; `ttft` counts
the wait before that too. Two stages on one node count as two machines with a network card each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from helix_layout import Layout, from_placement, from_plan
from helix_runs import MODELS, Helix, Load, Run, judge
from rich.console import Console
from rich.table import Table

from hexgen.cluster import load_cluster
from hexgen.errors import HexgenError
from hexgen.model import load_model
from hexgen.plan import load_plan, resolve_cluster

SPECS = Path(__file__).parent.parent / "cluster_specs"


def layouts(args: argparse.Namespace) -> list[Layout]:
    name = f"helix-{args.cluster.removeprefix('helix-')}"
    layers = load_model(args.model).layers
    found = []
    if args.placement:
        cluster = load_cluster(SPECS / f"{name}.yaml")
        found += [from_placement(name, args.model, method, cluster, layers) for method in args.placement]
    for path in args.plan:
        plan = load_plan(path)
        found.append(from_plan(plan, resolve_cluster(plan, path.parent), layers, path.stem))
    return found


def table(runs: Sequence[Run]) -> Table:
    heads = (
        "placement",
        "routed by",
        "max-flow",
        "decode tokens/s",
        "prompt p50 p95",
        "ttft p50 p95",
        "decode p50 p95",
    )
    shown = Table(*heads, "rejected", "prompt")
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.name, run.weights), []).append(run)
    for (name, weights), group in groups.items():
        rates = [run.decode_tokens_s for run in group]
        shown.add_row(
            name,
            weights,
            f"{group[0].max_flow_tokens_s:.1f}",
            f"{statistics.fmean(rates):.1f} ({min(rates):.1f}..{max(rates):.1f})",
            *(_pair(group, field) for field in ("prompt", "ttft", "decode")),
            f"{statistics.fmean(run.rejected for run in group):.0f}",
            f"{statistics.fmean(run.prompt_tokens for run in group):.0f}",
        )
    return shown


def _pair(group: Sequence[Run], field: str) -> str:
    return " ".join(
        f"{statistics.fmean(getattr(run, f'{field}_{p}_s') for run in group):.2f}" for p in ("p50", "p95")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--helix", type=Path, required=True, help="a checkout of Helix")
    parser.add_argument("--plan", type=Path, nargs="*", default=[])
    parser.add_argument("--placement", nargs="*", default=[], help="of benchmarks/data/helix_placements.yaml")
    parser.add_argument("--cluster", default="single24", help="the placements': single24, distributed24, hetero42")
    parser.add_argument("--model", default="llama-2-70b", choices=sorted(MODELS))
    load = parser.add_mutually_exclusive_group()
    load.add_argument("--rate", type=float, help="requests per second")
    load.add_argument("--offline", action="store_true", help="as many as fit (the default)")
    parser.add_argument("--weights", choices=("maxflow", "plan", "both"), default="both", help="who routes a plan")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=600, metavar="S")
    parser.add_argument("--window", type=int, default=600, metavar="S")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if not args.plan and not args.placement:
        parser.error("name a --plan or a --placement")
    if min(args.seeds, args.window) < 1 or args.warmup < 0 or (args.rate is not None and not args.rate > 0):
        parser.error("--seeds, --window and --rate must be positive, --warmup not negative")
    runs = []
    try:
        helix = Helix(args.helix)
        for layout in layouts(args):
            ways = ("maxflow", "plan") if args.weights == "both" else (args.weights,)
            for weights in ways if layout.weighted else ("maxflow",):
                for seed in range(args.seeds):
                    run = judge(
                        helix, layout, args.model, weights, Load(args.rate, args.warmup, args.window), seed
                    )
                    runs.append(run)
                    print(f"{run.name} {weights} seed {seed}: {run.decode_tokens_s:.1f} tokens/s", file=sys.stderr)
    except HexgenError as error:
        sys.exit(str(error))
    if args.json:
        print(json.dumps([asdict(run) for run in runs], indent=1))
    else:
        Console(width=160).print(table(runs))


if __name__ == "__main__":
    main()
