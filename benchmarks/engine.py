"""Speed of the engine against `transformers.generate`: the same checkpoint, dtype and threads, in one run.

    python benchmarks/engine.py [--model DIR | --random] [--threads 1,2] [--dtype float32,bfloat16] [--json]

Every figure is a ratio of two things measured alternately in this one run, round by round, because machines are
shared and drift: the median over the rounds is what to quote, beside the smallest and the largest. Beside time on
the wall stands processor time, which other processes disturb less: of ours, the driver's and its ranks'. For each
number of threads and each dtype, these stay up (idle ones block and use no processor):

    one     one stage on all threads
    two     two stages of about half the weights on half the threads each, with a gloo edge (from two threads on)

`--random` stands for the bundled model, which a large cache holds whole, with a Llama of 32 M parameters, which
it does not: random weights, the same for everybody.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
import yaml
from rich.console import Console
from rich.table import Table

import hexgen
from hexgen import LLM, SamplingParams
from hexgen.model import load_model
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
    cpu_median: float  # the same in tokens per second of processor time
    a_tokens_cpu_s: float
    b_tokens_cpu_s: float


@dataclass(frozen=True, slots=True)
class Setting:
    dtype: str
    threads: int
    ratios: tuple[Ratio, ...]
    outside_model_s: float  # of a step of batch 16: batching, headers, sampling
    outside_after_s: float  # the same after `finished` requests more
    finished: int


def write_plan(
    folder: Path,
    name: str,
    model: Path,
    layers: int,
    stages: int,
    threads: int,
    prompt_tokens: int,
    tokens: int,
    dtype: str = "float32",
) -> Path:
    """A plan with ``stages`` CPU stages of ``threads`` threads each, with room for 16 sequences.

    Stages read about as many weights as each other: the output head counts as the layers that it weighs.
    """
    shape = load_model(model)
    head = shape.embedding_parameters / shape.layer_parameters
    cuts = [min(layers - stages + i, round(i * (layers + head) / stages)) for i in range(stages)] + [layers]
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
        "engine": {"dtype": dtype, "prefix_cache": False},
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

    def cpu_s(self) -> float:
        """Processor seconds of the driver and the ranks so far; Ray's own processes are not counted."""
        driver = psutil.Process(self._process.pid)
        ranks = [p for p in driver.children(recursive=True) if p.name().startswith("ray::")]
        return sum(sum(p.cpu_times()[:2]) for p in (driver, *ranks))

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


@dataclass(frozen=True, slots=True)
class Contender:
    run: Callable[[], int]  # produces tokens and says how many
    cpu_s: Callable[[], float]

    def speeds(self) -> tuple[float, float]:
        """Tokens per second on the wall, and of processor time."""
        cpu, began = self.cpu_s(), time.perf_counter()
        produced = self.run()
        wall = time.perf_counter() - began
        return produced / wall, produced / max(1e-9, self.cpu_s() - cpu)


def compare(name: str, goal: float, rounds: int, a: Contender, b: Contender) -> Ratio:
    a.run(), b.run()  # warm up both
    pairs = [(a.speeds(), b.speeds()) for _ in range(rounds)]
    ratios = sorted(x[0] / y[0] for x, y in pairs)
    medians = [statistics.median(pair[side][kind] for pair in pairs) for side in (0, 1) for kind in (0, 1)]
    return Ratio(
        name,
        goal,
        statistics.median(ratios),
        ratios[0],
        ratios[-1],
        medians[0],
        medians[2],
        statistics.median(x[1] / y[1] for x, y in pairs),
        medians[1],
        medians[3],
    )


def prompts_of(vocab_size: int, count: int, length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocab_size, (count, length), generator=generator).tolist()


