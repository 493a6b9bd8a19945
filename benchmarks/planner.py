"""The planner against others', and against what no plan can exceed: the figures of docs/benchmark-planner.md.

    python benchmarks/planner.py [--only served,slo,...] [--quick] [--seconds S] [--json FILE] [--docs]

served     our plan and every baseline on every published cluster: predicted, simulated, priced, gap to the bound
slo        attainment over rates on HexGen's pools
headline   HexGen's claim: 58 unlike GPUs against 16 A100s at the same price
maxflow    Helix's published table and placements
scale      seconds to the first plan and to the final one, 16 to 4,096 devices
robust     wrong figures, equal inputs, a node gone
exact      the engines against brute force on small clusters

`--docs` rewrites the tables between the markers of docs/benchmark-planner.md, and the plots in docs/plots. Time
limits are of wall clock: on a busy machine searches find less. Figures from Helix's own simulator come from
`benchmarks/helix_simulator.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from planning import exactness, flow, headline, robust, scale, served, slo
from planning.report import Report, rewrite, write_json
from planning.settings import ROOT, Settings
from rich.console import Console

from hexgen.errors import HexgenError

DOCS = ROOT / "docs" / "benchmark-planner.md"
PLOTS = ROOT / "docs" / "plots"

Section = Callable[[Settings, Path | None], Report]
SECTIONS: Mapping[str, Section] = {
    "served": lambda settings, plots: served.run(settings),
    "slo": slo.run,
    "headline": headline.run,
    "maxflow": lambda settings, plots: flow.run(settings),
    "scale": scale.run,
    "robust": lambda settings, plots: robust.run(settings),
    "exact": lambda settings, plots: exactness.run(settings),
}


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="sections, separated by commas (default: all)")
    parser.add_argument("--quick", action="store_true", help="small cases and short searches: does it work at all")
    parser.add_argument("--seconds", type=float, help="time limit of our plans (default: 60)")
    parser.add_argument("--baseline-seconds", type=float, help="of each baseline that searches (default: 10)")
    parser.add_argument("--seeds", type=int, help="of simulations (default: 2)")
    parser.add_argument("--jobs", type=int, default=1, help="processes over which `served` is spread (default: 1)")
    parser.add_argument("--json", type=Path, help="write every figure there")
    parser.add_argument("--docs", action="store_true", help="rewrite docs/benchmark-planner.md and docs/plots")
    args = parser.parse_args(arguments)
    names = list(SECTIONS) if args.only is None else args.only.split(",")
    unknown = [name for name in names if name not in SECTIONS]
    if unknown:
        parser.error(f"no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    if args.quick and args.docs:
        parser.error("--docs wants full figures: leave --quick out")
    for name in ("seconds", "baseline_seconds", "seeds", "jobs"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            parser.error(f"--{name.replace('_', '-')} must be positive, not {value}")
    args.names = names
    return args


def settings_of(args: argparse.Namespace) -> Settings:
    settings = Settings.of_quick(args.jobs) if args.quick else Settings(jobs=args.jobs)
    given = {name: getattr(args, name) for name in ("seconds", "baseline_seconds", "seeds")}
    return dataclasses.replace(settings, **{name: value for name, value in given.items() if value is not None})


def main(arguments: Sequence[str] | None = None) -> int:
    args = parsed(arguments)
    settings = settings_of(args)
    console = Console(width=None if sys.stdout.isatty() else 240)
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    reports = []
    for name in args.names:
        started, cpu = time.monotonic(), time.process_time()
        try:
            report = SECTIONS[name](settings, PLOTS if args.docs else None)
        except HexgenError as error:
            print(f"error: {name}: {error}", file=sys.stderr)
            return 2
        took, used = time.monotonic() - started, time.process_time() - cpu
        console.rule(name)
        report.show(console)
        console.print(f"{name}: {took:.0f} s, {used:.0f} s of CPU in this process", highlight=False)
        if args.docs:
            rewrite(DOCS, name, report.markdown(DOCS, stamp(name, args, settings, today, took)))
        reports.append(report)
        if args.json:  # after each section: a run that is stopped keeps what it has
            write_json(args.json, reports, about(settings, today))
    return 0


def stamp(name: str, args: argparse.Namespace, settings: Settings, today: str, took_s: float) -> str:
    command = f"python benchmarks/planner.py --only {name}"
    for option in ("seconds", "baseline_seconds", "seeds"):
        if getattr(args, option) is not None:
            command += f" --{option.replace('_', '-')} {getattr(args, option):g}"
    load = os.getloadavg()[0]
    return (
        f"`{command}`, {today}, {os.cpu_count()} cores, load {load:.1f}, {took_s:.0f} s"
        + (f", {settings.jobs} processes" if settings.jobs > 1 else "")
        + "."
    )


def about(settings: Settings, today: str) -> dict[str, object]:
    return {"date": today, "python": sys.version.split()[0], **dataclasses.asdict(settings)}


if __name__ == "__main__":
    sys.exit(main())
