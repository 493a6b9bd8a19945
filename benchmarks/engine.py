"""Speed of the engine on CPUs against other engines: the same weights, dtype and threads, in one run.

    python benchmarks/engine.py [--model DIR | --random] [--threads 1,2] [--dtype float32,bfloat16] [--peers]

Every figure is a ratio of things measured alternately in this one run, round by round, because machines are
shared and drift: the median over the rounds is what to quote, beside the smallest and the largest. Beside time on
the wall stands processor time, which other processes disturb less: of ours, the driver's and its ranks'. For each
number of threads and each dtype, these stay up (idle ones block and use no processor):

    one         one stage on all threads
    two         from two threads on: two stages of half the weights and half the threads each, with a gloo edge
    peers       `transformers.generate`; with --peers also llama.cpp and OpenVINO, each in a virtual environment of
                its own, which is made when it is first asked for (see benchmarks/peers/environments.py)

`--random` stands for the bundled model, which a large cache holds whole, with a Llama of 32 M parameters, which
it does not: random weights, the same for everybody.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from peers.environments import PEERS, PeerError, default_folder
from peers.ours import BUNDLED, SEQUENCES, Engine, Transformers, prompts_of, random_model, write_plan
from peers.process import PeerProcess
from peers.race import Contender, Ratio, Speeds, race, ratio
from peers.step_cost import StageCost, StepCost, read_gb_s, stage_costs, step_costs
from rich.console import Console
from rich.table import Table

from hexgen.model import load_model

GOALS = {"float32": (2.2, 2.0), "bfloat16": (4.0, 2.5)}  # against transformers: one sequence, batch 16
TWO_STAGES_GOAL = 0.9
FINISHED = 512


@dataclass(frozen=True, slots=True)
class Setting:
    dtype: str
    threads: int
    ratios: tuple[Ratio, ...]
    same_tokens: dict[str, float]  # peer -> share of ours that it chose too, 16 sequences
    facts: dict[str, dict[str, str]]  # peer -> what it says about itself
    missing: dict[str, str]  # peer -> why it does not take part
    costs: tuple[StepCost, ...]
    later: StepCost  # of the largest batch, after `finished` requests more
    finished: int
    stages: tuple[StageCost, ...]  # of the two
    read_gb_s: float
    weights_bytes: int


def measure(model: Path, dtype: str, threads: int, options: argparse.Namespace) -> Setting:
    tokens, positions = options.tokens, options.prompt_tokens + options.tokens
    loads = [prompts_of(load_model(model).vocab_size, n, options.prompt_tokens) for n in (1, SEQUENCES)]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))

        def engine(name: str, stages: int) -> Engine:
            plan = write_plan(folder, name, model, stages, max(1, threads // stages), positions, dtype=dtype)
            return stack.enter_context(Engine(model, plan))

        one, reference = engine("one", 1), Transformers(model, dtype, threads)
        others: dict[str, PeerProcess] = {}
        missing: dict[str, str] = {}
        for name in options.peers:
            try:
                # The same numbers in the very dtype: nobody converts them while loading.
                reference.model.save_pretrained(folder / name)
                sizes = (SEQUENCES, positions)
                peer = PeerProcess(PEERS[name], options.peers_folder, folder / name, dtype, threads, sizes)
                others[name] = stack.enter_context(peer)
            except PeerError as error:
                missing[name] = str(error)
                print(f"without {name}: {error}", file=sys.stderr)

        ratios: list[Ratio] = []
        for prompts, label, goal in zip(loads, ("1 sequence", f"batch {SEQUENCES}"), GOALS[dtype], strict=True):
            contenders: dict[str, Contender] = {"one stage": one.contender(prompts, tokens)}
            contenders["transformers"] = reference.contender(prompts, tokens)
            contenders |= {name: peer.contender(prompts, tokens) for name, peer in others.items()}
            found: dict[str, list[Speeds]] = race(options.rounds, contenders)
            ours = found.pop("one stage")
            for name, theirs in found.items():
                ratios.append(
                    ratio(f"one stage / {name}, {label}", goal if name == "transformers" else None, ours, theirs)
                )
        stages: list[StageCost] = []
        if threads > 1:
            two = engine("two", 2)
            found = race(
                options.rounds, {e: x.contender(loads[1], tokens) for e, x in (("one", one), ("two", two))}
            )
            name = f"two gloo stages / one stage, batch {SEQUENCES}"
            ratios.append(ratio(name, TWO_STAGES_GOAL, found["two"], found["one"]))
            stages = stage_costs(two, loads[1], tokens, options.rounds)

        ours_said = one.generate(loads[1], tokens)
        same = {
            name: agreement(ours_said, peer.generate(loads[1], tokens))
            for name, peer in {"transformers": reference, **others}.items()
        }
        batches = [2**i for i in range(SEQUENCES.bit_length())]
        costs = step_costs(one, loads[1], batches, tokens, options.rounds)
        for _ in range(FINISHED // SEQUENCES):
            one.generate(loads[1], 2)
        later = step_costs(one, loads[1], [SEQUENCES], tokens, options.rounds)[0]
        weights = next(iter(one.reports().values())).weights_bytes
        facts = {name: peer.facts for name, peer in others.items()}
        return Setting(
            dtype, threads, tuple(ratios), same, facts, missing, tuple(costs), later, FINISHED, tuple(stages),
            read_gb_s(threads), weights,
        )  # fmt: skip


def agreement(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """The share of tokens that come before the first difference of their sequence."""
    pairs = [[a == b for a, b in zip(x, y, strict=True)] for x, y in zip(ours, theirs, strict=True)]
    kept = sum(pair.index(False) if False in pair else len(pair) for pair in pairs)
    return kept / sum(len(pair) for pair in pairs)


def show(console: Console, model: str, setting: Setting, rounds: int) -> None:
    columns = (
        "goal",
        "median",
        "min",
        "max",
        "tokens/s",
        "against",
        "per CPU-s",
        "min",
        "max",
        "tokens/CPU-s",
        "against",
    )
    table = Table(
        "comparison", *columns, title=f"{model}, {setting.dtype}, threads: {setting.threads}, {rounds} rounds"
    )
    for r in setting.ratios:
        wall = [f"{f:.2f}" for f in (r.median, r.smallest, r.largest)]
        cpu = [f"{f:.2f}" for f in (r.cpu_median, r.cpu_smallest, r.cpu_largest)]
        speeds = [f"{f:.0f}" for f in (r.a_tokens_s, r.b_tokens_s, r.a_tokens_cpu_s, r.b_tokens_cpu_s)]
        goal = "" if r.goal is None else f"{r.goal:.1f}"
        table.add_row(r.name, goal, *wall, *speeds[:2], *cpu, *speeds[2:])
    console.print(table)
    for name, share in setting.same_tokens.items():
        facts = setting.facts.get(name, {})
        said = f"; {facts['version']}, {facts['notes'].strip()}" if facts else ""
        console.print(f"{name}: {100 * share:.0f} % of the tokens before the first that differs from ours{said}")
    steps = Table(
        "batch", "a step, ms", "of it the model", "the rest", "the model, ms a row", title="cost of a decode step"
    )
    for label, cost in [
        *((str(c.batch), c) for c in setting.costs),
        (f"{setting.later.batch}, later", setting.later),
    ]:
        figures = (cost.step_s, cost.model_s, cost.host_s, cost.model_s / cost.batch)
        steps.add_row(label, *(f"{1e3 * f:.2f}" for f in figures))
    console.print(steps)
    for stage in setting.stages:
        parts = (stage.model_s, stage.transfer_s, stage.host_s, stage.idle_s)
        model_ms, transfer_ms, host_ms, idle_ms = (1e3 * seconds for seconds in parts)
        console.print(
            f"two stages, {stage.stage}: a step of {SEQUENCES // 2} takes {model_ms:.2f} ms in the model, "
            f"{transfer_ms:.2f} passing on, {host_ms:.2f} the host, {idle_ms:.2f} idle"
        )
    once = setting.weights_bytes / setting.read_gb_s / 1e6
    console.print(
        f"reading the {setting.weights_bytes / 1e6:.0f} MB of weights takes {once:.2f} ms at "
        f"{setting.read_gb_s:.1f} GB/s, as a sum over 256 MB does; "
        f"later: after {setting.finished} requests more"
    )


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    cores = max(1, os.cpu_count() or 1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", type=Path, default=BUNDLED)
    which.add_argument("--random", action="store_true", help="32 M parameters at random")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=96, help="tokens to generate for each prompt")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--threads", default=str(cores), help="several with commas between")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16, or both with a comma between")
    parser.add_argument(
        "--peers", nargs="?", const=",".join(PEERS), default="", help=f"all, or of {', '.join(PEERS)}"
    )
    parser.add_argument("--peers-folder", type=Path, default=default_folder(), help="of their environments")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    options.threads = [int(n) for n in options.threads.split(",")]
    options.dtypes = options.dtype.split(",")
    options.peers = [name for name in options.peers.split(",") if name]
    if set(options.dtypes) - set(GOALS) or min(options.threads) < 1 or options.tokens < 2:
        parser.error("--dtype takes float32 and bfloat16, --threads numbers from 1 on, --tokens from 2 on")
    if set(options.peers) - set(PEERS):
        parser.error(f"--peers takes {', '.join(PEERS)}")
    return options


def main() -> None:
    options = options_of()
    settings, console = [], Console(width=170)
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(Path(folder)) if options.random else options.model
        for dtype in options.dtypes:
            for n in options.threads:
                settings.append(measure(model, dtype, n, options))
                if not options.json:
                    show(console, model.name, settings[-1], options.rounds)
    if options.json:
        print(json.dumps([asdict(setting) for setting in settings]))


if __name__ == "__main__":
    main()
