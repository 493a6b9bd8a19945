"""The engine and ``transformers.generate`` as contenders, and the models that the benchmark runs."""

from __future__ import annotations

import multiprocessing
import shutil
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
import yaml

import hexgen
from hexgen import LLM, SamplingParams
from hexgen.model import load_model
from hexgen.worker.report import RankReport
from peers.race import Contender

BUNDLED = Path(hexgen.__file__).parent / "bundled" / "demo"
SEQUENCES = 16


def write_plan(
    folder: Path, name: str, model: Path, stages: int, threads: int, positions: int, dtype: str = "float32"
) -> Path:
    """A plan with ``stages`` CPU stages of ``threads`` threads each, with room for 16 sequences of ``positions``.

    Stages read about as many weights as each other: the output head counts as the layers that it weighs.
    """
    shape = load_model(model)
    layers, head = shape.layers, shape.embedding_parameters / shape.layer_parameters
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
            {"weight": 1.0, "path": [f"s{i}" for i in range(stages)], "kv_tokens": SEQUENCES * (32 + positions)}
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
        driver = psutil.Process(self._process.pid)
        ranks = [p for p in driver.children(recursive=True) if p.name().startswith("ray::")]
        self._usage = (driver, *ranks)

    def generate(self, prompts: list[list[int]], tokens: int) -> list[list[int]]:
        """Greedy, ``tokens`` for each prompt."""
        self._pipe.send((prompts, tokens))
        found: list[list[int]] = self._pipe.recv()
        return found

    def contender(self, prompts: list[list[int]], tokens: int) -> Contender:
        return Contender(lambda: sum(map(len, self.generate(prompts, tokens))), self.cpu_s)

    def cpu_s(self) -> float:
        """Processor seconds of the driver and the ranks so far; Ray's own processes are not counted."""
        return sum(sum(p.cpu_times()[:2]) for p in self._usage)

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
            pipe.send([list(o.outputs[0].token_ids) for o in llm.generate(prompts, params)])


class Transformers:
    """``transformers.generate`` in this process, on ``threads`` threads."""

    def __init__(self, model: Path, dtype: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=getattr(torch, dtype)
        ).eval()
        self.model.generation_config.eos_token_id = None  # always as many tokens as asked for

    def generate(self, prompts: list[list[int]], tokens: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            out = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens, pad_token_id=0
            )
        found: list[list[int]] = out[:, ids.shape[1] :].tolist()
        return found

    def contender(self, prompts: list[list[int]], tokens: int) -> Contender:
        return Contender(lambda: sum(map(len, self.generate(prompts, tokens))), time.process_time)


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
