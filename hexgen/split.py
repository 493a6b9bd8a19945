"""How a stage's heads, MLP columns and vocabulary rows are divided over its devices.

Both the planner (to count bytes) and the workers (to read their slices) call this, so they cannot disagree.
Any width up to the number of query heads works; nothing has to divide anything.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hexgen.errors import SpecError
from hexgen.model_spec import ModelSpec

Range = tuple[int, int]  # half-open


@dataclass(frozen=True, slots=True)
class RankSlice:
    """What one rank of a stage holds. All ranges are half-open."""

    query_heads: Range
    kv_heads: Range  # every KV head that a query head of this rank reads; neighbours may hold the same one
    columns: Range  # MLP intermediate columns
    vocab: Range  # rows of the embedding and of the output head

    @property
    def n_query_heads(self) -> int:
        return self.query_heads[1] - self.query_heads[0]

    @property
    def n_kv_heads(self) -> int:
        return self.kv_heads[1] - self.kv_heads[0]

    @property
    def n_columns(self) -> int:
        return self.columns[1] - self.columns[0]

    @property
    def n_vocab(self) -> int:
        return self.vocab[1] - self.vocab[0]


def deal(total: int, shares: Sequence[float], at_least: int = 0) -> tuple[Range, ...]:
    """Cut ``range(total)`` into one contiguous range a share, sizes by largest remainder.

    Each range has at least ``at_least`` items (``total >= at_least * len(shares)`` must hold).
    """
    n = len(shares)
    if n == 0 or any(not (0 < share < math.inf) for share in shares):
        raise SpecError(f"shares {list(shares)} must be positive numbers")
    if total < at_least * n:
        raise SpecError(f"cannot deal {total} over {n} ranks with at least {at_least} each")
    largest = max(shares)  # divided by first, so that no sum of shares overflows
    scaled = [share / largest for share in shares]
    weight = math.fsum(scaled)
    ideal = [total * share / weight for share in scaled]
    # Ideal sizes first, so that the floor of `at_least` only moves what it must.
    sizes = [max(at_least, int(x)) for x in ideal]
    while sum(sizes) > total:  # the floor pushed some up: take from whoever is furthest above its ideal
        i = max((i for i in range(n) if sizes[i] > at_least), key=lambda i: (sizes[i] - ideal[i], -i))
        sizes[i] -= 1
    while sum(sizes) < total:
        i = max(range(n), key=lambda i: (ideal[i] - sizes[i], -i))
        sizes[i] += 1
    ranges: list[Range] = []
    start = 0
    for size in sizes:
        ranges.append((start, start + size))
        start += size
    return tuple(ranges)


def split_stage(model: ModelSpec, width: int, shares: Sequence[float] | None = None) -> tuple[RankSlice, ...]:
    """The slice of each of ``width`` ranks. Query heads are dealt with their KV heads; widths need not divide.

    Where ``width`` is at most the number of KV heads and dealing whole KV groups follows the shares as closely
    as dealing single heads does (within half a group a rank), whole groups are dealt, so that no KV head is
    held twice; otherwise a rank that needs part of a group holds that KV head too.
    """
    if width < 1 or width > model.heads:
        raise SpecError(
            f"a tensor-parallel width of {width} is outside 1..{model.heads}",
            remedy=f"{model.name} has {model.heads} attention heads; use at most that many devices in a stage",
        )
    weights = tuple(shares) if shares is not None else (1.0,) * width
    if len(weights) != width:
        raise SpecError(f"shares {list(weights)} must be {width} positive numbers")
    group = model.heads // model.kv_heads
    heads = deal(model.heads, weights, at_least=1)
    if width <= model.kv_heads:
        whole = tuple((a * group, b * group) for a, b in deal(model.kv_heads, weights, at_least=1))
        if all(
            2 * abs((b - a) - (d - c)) < group or (a, b) == (c, d)
            for (a, b), (c, d) in zip(whole, heads, strict=True)
        ):
            heads = whole
    # Nobody is left without a column or a row where there are enough: an empty product is a case of its own.
    columns = deal(model.intermediate_size, weights, at_least=int(model.intermediate_size >= width))
    vocab = deal(model.vocab_size, weights, at_least=int(model.vocab_size >= width))
    return tuple(
        RankSlice(
            query_heads=(a, b),
            kv_heads=(a // group, (b - 1) // group + 1),
            columns=columns[i],
            vocab=vocab[i],
        )
        for i, (a, b) in enumerate(heads)
    )
