"""Speed of the engine against `transformers.generate`: the same checkpoint, dtype and threads, in one run.

    python benchmarks/engine.py [--model DIR] [--rounds 5] [--tokens 96] [--json]

Every figure is a ratio of two things measured alternately in this one run, round by round, because machines are
shared and drift: the median over the rounds is what to quote, beside the smallest and the largest. Three engines
stay up for the whole run (idle ones block and use no processor):

    one     one stage on `--threads` threads
    two     two stages of half the layers on half the threads each, joined by a gloo edge
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import transformers
import yaml
from rich.console import Console
from rich.table import Table

import hexgen
from hexgen import LLM, SamplingParams
from hexgen.worker.report import RankReport

BUNDLED = Path(hexgen.__file__).parent / "bundled" / "demo"


@dataclass(frozen=True, slots=True)
class Ratio:
    """Tokens/s of ``a`` over tokens/s of ``b``, round by round."""

    name: str
    goal: float
    median: float
    smallest: float
    largest: float
    a_tokens_s: float
    b_tokens_s: float


def write_plan(
    folder: Path, name: str, model: Path, layers: int, stages: int, threads: int, prompt_tokens: int, tokens: int
) -> Path:
    """A plan with ``stages`` equal CPU stages of ``threads`` threads each, with room for 16 sequences."""
    cuts = [round(i * layers / stages) for i in range(stages + 1)]
    nodes = [
        {"name": f"n{i}", "device": "cpu", "count": 1, "threads": threads, "memory": "2GB"} for i in range(stages)
    ]
    plan = {
        "version": 1,
        "model": str(model),
        "cluster": {"name": "benchmark", "nodes": nodes},
        "stages": {f"s{i}": {"layers": [cuts[i], cuts[i + 1]], "devices": [f"n{i}/0"]} for i in range(stages)},
        "routes": [
            {
                "weight": 1.0,
                "path": [f"s{i}" for i in range(stages)],
                "kv_tokens": 16 * (16 + prompt_tokens + tokens + 16),
            }
        ],
        "engine": {"dtype": "float32", "prefix_cache": False},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(plan, sort_keys=False))
    return path


class Engine:
    """An ``LLM`` on a Ray instance of its own, in a process of its own: engines must not share a driver's GIL."""

    def __init__(self, model: Path, plan: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_engine_process, args=(other, model, plan))
        self._process.start()
        other.close()
        self._pipe.recv()  # started

    def generate(self, prompts: list[list[int]], tokens: int) -> int:
        """Greedy; returns how many tokens came back."""
        self._pipe.send((prompts, tokens))
        return int(self._pipe.recv())

    def reports(self) -> dict[str, RankReport]:
        self._pipe.send("reports")
        return dict(self._pipe.recv())

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.send(None)
        self._process.join()


def _engine_process(pipe: Connection, model: Path, plan: Path) -> None:
    with LLM(model, plan=plan, backend="ray") as llm:
        pipe.send("started")
        while (job := pipe.recv()) is not None:
            if job == "reports":
                pipe.send(llm.reports())
                continue
            prompts, tokens = job
            params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
            pipe.send(sum(len(o.outputs[0].token_ids) for o in llm.generate(prompts, params)))


def tokens_per_s(run: Callable[[], int]) -> float:
    began = time.perf_counter()
    produced = run()
    return produced / (time.perf_counter() - began)


def compare(name: str, goal: float, rounds: int, a: Callable[[], int], b: Callable[[], int]) -> Ratio:
    a(), b()  # warm up both
    pairs = [(tokens_per_s(a), tokens_per_s(b)) for _ in range(rounds)]
    ratios = sorted(x / y for x, y in pairs)
    return Ratio(
        name,
        goal,
        statistics.median(ratios),
        ratios[0],
        ratios[-1],
        statistics.median(x for x, _ in pairs),
        statistics.median(y for _, y in pairs),
    )


def prompts_of(vocab_size: int, count: int, length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocab_size, (count, length), generator=generator).tolist()


def measure(options: argparse.Namespace) -> tuple[list[Ratio], float]:
    """The ratios, and seconds that a step of batch 16 spends outside the model (batching, headers, sampling)."""
    torch.set_num_threads(options.threads)
    reference = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    reference.generation_config.eos_token_id = None  # always --tokens tokens
    layers = reference.config.num_hidden_layers

    def with_transformers(prompts: list[list[int]]) -> Callable[[], int]:
        ids = torch.tensor(prompts)

        def run() -> int:
            with torch.inference_mode():
                out = reference.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=False,
                    max_new_tokens=options.tokens,
                    pad_token_id=0,
                )
            return int(out.shape[0]) * (int(out.shape[1]) - ids.shape[1])

        return run

    def with_hexgen(engine: Engine, prompts: list[list[int]]) -> Callable[[], int]:
        return lambda: engine.generate(prompts, options.tokens)

    sizes = (options.prompt_tokens, options.tokens)
    single = prompts_of(reference.config.vocab_size, 1, options.prompt_tokens)
    sixteen = prompts_of(reference.config.vocab_size, 16, options.prompt_tokens)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        one_plan = write_plan(folder, "one", options.model, layers, 1, options.threads, *sizes)
        two_plan = write_plan(folder, "two", options.model, layers, 2, max(1, options.threads // 2), *sizes)
        one = stack.enter_context(Engine(options.model, one_plan))
        two = stack.enter_context(Engine(options.model, two_plan))
        pairs = (
            ("one stage / transformers, 1 sequence", 1.2, with_hexgen(one, single), with_transformers(single)),
            ("one stage / transformers, batch 16", 1.1, with_hexgen(one, sixteen), with_transformers(sixteen)),
            ("two gloo stages / one stage, batch 16", 0.8, with_hexgen(two, sixteen), with_hexgen(one, sixteen)),
        )
        ratios = [compare(name, goal, options.rounds, a, b) for name, goal, a, b in pairs]
        before = next(iter(one.reports().values()))
        for _ in range(options.rounds):
            one.generate(sixteen, options.tokens)
        after = next(iter(one.reports().values()))
        outside_s = after.host_s * after.steps - before.host_s * before.steps
        return ratios, outside_s / (after.steps - before.steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=BUNDLED)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=96, help="tokens to generate for each prompt")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=max(1, os.cpu_count() or 1))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    ratios, outside_s = measure(options)
    if options.json:
        print(json.dumps({"ratios": [asdict(r) for r in ratios], "outside_model_s": outside_s}))
        return
    title = f"{options.model.name}, fp32, {options.threads} threads, {options.rounds} rounds"
    table = Table("comparison", "goal", "median", "min", "max", "tokens/s", "against", title=title)
    for r in ratios:
        figures = (r.goal, r.median, r.smallest, r.largest)
        table.add_row(r.name, *(f"{f:.2f}" for f in figures), f"{r.a_tokens_s:.0f}", f"{r.b_tokens_s:.0f}")
    console = Console(width=120)
    console.print(table)
    console.print(f"outside the model, one stage at batch 16: {outside_s * 1e3:.2f} ms a step (goal: below 1 ms)")


if __name__ == "__main__":
    main()
