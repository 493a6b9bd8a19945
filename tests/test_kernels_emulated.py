"""The kernels' logic on the host: compiled by g++ against an emulation of the hardware (tests/kernel_host)."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from attention_cases import MIXED, TOLERANCE, AttentionCase, Built, build, check
from emulated_kernels import COMPILER, EmulatedDevice
from test_kernels_arithmetic import LIMITS
from test_worker_sampler import admission, make_sampler, sample
from worker_driver import LocalRank, greedy_batch

from hexgen.request import SamplingParams
from hexgen.worker import layers, sampler
from hexgen.worker.attention import HeadLayout, row_numbers
from hexgen.worker.attention_choice import VARIABLE, Operations
from hexgen.worker.communicator import SoloCommunicator
from hexgen.worker.kernels.arithmetic import tiling
from hexgen.worker.kernels.attention import CudaAttention
from hexgen.worker.kernels.layer import CudaCandidates, CudaLayerKernels
from hexgen.worker.kernels.step import host_tables
from hexgen.worker.layers import RMSNorm
from hexgen.worker.sampling_math import to_keys

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no g++ here to compile the kernels for the host")

SLOTS = 64  # blocks that "run at once": enough of them to split the contexts above


def attention(case: AttentionCase, built: Built, arch: int, slots: int) -> CudaAttention:
    device = EmulatedDevice(LIMITS[arch], slots)
    dtype = getattr(torch, case.dtype)
    return CudaAttention(device, dtype, case.head_dim, case.page_size, built.heads.readers)  # type: ignore[arg-type]


def attends(case: AttentionCase, arch: int, slots: int = SLOTS) -> None:
    built = build(case)
    layer = built.pool.layer(0)
    found = attention(case, built, arch, slots).attend(built.q, None, layer, built.batch, case.window, built.heads)
    check(found, built, case)


def test_attention_on_tensor_cores() -> None:
    """Decoding and prefilling, split and whole, windowed, and on a shard that begins and ends inside a group."""
    attends(AttentionCase(), 90)
    attends(AttentionCase(window=13, query_heads=(3, 10)), 90)


def test_attention_in_plain_arithmetic() -> None:
    attends(AttentionCase("float32", 16, page_size=3, window=70, query_heads=(3, 10)), 90)


@pytest.mark.long
@pytest.mark.parametrize(
    ("arch", "dtype", "head_dim"),
    [
        *itertools.product((70, 75, 86), ("float16",), (64, 80, 128, 256)),
        *itertools.product((70, 80), ("bfloat16",), (96, 128)),
        (120, "float32", 128),
        (75, "float32", 256),
    ],
)
def test_attention_of_every_generation(arch: int, dtype: str, head_dim: int) -> None:
    """Volta's, Turing's and Ampere's tensor cores have fragments of their own; the emulation follows PTX's."""
    case = AttentionCase(dtype, head_dim)
    attends(case, arch)
    attends(case, arch, slots=1)
    attends(dataclasses.replace(case, window=29, query_heads=(3, 10), seed=1), arch)
    attends(dataclasses.replace(case, sequences=((200, 1), (0, 90)), seed=2), arch, slots=200)


@pytest.mark.long
@pytest.mark.parametrize(("group", "page_size"), [(1, 16), (7, 1), (20, 64)])
def test_attention_of_other_groups_and_pages(group: int, page_size: int) -> None:
    """More query heads on a KV head than a tile has rows; one; a page of one token."""
    attends(AttentionCase(group=group, query_heads=(0, 2 * group), page_size=page_size), 80)
    attends(AttentionCase("float32", 64, group=group, query_heads=(0, 2 * group), page_size=page_size), 80)


@pytest.mark.long
def test_attention_of_a_tree() -> None:
    """Drafted tokens see the context, and of each other only their ancestors."""
    case = AttentionCase(sequences=((50, 20), (9, 3)), query_heads=(0, 4))
    built = build(case)
    generator = np.random.default_rng(5)
    masks, expected = [], []
    words = np.zeros((built.batch.n_tokens, 1), dtype=np.uint32)
    pages = built.pool.layer(0).rows.view(built.pool.pages, 2, built.pool.kv_heads, 16, 64)
    for run in built.batch.prefills:
        parents = [-1] + [int(generator.integers(0, i)) for i in range(1, run.length)]
        sees = np.eye(run.length, dtype=bool)
        for i in range(1, run.length):
            sees[i] |= sees[parents[i]]
        assert not np.array_equal(sees, np.tri(run.length, dtype=bool)), "a chain would prove nothing"
        words[run.row : run.row + run.length, 0] = (sees * (1 << np.arange(run.length))).sum(axis=1)
        masks.append(np.concatenate([np.ones((run.length, run.start), dtype=bool), sees], axis=1))
        used = pages[torch.from_numpy(run.pages)].permute(1, 0, 3, 2, 4).flatten(1, 2)
        keys, values = used[:, : run.start + run.length].double()
        q = built.q[run.row : run.row + run.length].double()
        scores = torch.einsum("qhd,kgd->hqk", q, keys) * 64**-0.5
        scores = scores.masked_fill(~torch.from_numpy(masks[-1]), -torch.inf)
        expected.append(torch.einsum("hqk,kgd->qhd", scores.softmax(-1), values))
    tree = torch.from_numpy(words.view(np.int32))
    found = attention(case, built, 80, SLOTS).attend(
        built.q, None, built.pool.layer(0), built.batch, None, built.heads, tree
    )
    found = found.view(built.expected.shape)
    torch.testing.assert_close(found.double(), torch.cat(expected), rtol=0, atol=TOLERANCE["float16"])


# ---- the other operations --------------------------------------------------------------------------------


def layer_kernels(dtype: torch.dtype, head_dim: int = 80, eps: float = 1e-6) -> CudaLayerKernels:
    return CudaLayerKernels(EmulatedDevice(LIMITS[90], SLOTS), dtype, head_dim, eps)  # type: ignore[arg-type]


def test_rope_and_page_write() -> None:
    """With head norms and without; values untouched; keys and values in the slots named, nothing else written."""
    kind, head_dim = torch.bfloat16, 80
    case = AttentionCase("bfloat16", head_dim, 4, query_heads=(0, 6), group=3, sequences=((6, 5), (3, 1), (0, 1)))
    torch.manual_seed(0)
    for norms in ((None, None), (torch.randn(head_dim).to(kind), torch.randn(head_dim).to(kind))):
        built = build(case, written=False)
        batch, pool, n_q, n_kv = built.batch, built.pool, 6, 2
        tokens = batch.n_tokens
        before = pool.layer(0).rows.clone()
        angles = torch.randn(tokens, head_dim // 2)
        cos = torch.cat((angles.cos(), angles.cos()), -1).to(kind)
        sin = torch.cat((-angles.sin(), angles.sin()), -1).to(kind)
        qkv = torch.randn(tokens, n_q + 2 * n_kv, head_dim).to(kind)
        turned, values = qkv[:, : n_q + n_kv].clone(), qkv[:, n_q + n_kv :].clone()
        if norms[0] is not None:
            scaled = (turned.float() * RMSNorm(head_dim, 1e-6, torch.device("cpu")).scale(turned)).to(kind)
            turned = torch.cat((scaled[:, :n_q] * norms[0], scaled[:, n_q:] * norms[1]), dim=1)
        wide = turned.double()
        swapped = wide.view(tokens, n_q + n_kv, 2, -1).flip(2).flatten(2)
        expected = (wide * cos[:, None].double() + swapped * sin[:, None].double()).to(kind)
        flat = qkv.view(tokens, -1)
        layer_kernels(kind, head_dim).rope_kv_write(flat, cos, sin, norms, pool.layer(0), batch, n_q)
        torch.testing.assert_close(qkv[:, :n_q], expected[:, :n_q], rtol=1e-2, atol=1e-3)
        rows = torch.from_numpy(row_numbers(batch, pool))
        written = pool.layer(0).rows[rows].view(tokens, 2, n_kv, head_dim)
        torch.testing.assert_close(written[:, 0], expected[:, n_q:], rtol=1e-2, atol=1e-3)
        assert torch.equal(written[:, 1], values)
        others = torch.ones(before.shape[0], dtype=torch.bool)
        others[rows] = False
        torch.testing.assert_close(pool.layer(0).rows[others], before[others], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("size", [256, 77])
def test_rms_norm_with_residual(size: int) -> None:
    torch.manual_seed(1)
    x, more, weight = (torch.randn(shape).half() for shape in ((5, size), (5, size), (size,)))
    for add in (None, more):
        rows = x.clone()
        out = layer_kernels(torch.float16, eps=1e-5).rms_norm(rows, weight, add)
        summed = x if add is None else x + add
        assert torch.equal(rows, summed)
        expected = F.rms_norm(summed.float(), (size,), weight.float(), 1e-5)
        torch.testing.assert_close(out.float(), expected, rtol=4e-3, atol=1e-3)


@pytest.mark.parametrize("columns", [4096, 333])
def test_silu_mul(columns: int) -> None:
    x = torch.randn(3, 2 * columns).bfloat16() * 4
    expected = F.silu(x[:, :columns].float()) * x[:, columns:].float()
    found = layer_kernels(torch.bfloat16).silu_mul(x)
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=1e-3)


def test_candidates_are_the_samplers_keys() -> None:
    """Among many equal logits the lowest ids win; NaN and infinities count as the sampler has them."""
    generator = np.random.default_rng(3)
    logits = generator.integers(-6, 6, (4, 1000)).astype(np.float32) / 4
    logits[1] = generator.standard_normal(1000)
    logits[2, :5] = [np.nan, np.inf, -np.inf, -0.0, 0.0]
    logits[3] = -1.0
    keys = to_keys(np.nan_to_num(logits), np.arange(1000) + 77)
    tensor, rows = torch.from_numpy(logits), torch.tensor([2, 0, 3, 1])
    candidates = CudaCandidates(EmulatedDevice(LIMITS[90], SLOTS))  # type: ignore[arg-type]
    assert candidates.greedy(tensor, rows, 77).tolist() == keys.max(axis=1)[rows.numpy()].tolist()
    for count in (1, 50, 999, 1000):
        found = candidates.top_keys(tensor, count, 77).numpy()
        assert np.array_equal(np.sort(found, axis=1), np.sort(keys, axis=1)[:, 1000 - count :])


def test_the_sampler_by_kernel_and_by_torch_choose_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy rows alone, and among drawn ones; equal logits too."""
    greedy, drawn = SamplingParams(temperature=0), SamplingParams(temperature=1.0, top_k=5, seed=3)
    logits = torch.randint(-9, 9, (4, 2000), generator=torch.Generator().manual_seed(1)).float()
    for params in ((greedy,) * 4, (greedy, drawn, greedy, drawn)):
        asked = [admission(i, p) for i, p in enumerate(params)]
        found = []
        for chosen in (None, CudaCandidates(EmulatedDevice(LIMITS[90], SLOTS))):  # type: ignore[arg-type]
            monkeypatch.setattr(sampler, "choose_candidates", lambda _, chosen=chosen: chosen)
            found.append(sample(make_sampler(), logits, asked))
        assert found[0] is not None
        assert found[0] == found[1]


