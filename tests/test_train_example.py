"""The training example, run as a person would run it, on a few files and for a few steps."""

import json
import math
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[1]
STEPS = 30


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `out` (the export) and `work` (the log), after thirty steps."""
    folder = tmp_path_factory.mktemp("trained")
    source = Path(sysconfig.get_path("stdlib")) / "asyncio"
    options = {
        "--out": folder / "out",
        "--work": folder / "work",
        "--source": source,
        "--shape": "tiny",
        "--vocab": 512,
        "--steps": STEPS,
        "--tokens": 512,
        "--context": 64,
        "--threads": 1,
    }
    command = [sys.executable, str(ROOT / "examples" / "train_demo_model.py"), "--no-compile"]
    for name, value in options.items():
        command += [name, str(value)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_loss_falls(trained: Path) -> None:
    lines = [json.loads(line) for line in (trained / "work" / "log.jsonl").open()]
    losses = [line["loss"] for line in lines if line["event"] == "train"]
    exported = [line["nats_per_token"] for line in lines if line["event"] == "exported"]
    assert losses[0] > 0.9 * math.log(512)
    assert losses[-1] < losses[0] - 0.5
    assert exported[0] < losses[0] - 0.5


def test_export_loads_and_generates(trained: Path) -> None:
    out = trained / "out"
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    text = "async def main(self):\n\treturn  'naïve ☃'\r\n"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    prompt = torch.tensor([ids])
    made = model.generate(prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert made.shape == (1, len(ids) + 8)

    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "def f():"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|user|>def f():<|end|><|assistant|>"


def test_export_computes_what_was_trained(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers finds the same held-out loss as the example's own network."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    from train_demo.corpus import HeldOut, read_documents, split_documents
    from train_demo.model import SHAPES

    out = trained / "out"
    lines = [json.loads(line) for line in (trained / "work" / "log.jsonl").open()]
    reported = {x["context"]: x["nats_per_token"] for x in lines if x["event"] == "exported"}
    context = SHAPES["tiny"].max_positions
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    source = Path(sysconfig.get_path("stdlib")) / "asyncio"
    _, documents = split_documents(read_documents(source))
    tokens = HeldOut(documents, tokenizer.backend_tokenizer).tokens

    total, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, context):
            window = tokens[None, start : start + context + 1]
            logits = model(window[:, :-1]).logits[0]
            losses = torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum")
            total, count = total + losses.item(), count + window.shape[1] - 1
    assert total / count == pytest.approx(reported[context], abs=2e-3)