def random_model(folder: Path) -> Path:
    """A Llama of 32 M parameters, random weights from a fixed seed; the bundled model's tokenizer."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=16384, hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=0,
        eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    path = folder / "random-32m"
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED / name, path)
    return path


def with_transformers(reference: Any, prompts: list[list[int]], tokens: int) -> Contender:
    ids = torch.tensor(prompts)

    def run() -> int:
        with torch.inference_mode():
            out = reference.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens, pad_token_id=0
            )
        return int(out.shape[0]) * (int(out.shape[1]) - ids.shape[1])

    return Contender(run, time.process_time)


def with_hexgen(engine: Engine, prompts: list[list[int]], tokens: int) -> Contender:
    return Contender(lambda: engine.generate(prompts, tokens), engine.cpu_s)


GOALS = {"float32": (2.2, 2.0), "bfloat16": (4.0, 2.5)}  # against transformers: one sequence, batch 16
FINISHED = 512


def measure(model: Path, dtype: str, threads: int, options: argparse.Namespace) -> Setting:
    torch.set_num_threads(threads)
    reference = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
    reference.generation_config.eos_token_id = None  # always --tokens tokens
    layers, vocab_size, tokens = reference.config.num_hidden_layers, reference.config.vocab_size, options.tokens
    single, sixteen = (prompts_of(vocab_size, n, options.prompt_tokens) for n in (1, 16))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))

        def engine(name: str, stages: int) -> Engine:
            sizes = (max(1, threads // stages), options.prompt_tokens, tokens)
            plan = write_plan(folder, name, model, layers, stages, *sizes, dtype=dtype)
            return stack.enter_context(Engine(model, plan))

        one = engine("one", 1)
        ours, theirs = (
            [with_hexgen(one, prompts, tokens) for prompts in (single, sixteen)],
            [with_transformers(reference, prompts, tokens) for prompts in (single, sixteen)],
        )
        names = ("one stage / transformers, 1 sequence", "one stage / transformers, batch 16")
        ratios = [
            compare(name, goal, options.rounds, a, b)
            for name, goal, a, b in zip(names, GOALS[dtype], ours, theirs, strict=True)
        ]
        if threads > 1:
            two = with_hexgen(engine("two", 2), sixteen, tokens)
            ratios.append(compare("two gloo stages / one stage, batch 16", 0.9, options.rounds, two, ours[1]))
        outside = outside_s(one, sixteen, options)
        for _ in range(FINISHED // 16):
            one.generate(sixteen, 2)
        return Setting(dtype, threads, tuple(ratios), outside, outside_s(one, sixteen, options), FINISHED)


def outside_s(engine: Engine, prompts: list[list[int]], options: argparse.Namespace) -> float:
    """Seconds that a step spends outside the model."""
    before = next(iter(engine.reports().values()))
    for _ in range(options.rounds):
        engine.generate(prompts, options.tokens)
    after = next(iter(engine.reports().values()))
    return (after.host_s * after.steps - before.host_s * before.steps) / (after.steps - before.steps)


def show(console: Console, model: str, setting: Setting, rounds: int) -> None:
    title = f"{model}, {setting.dtype}, {setting.threads} threads, {rounds} rounds"
    columns = ("goal", "median", "min", "max", "tokens/s", "against", "per CPU-s", "tokens/CPU-s", "against")
    table = Table("comparison", *columns, title=title)
    for r in setting.ratios:
        figures = [f"{f:.2f}" for f in (r.goal, r.median, r.smallest, r.largest)]
        wall = [f"{r.a_tokens_s:.0f}", f"{r.b_tokens_s:.0f}"]
        cpu = [f"{r.cpu_median:.2f}", f"{r.a_tokens_cpu_s:.0f}", f"{r.b_tokens_cpu_s:.0f}"]
        table.add_row(r.name, *figures, *wall, *cpu)
    console.print(table)
    outside, later = setting.outside_model_s * 1e3, setting.outside_after_s * 1e3
    console.print(
        f"outside the model, one stage at batch 16: {outside:.2f} ms a step (goal: below 1 ms), "
        f"{later:.2f} ms after {setting.finished} requests more"
    )


def main() -> None:
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
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    dtypes, threads = options.dtype.split(","), [int(n) for n in options.threads.split(",")]
    if set(dtypes) - set(GOALS) or min(threads) < 1:
        parser.error("--dtype takes float32 and bfloat16, --threads numbers from 1 on")

    settings, console = [], Console(width=150)
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(Path(folder)) if options.random else options.model
        for dtype in dtypes:
            for n in threads:
                settings.append(measure(model, dtype, n, options))
                if not options.json:
                    show(console, model.name, settings[-1], options.rounds)
    if options.json:
        print(json.dumps([asdict(setting) for setting in settings]))


if __name__ == "__main__":
    main()
