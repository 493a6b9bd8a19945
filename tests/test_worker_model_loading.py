"""Checkpoints: what is read, what it takes, and what is refused."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import oracle
import pytest
import torch
from worker_driver import LocalRank, greedy_batch, rank_config

from hexgen.batching.segments import Admission, Segment, SegmentKind, Step
from hexgen.errors import CheckpointError, EngineError
from hexgen.memory import rank_weights_bytes
from hexgen.model import load_model
from hexgen.request import SamplingParams
from hexgen.split import split_stage
from hexgen.worker.batch_inputs import PageTables, build_batch
from hexgen.worker.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint
from hexgen.worker.communicator import SoloCommunicator
from hexgen.worker.kv import KVPool
from hexgen.worker.stage_model import StageModel


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return oracle.make_checkpoint(tmp_path_factory.mktemp("llama"), "llama")


class _RankOf(SoloCommunicator):
    """A rank that loads and never communicates."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size


@pytest.mark.parametrize("variant", ["llama", "llama-tied", "llama-bias", "qwen2", "qwen3-tied"])
@pytest.mark.parametrize("ends", [(True, True), (True, False), (False, True), (False, False)])
def test_a_rank_holds_and_reads_its_slices_alone(tmp_path: Path, variant: str, ends: tuple[bool, bool]) -> None:
    embeds, samples = ends
    path = oracle.make_checkpoint(tmp_path, variant)
    model = load_model(path)
    slices = split_stage(model, 4, (4, 2, 1, 1))
    for rank, part in enumerate(slices):
        config = rank_config(model, path, slices, rank, layers=(1, 3), embeds=embeds, samples=samples)
        seen: list[tuple[int, int]] = []
        checkpoint = Checkpoint(path)
        stage = StageModel(config, checkpoint, _RankOf(rank, 4), lambda done, total: seen.append((done, total)))  # noqa: B023
        assert stage.weights_bytes == rank_weights_bytes(model, "float32", 2, part, embeds, samples)
        assert stage.bytes_read == checkpoint.bytes_read == stage.weights_bytes
        assert seen[-1][0] == seen[-1][1] == stage.bytes_read
        assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_shards_equal_one_file(tmp_path: Path) -> None:
    one = oracle.make_checkpoint(tmp_path / "one", "llama")
    many = oracle.make_checkpoint(tmp_path / "many", "llama", max_shard_size="60KB")
    assert len(list(many.glob("*.safetensors"))) > 3
    prompt = [5, 6, 7]
    tokens = [greedy_batch(LocalRank(path, SoloCommunicator()), [prompt], 8) for path in (one, many)]
    assert tokens[0] == tokens[1]


def test_stages_of_some_layers_make_the_whole(llama: Path) -> None:
    """Three stages of 1, 2 and 1 layers, each with its own pool, pass hidden states on."""
    model, checkpoint = load_model(llama), Checkpoint(llama)
    slices = split_stage(model, 1)
    prompt = tuple(range(3, 20))
    step = Step(
        0, 0, (), (Admission(0, SamplingParams(), len(prompt)),),
        (Segment(0, SegmentKind.PREFILL, 0, prompt, (9, 3, 7, 1, 5), True),),
    )  # fmt: skip
    hidden, logits = None, None
    for layers in ((0, 1), (1, 3), (3, 4)):
        first, last = layers[0] == 0, layers[1] == model.layers
        config = rank_config(model, llama, slices, 0, layers=layers, embeds=first, samples=last)
        stage = StageModel(config, checkpoint, SoloCommunicator())
        tables = PageTables(10, 4, model.vocab_size)
        tables.apply(step)
        batch = build_batch(step, tables, 4, "cpu")
        pool = KVPool(10, 4, layers[1] - layers[0], model.kv_heads, model.head_dim, torch.float32, "cpu")
        hidden = stage.forward(stage.embed(batch) if hidden is None else hidden, batch, pool, layers)
        if last:
            logits = stage.logits(batch.rows_to_sample(hidden))
        else:
            with pytest.raises(EngineError, match="no output head"):
                stage.logits(hidden)
        if not first:
            with pytest.raises(EngineError, match="no embedding"):
                stage.embed(batch)
        with pytest.raises(EngineError, match="do not fit the stage"):
            stage.forward(hidden, batch, pool, (0, 4))
    assert logits is not None
    torch.testing.assert_close(logits[0], oracle.logits(llama, prompt)[-1], rtol=1e-4, atol=1e-4)


# ---- what is refused -------------------------------------------------------------------------------------


def _header(path: Path) -> tuple[dict[str, dict[str, object]], bytes]:
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def _rewrite(path: Path, change: Callable[[dict[str, dict[str, object]]], None]) -> None:
    header, data = _header(path)
    change(header)
    body = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(body)) + body + data)


def _drop_tensor(path: Path) -> None:
    _rewrite(path / SINGLE_FILE, lambda h: h.pop("model.layers.2.mlp.up_proj.weight") and None)


