"""Predicted against measured on laboratories: four labs, two models, the chosen plan and three simpler ones.

    sudo .venv/bin/python benchmarks/lab_predictions.py --docs
    sudo .venv/bin/python benchmarks/lab_predictions.py --only two-speeds --models demo --runs 2 --seconds 6

For each laboratory and model: build it, discover it with `--model`, plan on what was discovered, and serve each
plan under a closed loop that fills it. Needs what `hexgen lab` needs, and two cores that nobody else wants.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from labs.figures import Entry, entry_of, run_of
from labs.headline import Asked, deadlines, rate_for
from labs.models import reference, scaled
from labs.plans import LARGER, OPTIONS, Candidate, for_deadlines, plans
from labs.report import shown, write_docs
from labs.site import Site, built, lengths, others_busy

from hexgen.cluster import load_cluster
from hexgen.lab.groups import find_groups
from hexgen.lab.teardown import clean_dead
from hexgen.lab.tools import check_machine
from hexgen.model import load_model
from hexgen.workload import Lengths, Workload

SPECS = Path(__file__).parent.parent / "cluster_specs"
DATA = Path(__file__).parent / "data" / "lab_predictions.json"
LABS = ("two-speeds", "three-speeds", "islands", "starved")
MODELS = ("demo", "random100m")
HEADLINE = ("three-speeds", "islands", "starved")  # with the bundled model
LIVES = 3  # of as many requests as run at once
SHORTER = {"random100m": 24}  # output tokens, where a request would take too long


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(LABS), help="laboratories, separated by commas")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6.0, help="that a run should take at the least")
    parser.add_argument("--headline", default=",".join(HEADLINE), help="laboratories for deadlines, or none")
    parser.add_argument(
        "--load", type=float, default=0.9, help="of the best symmetric plan, under which deadlines count"
    )
    parser.add_argument("--deadlines-only", action="store_true", help="leave closed loops as they were measured")
    parser.add_argument("--data", type=Path, default=DATA, help="raw runs; entries measured again are replaced")
    parser.add_argument("--docs", action="store_true", help="write the tables and the picture under docs/")
    parser.add_argument("--report", action="store_true", help="measure nothing: from the data that is there")
    asked = parser.parse_args()
    if not asked.report:
        _measure_all(asked)
    kept = _read(asked.data)
    print(shown([entry_of(entry) for entry in kept["entries"]]))
    if asked.docs:
        write_docs(kept)


def _measure_all(asked: argparse.Namespace) -> None:
    check_machine()
    clean_dead(find_groups())
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="hexgen-labs-") as folder:
        for model in asked.models.split(","):
            for lab in asked.only.split(","):
                _measure(lab, model, Path(folder), asked)
    print(f"{(time.monotonic() - began) / 60:.1f} minutes in all", flush=True)


def _measure(lab: str, model_name: str, folder: Path, asked: argparse.Namespace) -> None:
    began = time.monotonic()
    busy = others_busy()
    print(f"{lab}, {model_name} ({datetime.now(UTC):%H:%M:%S}; others keep {busy:.2f} cores busy)", flush=True)
    reference_name = reference(model_name, folder)
    model = load_model(reference_name)
    described = load_cluster(SPECS / f"lab-{lab}.yaml")
    cluster = described if model_name == "demo" else scaled(described, model)
    workload = described.workload or Workload()
    if model_name in SHORTER:
        workload = dataclasses.replace(workload, output_tokens=Lengths(SHORTER[model_name]))
    here = folder / f"{lab}-{model_name}"
    with built(cluster, here) as site:
        measured = site.discover(reference_name)
        options = OPTIONS if model_name == "demo" else LARGER
        chosen = plans(measured, reference_name, workload, here, options)
        for name, reason in chosen.refused.items():
            print(f"  {name}: {reason}", flush=True)
        measured_now = () if asked.deadlines_only else chosen.candidates
        entries = [_entry(site, one, lab, model_name, workload, busy, asked) for one in measured_now]
        late: list[dict[str, Any]] = []
        if lab in asked.headline.split(",") and model_name == "demo":
            rate = rate_for(chosen.candidates, asked.load)
            if rate is not None:
                quick = for_deadlines(measured, reference_name, workload, rate, here)
                late = deadlines(site, quick, rate, Asked(lab, workload, asked.runs, asked.seconds))
        _keep(asked.data, entries, late)
    print(f"  {time.monotonic() - began:.0f} s", flush=True)


def _entry(
    site: Site,
    candidate: Candidate,
    lab: str,
    model: str,
    workload: Workload,
    busy: float,
    asked: argparse.Namespace,
) -> Entry:
    requests = max(LIVES * candidate.concurrency, round(candidate.requests_s * asked.seconds))
    runs = []
    with site.served(candidate.file):
        for seed in range(asked.runs + 1):
            options = ["--concurrency", str(candidate.concurrency), *lengths(workload), "--seed", str(seed)]
            count = requests if seed else candidate.concurrency  # the first warms up
            found, use = site.bench([*options, "--requests", str(count)], candidate.file if seed else None)
            if seed:
                runs.append(run_of(found, use.cores, use.throttled, candidate.concurrency))
                last = found
    entry = Entry(
        lab, model, candidate.names, candidate.shape, candidate.tokens_s, candidate.concurrency, requests, busy,
        tuple(runs),
    )  # fmt: skip
    each, one = " ".join(f"{run.tokens_s:.1f}" for run in runs), runs[-1]
    print(
        f"  {', '.join(candidate.names)} [{candidate.shape}]: predicted {entry.predicted_tokens_s:.1f}, measured "
        f"{entry.measured_tokens_s:.1f} tokens/s ({entry.off:+.1%}): {each}\n"
        f"     last run: simulated {one.simulated_tokens_s:.1f}, measured {one.whole_tokens_s:.1f}; "
        f"TTFT {1e3 * one.simulated_ttft_s:.0f} and {1e3 * one.ttft_s:.0f} ms, "
        f"TPOT {1e3 * one.simulated_tpot_s:.1f} and {1e3 * one.tpot_s:.1f} ms; "
        f"cores {one.cores}, held back {one.throttled}",
        flush=True,
    )
    causes = last["log"].partition("largest differences")[2].splitlines()[1:5]
    print("\n".join(f"     {line}" for line in causes), flush=True)
    return entry


def _read(data: Path) -> dict[str, list[dict[str, Any]]]:
    if not data.exists():
        return {"entries": [], "deadlines": []}
    found: dict[str, list[dict[str, Any]]] = json.loads(data.read_text())
    return found


def _keep(data: Path, entries: list[Entry], late: list[dict[str, Any]]) -> None:
    """Those of the same laboratory and model are replaced."""
    kept = _read(data)
    done = {(entry.lab, entry.model) for entry in entries}
    kept["entries"] = [e for e in kept["entries"] if (e["lab"], e["model"]) not in done]
    kept["entries"] += [entry.plain() for entry in entries]
    again = {found["lab"] for found in late}
    kept["deadlines"] = [found for found in kept["deadlines"] if found["lab"] not in again] + late
    kept["date"] = f"{datetime.now(UTC):%Y-%m-%d}"  # type: ignore[assignment]
    data.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
