"""Attention of a step's tokens over paged keys and values.

``attend`` is the one interface: it writes the keys and values of all rows, then attends, every row to its own
sequence's positions up to its own (and, with a window, to the last ``window`` of them). How the rows are grouped,
which pages are gathered and which masks apply is worked out once a step (``AttentionPlan``) and shared by all
layers with the same window. It runs on torch's fused attention over gathered pages, on CPU and CUDA alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from hexgen.worker.batch_inputs import BatchInputs, Decodes, Ints, PrefillRun
from hexgen.worker.kernels.step import Readers
from hexgen.worker.kv import KVLayer, KVPool

# A group of decodes is gathered, then attended. On a CPU both should happen while the group is in the core's
# cache; on a GPU one launch for everything is best.
GATHER_BYTES_CPU = 1024 * 1024
GATHER_BYTES_CUDA = 512 * 1024 * 1024
# Groups are split where padding would more than double what is gathered.
MAX_PADDING = 2.0
# A prefill run over a long context is masked in blocks of queries, at most so many mask elements at a time.
MASK_ELEMENTS = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class HeadLayout:
    """How a rank's query heads read its KV heads."""

    query_heads: int
    kv_heads: int
    head_dim: int
    # KV head (local index) of each query head, where they are not equal groups in order; else None.
    index: torch.Tensor | None
    readers: Readers

    @staticmethod
    def make(
        query_heads: tuple[int, int], kv_heads: tuple[int, int], group: int, head_dim: int, device: torch.device
    ) -> HeadLayout:
        """For global half-open ranges, where query head h reads KV head h // group."""
        reads = [h // group - kv_heads[0] for h in range(*query_heads)]
        n_kv = kv_heads[1] - kv_heads[0]
        even = len(reads) % n_kv == 0 and all(kv == i // (len(reads) // n_kv) for i, kv in enumerate(reads))
        index = None if even else torch.tensor(reads, dtype=torch.int64, device=device)
        return HeadLayout(len(reads), n_kv, head_dim, index, Readers.make(query_heads, kv_heads, group))

    @property
    def group(self) -> int:
        """Query heads of each KV head, after ``spread``."""
        return 1 if self.index is not None else self.query_heads // self.kv_heads

    def spread(self, kv: torch.Tensor, dim: int) -> torch.Tensor:
        """KV heads along ``dim``, one a query head where groups are unequal, unchanged otherwise."""
        return kv if self.index is None else kv.index_select(dim, self.index)


@dataclass(frozen=True, slots=True)
class _Gather:
    """Pages to bring together, and where: all views are made once a step, since making one costs a microsecond."""

    blocks: torch.Tensor  # indices into ``KVLayer.blocks``, in the order (sequence, side, head, page)
    buffer: torch.Tensor  # [blocks, page_size * head_dim], the pool's scratch: valid until the next gather
    keys: torch.Tensor  # [sequences, kv_heads, tokens, head_dim], a view of ``buffer``
    values: torch.Tensor  # the same

    def run(self, layer: KVLayer) -> None:
        torch.index_select(layer.blocks, 0, self.blocks, out=self.buffer)


@dataclass(frozen=True, slots=True)
class _DecodeGroup:
    """Some of the single rows, in order, one query each."""

    gather: _Gather
    mask: torch.Tensor | None  # [sequences, 1, 1, tokens] additive; None: every key counts


@dataclass(frozen=True, slots=True)
class _Prefill:
    """Rows ``[row, row + length)`` of one sequence; nothing is gathered where they start at position 0."""

    row: int
    length: int
    gather: _Gather | None
    masks: tuple[tuple[int, torch.Tensor | None], ...]  # (queries, mask [queries, keys]); None: plainly causal


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """One step's attention, for one window."""

    prefills: tuple[_Prefill, ...]
    groups: tuple[_DecodeGroup, ...]
    group_sizes: tuple[int, ...]
    first_single: int  # row of the first decode


def attend(
    q: torch.Tensor,
    kv: torch.Tensor,
    layer: KVLayer,
    batch: BatchInputs,
    window: int | None,
    heads: HeadLayout,
) -> torch.Tensor:
    """``q`` ``[tokens, query_heads, head_dim]`` and ``kv`` ``[tokens, 2, kv_heads, head_dim]`` (keys, then
    values), after rotary embedding, strided views allowed -> ``[tokens, query_heads * head_dim]``. Scores are
    scaled by head_dim ** -0.5.
    """
    write_kv(kv, layer, batch, heads)
    plan = plan_attention(batch, layer.pool, window)
    tokens, single = q.shape[0], plan.first_single
    if not plan.prefills:
        return _decode(q, plan, layer, heads).reshape(tokens, -1)
    out = torch.empty((tokens, heads.query_heads, heads.head_dim), dtype=q.dtype, device=q.device)
    for run in plan.prefills:
        rows = slice(run.row, run.row + run.length)
        if run.gather is None:
            keys, values = kv[rows, 0].transpose(0, 1), kv[rows, 1].transpose(0, 1)
        else:
            run.gather.run(layer)
            keys, values = run.gather.keys[0], run.gather.values[0]
        _prefill(q[rows], heads.spread(keys, 0), heads.spread(values, 0), run, heads, out[rows])
    if plan.groups:
        mixed = _decode(q[single:], plan, layer, heads)
        out[single:].view(mixed.shape).copy_(mixed)
    return out.view(tokens, -1)


def _decode(q: torch.Tensor, plan: AttentionPlan, layer: KVLayer, heads: HeadLayout) -> torch.Tensor:
    """One query a sequence -> ``[sequences, kv_heads, group, head_dim]``; a KV head's queries share one read."""
    queries = q.view(q.shape[0], -1, heads.group, heads.head_dim).split_with_sizes(plan.group_sizes)
    mixed = []
    for part, group in zip(queries, plan.groups, strict=True):
        gather = group.gather
        gather.run(layer)
        keys, values = heads.spread(gather.keys, 1), heads.spread(gather.values, 1)
        mixed.append(F.scaled_dot_product_attention(part, keys, values, attn_mask=group.mask))
    return mixed[0] if len(mixed) == 1 else torch.cat(mixed)


def _prefill(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, run: _Prefill, heads: HeadLayout, out: torch.Tensor
) -> None:
    """``q`` and ``out`` ``[queries, query_heads, head_dim]``; keys and values ``[kv heads, keys, head_dim]``.

    The members of a KV group become the batch, whose keys are one expanded view: nothing is repeated in memory.
    """
    group, dim = heads.group, heads.head_dim
    keys, values = (side.expand(group, *side.shape) for side in (keys, values))
    done = 0
    for queries, mask in run.masks:
        part = q[done : done + queries].view(queries, -1, group, dim).permute(2, 1, 0, 3)
        mixed = F.scaled_dot_product_attention(part, keys, values, attn_mask=mask, is_causal=mask is None)
        out[done : done + queries].view(queries, -1, group, dim).copy_(mixed.permute(2, 1, 0, 3))
        done += queries


def write_kv(kv: torch.Tensor, layer: KVLayer, batch: BatchInputs, heads: HeadLayout) -> None:
    """``kv`` ``[tokens, 2, kv_heads, head_dim]`` of the step's rows into their pages."""
    rows = batch.memo.get("write_rows")
    if rows is None:
        rows = batch.memo["write_rows"] = torch.from_numpy(row_numbers(batch, layer.pool)).to(batch.device)
    layer.rows.index_copy_(0, rows, kv.reshape(-1, heads.head_dim))


def row_numbers(batch: BatchInputs, pool: KVPool) -> Ints:
    """Rows of ``KVLayer.rows`` for the step's keys and values, in the order (token, side, head)."""
    sides = np.arange(2 * pool.kv_heads)
    blocks = batch.slot_pages[:, None] * (2 * pool.kv_heads) + sides
    return (blocks * pool.page_size + batch.slot_offsets[:, None]).reshape(-1)


def plan_attention(batch: BatchInputs, pool: KVPool, window: int | None) -> AttentionPlan:
    """The step's plan for ``window``, made on first use. A batch belongs to one pool."""
    plan = batch.memo.get(("attention", window))
    if plan is None:
        groups = tuple(_plan_decodes(batch.decodes, pool, window, batch.device))
        plan = AttentionPlan(
            prefills=tuple(_plan_prefill(run, pool, window, batch.device) for run in batch.prefills),
            groups=groups,
            group_sizes=tuple(group.gather.keys.shape[0] for group in groups),
            first_single=batch.decodes.row,
        )
        batch.memo[("attention", window)] = plan
    known: AttentionPlan = plan
    return known


def _plan_prefill(run: PrefillRun, pool: KVPool, window: int | None, device: torch.device) -> _Prefill:
    if run.start == 0 and (window is None or run.length <= window):
        return _Prefill(run.row, run.length, None, ((run.length, None),))
    gather, first = None, 0
    if run.start > 0:
        first_page = _first_seen(run.start, window) // pool.page_size
        first = first_page * pool.page_size
        gather = _gather(run.pages[None, first_page:], pool, device)
    n_keys = run.length if gather is None else gather.keys.shape[2]
    keys = first + torch.arange(n_keys, device=device)
    masks: list[tuple[int, torch.Tensor | None]] = []
    block = max(1, MASK_ELEMENTS // n_keys)
    for done in range(0, run.length, block):
        queries = run.start + torch.arange(done, min(done + block, run.length), device=device)
        masks.append((queries.shape[0], _mask(queries[:, None], keys, window, pool.dtype)))
    return _Prefill(run.row, run.length, gather, tuple(masks))


def _plan_decodes(decodes: Decodes, pool: KVPool, window: int | None, device: torch.device) -> list[_DecodeGroup]:
    """Cut the sorted decodes where a group would be padded too much or gather too many bytes."""
    size, positions = pool.page_size, decodes.positions
    first_pages = [_first_seen(p, window) // size for p in positions]
    counts = [p // size - f + 1 for p, f in zip(positions, first_pages, strict=True)]
    page_bytes = 2 * pool.kv_heads * size * pool.head_dim * pool.dtype.itemsize
    most = (GATHER_BYTES_CUDA if device.type == "cuda" else GATHER_BYTES_CPU) // page_bytes
    groups: list[_DecodeGroup] = []
    begin, used, longest = 0, 0, 0
    for i in range(len(counts) + 1):
        if i < len(counts):
            used, longest = used + counts[i], max(longest, counts[i])
            padded = (i - begin + 1) * longest
            if i == begin or (padded <= MAX_PADDING * used and padded <= most):
                continue
        if i > begin:
            members = range(begin, i)
            table = np.zeros((len(members), max(counts[begin:i])), dtype=np.int64)
            for j, m in enumerate(members):
                table[j, : counts[m]] = decodes.pages[m][first_pages[m] :]
            begins = [first_pages[m] * size for m in members]
            at = [positions[m] for m in members]
            groups.append(_decode_group(table, begins, at, pool, window, device))
        if i < len(counts):
            begin, used, longest = i, counts[i], counts[i]
    return groups


def _decode_group(
    table: Ints,
    begins: list[int],
    positions: list[int],
    pool: KVPool,
    window: int | None,
    device: torch.device,
) -> _DecodeGroup:
    """``table`` ``[sequences, pages]``; its first page begins at position ``begins`` of each sequence."""
    if len(positions) == 1:
        seen = slice(_first_seen(positions[0], window) - begins[0], positions[0] + 1 - begins[0])
        return _DecodeGroup(_gather(table, pool, device, seen), None)
    gather = _gather(table, pool, device)
    bounds = torch.tensor((begins, positions), device=device)
    keys = bounds[0, :, None] + torch.arange(gather.keys.shape[2], device=device)
    mask = _mask(bounds[1, :, None], keys, window, pool.dtype)
    return _DecodeGroup(gather, mask[:, None, None, :])


def _first_seen(position: int, window: int | None) -> int:
    return 0 if window is None else max(0, position - window + 1)


def _mask(queries: torch.Tensor, keys: torch.Tensor, window: int | None, dtype: torch.dtype) -> torch.Tensor:
    """Additive: 0 where key position <= query position and > query position - window, else -inf."""
    hidden = keys > queries
    if window is not None:
        hidden = hidden | (keys <= queries - window)
    return torch.zeros(hidden.shape, dtype=dtype, device=keys.device).masked_fill_(hidden, float("-inf"))


def _gather(table: Ints, pool: KVPool, device: torch.device, seen: slice = slice(None)) -> _Gather:
    """``table`` ``[sequences, pages]``; ``seen`` limits the keys and values to some of the gathered tokens."""
    sides = np.arange(2 * pool.kv_heads)
    blocks = (table[:, None, :] * (2 * pool.kv_heads) + sides[:, None]).reshape(-1)
    width = pool.page_size * pool.head_dim
    buffer = pool.scratch(blocks.size * width)
    sequences, tokens = table.shape[0], table.shape[1] * pool.page_size
    both = buffer.view(sequences, 2, pool.kv_heads, tokens, pool.head_dim)[:, :, :, seen]
    return _Gather(torch.from_numpy(blocks).to(device), buffer.view(-1, width), both[:, 0], both[:, 1])


def reference_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int, window: int | None, head_index: list[int]
) -> torch.Tensor:
    """Plain attention in float64, what ``attend`` is tested against.

    ``q`` ``[queries, query_heads, head_dim]`` at positions from ``start`` on; ``k`` and ``v``
    ``[start + queries, kv_heads, head_dim]``; query head h reads KV head ``head_index[h]``.
    """
    queries = torch.arange(start, start + q.shape[0])[:, None]
    keys = torch.arange(k.shape[0])
    mask = _mask(queries, keys, window, torch.float64)
    index = torch.tensor(head_index)
    scores = torch.einsum("qhd,khd->hqk", q.double(), k.double()[:, index]) * q.shape[-1] ** -0.5 + mask
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v.double()[:, index])