def _wrong_shape(path: Path) -> None:
    def change(header: dict[str, dict[str, object]]) -> None:
        header["model.layers.1.self_attn.o_proj.weight"]["shape"] = [24, 96]

    _rewrite(path / SINGLE_FILE, change)


def _quantized(path: Path) -> None:
    def change(header: dict[str, dict[str, object]]) -> None:
        entry = header["model.norm.weight"]
        entry["dtype"], entry["shape"] = "I8", [48 * 4]

    _rewrite(path / SINGLE_FILE, change)


def _lying_offsets(path: Path) -> None:
    def change(header: dict[str, dict[str, object]]) -> None:
        header["model.norm.weight"]["shape"] = [10**9]

    _rewrite(path / SINGLE_FILE, change)


def _truncate(path: Path) -> None:
    file = path / SINGLE_FILE
    file.write_bytes(file.read_bytes()[:-500])


def _truncate_in_header(path: Path) -> None:
    file = path / SINGLE_FILE
    file.write_bytes(file.read_bytes()[:100])


def _empty(path: Path) -> None:
    (path / SINGLE_FILE).write_bytes(b"")


def _garbage(path: Path) -> None:
    (path / SINGLE_FILE).write_bytes(struct.pack("<Q", 50) + b"\xff" * 100)


def _huge_header(path: Path) -> None:
    with (path / SINGLE_FILE).open("r+b") as file:
        file.write(struct.pack("<Q", 200_000_000))
        file.truncate(300_000_000)  # sparse: takes no room


def _pickled(path: Path) -> None:
    (path / SINGLE_FILE).rename(path / "pytorch_model.bin")


def _no_weights(path: Path) -> None:
    (path / SINGLE_FILE).unlink()


def _index(shard: object) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        (path / SINGLE_FILE).rename(path.parent / "stolen.safetensors")
        (path / INDEX_FILE).write_text(json.dumps({"weight_map": {"model.norm.weight": shard}}))

    return write


def _index_text(text: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        (path / SINGLE_FILE).unlink()
        (path / INDEX_FILE).write_text(text)

    return write


def _index_lies(path: Path) -> None:
    (path / SINGLE_FILE).rename(path / "a.safetensors")
    (path / INDEX_FILE).write_text(json.dumps({"weight_map": {"no.such.tensor": "a.safetensors"}}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_drop_tensor, r"up_proj.weight' is missing \(expected shape \[44, 48\]\)"),
        (_wrong_shape, r"o_proj.weight' has shape \[24, 96\], expected \[48, 48\]"),
        (_quantized, "stored as I8.*quantized"),
        (_lying_offsets, "takes 192 bytes in the header"),
        (_truncate, r"truncated: tensor .* \(download or copy"),
        (_truncate_in_header, "truncated: 100 bytes"),
        (_empty, "truncated: 0 bytes"),
        (_garbage, "malformed header"),
        (_huge_header, "header of 200000000 bytes"),
        (_pickled, "only pickled weights.*only safetensors are loaded"),
        (_no_weights, "neither model.safetensors nor"),
        (_index("../stolen.safetensors"), "not the name of a file in the directory"),
        (_index("/etc/passwd"), "not the name of a file in the directory"),
        (_index(7), "not the name of a file in the directory"),
        (_index("gone.safetensors"), "gone.safetensors: no such file"),
        (_index("weights.bin"), "not a safetensors file"),
        (_index_text("{"), "malformed JSON"),
        (_index_text("[]"), "no weight_map"),
        (_index_lies, "index lists tensor 'no.such.tensor'"),
    ],
    ids=lambda value: None if isinstance(value, str) else value.__qualname__.strip("_").split(".")[0],
)
def test_a_bad_checkpoint_is_one_clear_error(tmp_path: Path, spoil: Callable[[Path], None], message: str) -> None:
    path = oracle.make_checkpoint(tmp_path / "model", "llama")
    model = load_model(path)
    spoil(path)
    slices = split_stage(model, 1)
    with pytest.raises(CheckpointError, match=message) as error:
        StageModel(rank_config(model, path, slices, 0), Checkpoint(path), SoloCommunicator())
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        Checkpoint(tmp_path / "nowhere")


def test_slices_outside_a_tensor(llama: Path) -> None:
    checkpoint = Checkpoint(llama)
    name = "model.norm.weight"
    assert checkpoint.shape(name) == (48,)
    assert name in checkpoint
    assert checkpoint.read(name, 0, 5, 5, dtype=torch.float32).shape == (0,)
    assert torch.equal(
        checkpoint.read(name, 0, 5, 9, dtype=torch.float32), checkpoint.read(name, dtype=torch.float32)[5:9]
    )
    for dim, start, end in ((0, 0, 49), (0, -1, 3), (0, 7, 5), (1, 0, 1)):
        with pytest.raises(CheckpointError):
            checkpoint.read(name, dim, start, end, dtype=torch.float32)
    checkpoint.close()
    assert checkpoint.read(name, dtype=torch.bfloat16).dtype == torch.bfloat16