@pytest.mark.long
@pytest.mark.parametrize("variant", ["llama", "mistral", "qwen3"])
def test_a_model_on_emulated_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str) -> None:
    """The CUDA path of the worker, launches and all, against transformers: the same tokens."""
    device = EmulatedDevice(LIMITS[90], SLOTS)

    def emulated(_: object, dtype: torch.dtype, dim: int, page: int, heads: HeadLayout, eps: float) -> Operations:
        return Operations(
            CudaAttention(device, dtype, dim, page, heads.readers),  # type: ignore[arg-type]
            CudaLayerKernels(device, dtype, dim, eps),  # type: ignore[arg-type]
        )

    monkeypatch.setattr(layers, "choose_operations", emulated)
    monkeypatch.setenv(VARIABLE, "sdpa")  # else a CPU has kernels of its own
    path = oracle.make_checkpoint(tmp_path / variant, variant, head_dim=16)
    prompts = [[5, 9, 60], [3 + i % 90 for i in range(23)]]
    found = greedy_batch(LocalRank(path, SoloCommunicator()), prompts, 4, chunk=16)
    assert found == [oracle.greedy(path, prompt, 4) for prompt in prompts]
    kernels = {"rope_kv_write", "rms_norm", "silu_mul", "decode_attention", "prefill_attention"}
    assert kernels <= set(device.launched)


def test_the_mixture_has_every_kind_of_run() -> None:
    """What the cases above rest on: both kernels have work, and some of it is split."""
    built = build(AttentionCase(sequences=MIXED))
    shapes = [tiling("float16", 64, LIMITS[90], decode, 4) for decode in (False, True)]
    tables = host_tables(built.batch, None, built.heads.readers, *shapes, SLOTS, SLOTS)
    assert tables.long is not None
    assert tables.short is not None
    assert tables.long.partials > 0
    assert tables.short.partials > 0
    assert tables.short.partials < len(tables.short.tasks), "some decodes are whole"
