"""Each CUDA kernel's bandwidth or FLOP/s, beside what this card was measured to reach and what torch does.

    python benchmarks/kernels.py [--dtype bfloat16] [--quick] [--json]

Bandwidths are bytes that must be moved at least (every key and value once) over the median time; a measured copy
counts its reads and its writes. FLOP/s of prefilling count the pairs that the causal mask leaves, 4 x head size
each. Peers get the same inputs in the layout that they like best: torch's fused attention and FlexAttention read
contiguous keys and values without pages, which is less work than ours. All is timed by events, the median over
some rounds, with a buffer larger than the second-level cache written before each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from hexgen.batching.segments import Admission, Segment, SegmentKind, Step
from hexgen.errors import HexgenError
from hexgen.request import SamplingParams
from hexgen.worker.attention import HeadLayout
from hexgen.worker.attention_choice import SdpaAttention
from hexgen.worker.batch_inputs import BatchInputs, PageTables, build_batch
from hexgen.worker.kernels.attention import CudaAttention
from hexgen.worker.kernels.device import kernel_device
from hexgen.worker.kernels.layer import CudaCandidates, CudaLayerKernels
from hexgen.worker.kv import KVPool

DEVICE = torch.device("cuda", 0)
PAGE = 16


@dataclass(frozen=True, slots=True)
class Row:
    operation: str
    inputs: str
    implementation: str
    seconds: float
    amount: float  # bytes, or FLOP
    unit: str  # "B/s" or "FLOP/s"
    of_measured: float  # rate over that of the measured copy or matrix product

    @property
    def rate(self) -> float:
        return self.amount / self.seconds


def time_s(work: Callable[[], object], rounds: int) -> float:
    """Median over ``rounds``; each with cold caches."""
    flush = torch.empty(256 * 1024 * 1024, dtype=torch.int8, device=DEVICE)
    for _ in range(3):
        work()
    times = []
    for _ in range(rounds):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1000)
    return statistics.median(times)


def measured_copy(rounds: int) -> float:
    """Bytes/s, read and written, of a copy of 1 GiB."""
    a = torch.empty(1 << 30, dtype=torch.int8, device=DEVICE)
    b = torch.empty_like(a)
    return 2 * a.nbytes / time_s(lambda: b.copy_(a), rounds)


def measured_product(dtype: torch.dtype, rounds: int) -> float:
    n = 8192
    a, b = (torch.randn((n, n), device=DEVICE).to(dtype) for _ in range(2))
    return 2 * n**3 / time_s(lambda: a @ b, rounds)


@dataclass(frozen=True, slots=True)
class Inputs:
    q: torch.Tensor
    pool: KVPool
    batch: BatchInputs
    heads: HeadLayout


def paged(
    sequences: list[tuple[int, int]], dtype: torch.dtype, head_dim: int, query_heads: int, kv_heads: int
) -> Inputs:
    """``sequences``: (tokens before, tokens now). Pages in random order."""
    counts = [-(-(a + b) // PAGE) for a, b in sequences]
    pool = KVPool(sum(counts), PAGE, 1, kv_heads, head_dim, dtype, DEVICE)
    pool.layer(0).rows.normal_()
    free = torch.randperm(sum(counts)).tolist()
    tables = PageTables(sum(counts), PAGE, 10)
    admitted, segments = [], []
    for i, (before, now) in enumerate(sequences):
        pages = tuple(free.pop() for _ in range(counts[i]))
        admitted.append(Admission(i, SamplingParams(), before + now, pages))
        kind = SegmentKind.DECODE if now == 1 else SegmentKind.PREFILL
        segments.append(Segment(i, kind, before, (1,) * now, (), True))
    step = Step(0, 0, (), tuple(admitted), tuple(segments))
    tables.apply(step)
    batch = build_batch(step, tables, PAGE, DEVICE)
    q = torch.randn((batch.n_tokens, query_heads, head_dim), device=DEVICE).to(dtype)
    heads = HeadLayout.make((0, query_heads), (0, kv_heads), query_heads // kv_heads, head_dim, DEVICE)
    return Inputs(q, pool, batch, heads)


def attention_rows(
    name: str,
    sequences: list[tuple[int, int]],
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    peak: float,
    rounds: int,
) -> list[Row]:
    """Ours, torch over gathered pages (what serves without kernels), torch's SDPA and FlexAttention without pages.

    ``shape``: head size, query heads, KV heads. All sequences are equally long.
    """
    head_dim, n_q, n_kv = shape
    inputs = paged(sequences, dtype, head_dim, n_q, n_kv)
    (before, now), n = sequences[0], len(sequences)
    layer, heads, batch = inputs.pool.layer(0), inputs.heads, inputs.batch
    kernels = CudaAttention(kernel_device(DEVICE), dtype, head_dim, PAGE, heads.readers)
    if now == 1:
        amount, unit = 2.0 * n * (before + 1) * n_kv * head_dim * dtype.itemsize, "B/s"
    else:
        pairs = n * (now * before + now * (now + 1) / 2)
        amount, unit = 4.0 * pairs * n_q * head_dim, "FLOP/s"
    q = inputs.q.view(n, now, n_q, head_dim).transpose(1, 2)
    k, v = (torch.randn((n, n_kv, before + now, head_dim), device=DEVICE).to(dtype) for _ in range(2))
    lower = torch.ones((now, before + now), dtype=torch.bool, device=DEVICE).tril(before) if before else None
    works: dict[str, Callable[[], object]] = {
        "hexgen kernel": lambda: kernels.attend(inputs.q, None, layer, batch, None, heads),
        "SDPA over gathered pages": lambda: SdpaAttention().attend(inputs.q, None, layer, batch, None, heads),
        "SDPA, contiguous": lambda: F.scaled_dot_product_attention(
            q, k, v, attn_mask=None if now == 1 else lower, is_causal=now > 1 and before == 0, enable_gqa=True
        ),
        "FlexAttention, contiguous": flex(q, k, v, before, now),
    }
    rows = []
    for label, work in works.items():
        try:
            seconds = time_s(work, rounds)
        except (RuntimeError, HexgenError) as error:  # no compiler for FlexAttention, or no memory for a gather
            print(f"{name}: {label}: {str(error).splitlines()[0]}", file=sys.stderr)
            continue
        rows.append(Row(name, f"{n} x {before}+{now}", label, seconds, amount, unit, amount / seconds / peak))
    return rows


def flex(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, before: int, now: int) -> Callable[[], object]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    mask = None
    if now > 1:
        mask = create_block_mask(lambda b, h, i, j: i + before >= j, None, None, now, before + now, device=DEVICE)
    return lambda: compiled(q, k, v, block_mask=mask, enable_gqa=True)


def layer_rows(dtype: torch.dtype, copy: float, rounds: int) -> list[Row]:
    """The bandwidth-bound rest, at Llama 3 8B's sizes and 256 tokens."""
    tokens, hidden, wide, vocabulary, size = 256, 4096, 14336, 128_256, dtype.itemsize
    kernels = CudaLayerKernels(kernel_device(DEVICE), dtype, 128, 1e-5)
    candidates = CudaCandidates(kernel_device(DEVICE))
    x, more = (torch.randn((tokens, hidden), device=DEVICE).to(dtype) for _ in range(2))
    weight = torch.ones(hidden, dtype=dtype, device=DEVICE)
    gate_up = torch.randn((tokens, 2 * wide), device=DEVICE).to(dtype)
    logits = torch.randn((tokens, vocabulary), device=DEVICE)
    inputs = paged([(100, 1)] * tokens, dtype, 128, 32, 8)
    qkv = torch.randn((tokens, 48 * 128), device=DEVICE).to(dtype)
    cos, sin = (torch.randn((tokens, 1, 128), device=DEVICE).to(dtype) for _ in range(2))
    layer = inputs.pool.layer(0)
    works: list[tuple[str, str, Callable[[], object], float]] = [
        ("norm + residual", "hexgen kernel", lambda: kernels.rms_norm(x, weight, more), 4 * x.nbytes),
        ("norm + residual", "torch", lambda: F.rms_norm(x.add_(more), (hidden,), weight, 1e-5), 4 * x.nbytes),
        ("silu x up", "hexgen kernel", lambda: kernels.silu_mul(gate_up), 1.5 * gate_up.nbytes),
        ("silu x up", "torch", lambda: F.silu(gate_up[:, :wide]) * gate_up[:, wide:], 1.5 * gate_up.nbytes),
        (
            "rope + page write",
            "hexgen kernel",
            lambda: kernels.rope_kv_write(qkv, cos, sin, (None, None), layer, inputs.batch, 32),
            2.0 * qkv.nbytes + 2 * tokens * 128 * size,
        ),
        ("greedy", "hexgen kernel", lambda: candidates.greedy(logits, None, 0), logits.nbytes),
        ("greedy", "torch", lambda: logits.max(dim=1), logits.nbytes),
        ("top 128", "hexgen kernel", lambda: candidates.top_keys(logits, 128, 0), logits.nbytes),
        ("top 128", "torch", lambda: logits.topk(128, dim=1), logits.nbytes),
    ]
    rows = []
    for name, label, work, amount in works:
        seconds = time_s(work, rounds)
        rows.append(Row(name, f"{tokens} tokens", label, seconds, amount, "B/s", amount / seconds / copy))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--quick", action="store_true", help="shorter contexts and fewer rounds")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/kernels.py needs a CUDA device and a CUDA build of torch; there is none here")
    dtype = getattr(torch, options.dtype)
    rounds, scale = (10, 8) if options.quick else (30, 1)
    copy, product = measured_copy(rounds), measured_product(dtype, rounds)
    llama = (128, 32, 8)
    rows = attention_rows("decode", [(8192 // scale - 1, 1)] * 64, dtype, llama, copy, rounds)
    rows += attention_rows("decode", [(131_072 // scale - 1, 1)], dtype, llama, copy, rounds)
    rows += attention_rows(
        "decode, one head each", [(8192 // scale - 1, 1)] * 16, dtype, (128, 32, 32), copy, rounds
    )
    rows += attention_rows("prefill", [(0, 8192 // scale)], dtype, llama, product, rounds)
    rows += attention_rows("prefill, late", [(32_768 // scale, 2048 // scale)], dtype, llama, product, rounds)
    rows += layer_rows(dtype, copy, rounds)
    if options.json:
        print(json.dumps({"copy_bytes_s": copy, "product_flop_s": product, "rows": [asdict(row) for row in rows]}))
        return
    table = Table(
        title=f"{torch.cuda.get_device_name(DEVICE)}, {options.dtype}: copy {copy / 1e9:.0f} GB/s, "
        f"matrix product {product / 1e12:.0f} TFLOP/s"
    )
    for column in ("operation", "inputs", "implementation", "time", "rate", "of measured"):
        table.add_column(
            column, justify="left" if column in ("operation", "inputs", "implementation") else "right"
        )
    for row in rows:
        rate = f"{row.rate / 1e9:.0f} GB/s" if row.unit == "B/s" else f"{row.rate / 1e12:.1f} TFLOP/s"
        time_us = f"{row.seconds * 1e6:.1f} us"
        table.add_row(row.operation, row.inputs, row.implementation, time_us, rate, f"{row.of_measured:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
