"""Decode steps of a whole model with random weights, in this process: one stage, embedding to sampled tokens.

    python benchmarks/decode.py [--model llama-3.1-8b] [--device cuda:0] [--dtype bfloat16] [--batch 1,64]
                                [--context 512] [--rounds 5] [--transformers]

The worker's own step (`worker/step_runner.py`), with CUDA graphs and without, beside the time that reading the
weights once takes at the bandwidth of a measured copy, and beside `transformers` on the same shape. On a CPU there
are no graphs, and the rest is the same. Rounds are interleaved: median (smallest to largest).
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import cast

import torch
from rich.console import Console
from rich.table import Table

from hexgen.builtin_models import BUILTIN_CONFIGS
from hexgen.discover.alone import PAGE_SIZE, RandomWeights, solo_config
from hexgen.discover.points import decode_load, step_of
from hexgen.model import DType, find_checkpoint, load_model
from hexgen.worker.checkpoint import Checkpoint, torch_dtype
from hexgen.worker.communicator import SoloCommunicator
from hexgen.worker.config import RankConfig
from hexgen.worker.decode_graphs import VARIABLE
from hexgen.worker.stage_model import StageModel
from hexgen.worker.step_runner import StepRunner

STEPS = 32  # timed at a time
Run = Callable[[], None]


def steps(config: RankConfig, stage: StageModel, batch: int, context: int, graphs: bool) -> Run:
    """A decode step of ``batch`` sequences that attend to ``context`` positions, to be run again and again."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = "1" if graphs else "0"
    runner = StepRunner(config, stage, SoloCommunicator())
    os.environ.pop(VARIABLE) if before is None else os.environ.update({VARIABLE: before})
    admitted, again = step_of(decode_load(batch, context), 0, 0, config.routes[0].pages, PAGE_SIZE, sample=True)
    with torch.inference_mode():
        runner.run(admitted, None)

    def run() -> None:
        with torch.inference_mode():
            runner.run(again, None)

    return run


def by_transformers(model: str, dtype: DType, device: str, batch: int, context: int) -> Run:
    """One forward pass of one token a sequence over a cache of ``context`` - 1 positions, and its argmax."""
    import transformers

    folder = find_checkpoint(model)
    if folder is None:
        told = dict(BUILTIN_CONFIGS[model])
        config = transformers.AutoConfig.for_model(told.pop("model_type"), **told)
    else:
        config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device(device):
        make = transformers.AutoModelForCausalLM.from_config
        net = make(config, dtype=torch_dtype(dtype)).eval()  # type: ignore[no-untyped-call]
        cache = transformers.DynamicCache(config=config)
        prompt = torch.ones((batch, context - 1), dtype=torch.int64)
        token = torch.ones((batch, 1), dtype=torch.int64)
    with torch.inference_mode():
        net(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def run() -> None:
        with torch.inference_mode():
            net(token, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1).cpu()
            cache.crop(-1)

    return run


def step_s(run: Run, device: str) -> float:
    began = time.perf_counter()
    for _ in range(STEPS):
        run()
    if device != "cpu":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / STEPS


def copy_bytes_s(device: str) -> float:
    """Read and written, of a copy that no cache holds."""
    size = 1 << (30 if device != "cpu" else 28)
    a = torch.ones(size, dtype=torch.int8, device=device)
    b = torch.empty_like(a)
    return 2 * size / min(step_s(lambda: void(b.copy_(a)), device) for _ in range(3))


def void(_: object) -> None:
    return


def spread(values: list[float], unit: float = 1.0) -> str:
    return f"{statistics.median(values) * unit:.2f} ({min(values) * unit:.2f} to {max(values) * unit:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--batch", default="1,64", help="sequences at once, separated by commas")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--transformers", action="store_true")
    asked = parser.parse_args()
    model, dtype = load_model(asked.model), cast(DType, asked.dtype)
    table = Table(title=f"{model.name}, {dtype}, {asked.device}, context {asked.context}")
    for column in ("batch", "way", "ms a step", "weights / (time x copy)", "tokens/s over transformers'"):
        table.add_column(column, justify="right")
    bandwidth = copy_bytes_s(asked.device)
    stage = None
    for batch in map(int, asked.batch.split(",")):
        pages = batch * -(-asked.context // PAGE_SIZE) + 1
        config = solo_config(
            model,
            dtype,
            asked.device,
            torch.get_num_threads(),
            layers=model.layers,
            pages=pages,
            max_sequences=batch,
        )
        stage = stage or StageModel(config, cast(Checkpoint, RandomWeights()), SoloCommunicator())
        ways = {"kernel by kernel": steps(config, stage, batch, asked.context, graphs=False)}
        if asked.device != "cpu":
            ways["CUDA graphs"] = steps(config, stage, batch, asked.context, graphs=True)
        if asked.transformers:
            ways["transformers"] = by_transformers(asked.model, dtype, asked.device, batch, asked.context)
        for run in ways.values():
            step_s(run, asked.device)
        found: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(asked.rounds):
            for way, run in ways.items():
                found[way].append(step_s(run, asked.device))
        for way, times in found.items():
            read = [stage.weights_bytes / (seconds * bandwidth) for seconds in times]
            peer = found.get("transformers")
            ratio = spread([b / a for a, b in zip(times, peer, strict=True)]) if peer else "-"
            table.add_row(str(batch), way, spread(times, 1e3), spread(read), ratio)
    console = Console()
    console.print(table)
    console.print(f"weights {stage.weights_bytes / 1e9 if stage else 0:.2f} GB; copy {bandwidth / 1e9:.0f} GB/s")


if __name__ == "__main__":
    main()
