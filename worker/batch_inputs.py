"""From a step of segments to the tensors of one forward pass.

``PageTables`` remembers which pages each sequence owns; ``build_batch`` lays the step's tokens out in rows. Row
order is a batch's own and the same on every rank and stage (it depends on the step alone): first prefill runs in
the step's order, then single tokens sorted by position, so that sequences of like length lie together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hexgen.batching.segments import Admission, Segment, Step
from hexgen.errors import EngineError

Ints = npt.NDArray[np.int64]
Run = tuple[int, int, int]  # first row, tokens, position of the first


class _Sequence:
    """One live sequence's page table."""

    __slots__ = ("count", "pages", "prompt_tokens")

    def __init__(self, prompt_tokens: int) -> None:
        self.pages: Ints = np.zeros(16, dtype=np.int64)
        self.count = 0
        self.prompt_tokens = prompt_tokens

    def extend(self, pages: tuple[int, ...]) -> None:
        end = self.count + len(pages)
        if end > self.pages.size:
            self.pages = np.resize(self.pages, max(end, 2 * self.pages.size))
        self.pages[self.count : end] = pages
        self.count = end


class PageTables:
    """The page tables of one route on one rank, kept in step with the head's by applying every step in order.

    ``pages`` and ``page_size`` are the route's pool; ``vocab_size`` bounds token ids. Anything that does not fit
    raises ``EngineError`` before it changes a table.
    """

    def __init__(self, pages: int, page_size: int, vocab_size: int, max_sequences: int = 65_536) -> None:
        self.pages = pages
        self.page_size = page_size
        self.vocab_size = vocab_size
        self.max_sequences = max_sequences
        self._sequences: dict[int, _Sequence] = {}

    def __len__(self) -> int:
        return len(self._sequences)

    def apply(self, step: Step) -> None:
        """Forget the released sequences, take in the admitted ones, append the segments' new pages."""
        for sequence in step.released:
            if self._sequences.pop(sequence, None) is None:
                raise EngineError(f"released sequence {sequence} is unknown", where=_where(step))
        for admission in step.admitted:
            self._admit(admission, step)
        for segment in step.segments:
            if segment.new_pages:
                self._extend(self.sequence(segment.sequence, step), segment.new_pages, step)

    def sequence(self, number: int, step: Step) -> _Sequence:
        try:
            return self._sequences[number]
        except KeyError:
            raise EngineError(f"sequence {number} is unknown", where=_where(step)) from None

    def _admit(self, admission: Admission, step: Step) -> None:
        if admission.sequence in self._sequences:
            raise EngineError(f"sequence {admission.sequence} is admitted twice", where=_where(step))
        if len(self._sequences) >= self.max_sequences:
            raise EngineError(f"more than {self.max_sequences} sequences", where=_where(step))
        entry = _Sequence(admission.prompt_tokens)
        self._extend(entry, admission.pages, step)
        self._sequences[admission.sequence] = entry

    def _extend(self, entry: _Sequence, pages: tuple[int, ...], step: Step) -> None:
        if not pages:
            return
        if min(pages) < 0 or max(pages) >= self.pages or entry.count + len(pages) > self.pages:
            raise EngineError(f"pages {pages[:8]} are outside the pool of {self.pages}", where=_where(step))
        entry.extend(pages)


@dataclass(frozen=True, slots=True)
class PrefillRun:
    """Rows ``[row, row + length)``: tokens at positions ``[start, start + length)`` of one sequence."""

    row: int
    length: int
    start: int
    pages: Ints  # of positions [0, start + length)


@dataclass(frozen=True, slots=True)
class Decodes:
    """Rows from ``row`` on: one token each of different sequences, by ascending position."""

    row: int
    positions: tuple[int, ...]
    pages: tuple[Ints, ...]  # of each sequence, for positions [0, position]

    @property
    def runs(self) -> list[Run]:
        return [(self.row + i, 1, at) for i, at in enumerate(self.positions)]


def run_table(runs: Sequence[Run], pages: Sequence[Ints]) -> tuple[Ints, Ints]:
    """``[runs, 4]`` (row, length, start, where its pages begin), and the pages of all runs in a row."""
    table = np.empty((len(runs), 4), dtype=np.int64)
    if not runs:
        return table, np.zeros(0, dtype=np.int64)
    table[:, :3] = runs
    table[0, 3] = 0
    np.cumsum([owned.size for owned in pages[:-1]], out=table[1:, 3])
    return table, np.concatenate(pages)


@dataclass(slots=True)
class BatchInputs:
    """What a forward pass needs to know of its step; tensors are on the rank's device."""

    tokens: torch.Tensor  # [tokens] int64 ids
    positions: torch.Tensor  # [tokens] int64
    # [tokens] int64: length of the sequence when the token is first computed (its prompt, or up to itself).
    lengths: torch.Tensor
    slot_pages: Ints  # [tokens]: page that the token's key and value go to
    slot_offsets: Ints  # [tokens]: place in that page
    prefills: tuple[PrefillRun, ...]
    decodes: Decodes
    sample_rows: torch.Tensor | None  # [sampled] int64, in the order of step.sampled; None: every row, in order
    sampled: int
    device: torch.device
    # What layers work out once a step: attention plans by window, rotary tables.
    memo: dict[Any, Any] = field(default_factory=dict)

    @property
    def n_tokens(self) -> int:
        return int(self.tokens.shape[0])

    def slots(self, page_size: int) -> Ints:
        """[tokens]: page * page_size + place in it, where the token's key and value go."""
        return self.slot_pages * page_size + self.slot_offsets

    def rows_to_sample(self, hidden: torch.Tensor) -> torch.Tensor:
        """The rows of ``hidden`` ``[tokens, hidden]`` whose logits are wanted, in ``step.sampled``'s order."""
        return hidden if self.sample_rows is None else hidden.index_select(0, self.sample_rows)


def build_batch(step: Step, tables: PageTables, page_size: int, device: torch.device | str) -> BatchInputs:
    """Lay out the rows of a step that ``tables`` has applied. ``EngineError`` where segments do not fit."""
    segments = step.segments
    runs = [i for i, s in enumerate(segments) if len(s.tokens) > 1]
    singles = sorted((i for i, s in enumerate(segments) if len(s.tokens) == 1), key=lambda i: segments[i].start)
    if len(runs) + len(singles) != len(segments):
        raise EngineError("a segment has no tokens", where=_where(step))
    if len({s.sequence for s in segments}) != len(segments):
        raise EngineError("a sequence has two segments", where=_where(step))

    n = step.tokens
    # tokens, positions, lengths, rows to sample: one array, so that one copy takes them to the device.
    table = np.empty((4, n), dtype=np.int64)
    slot_pages, slot_offsets = np.empty(n, dtype=np.int64), np.empty(n, dtype=np.int64)
    last_row = [0] * len(segments)
    prefills: list[PrefillRun] = []
    row = 0
    for i in runs:
        segment, entry = segments[i], _checked(segments[i], tables, page_size, step)
        end = row + len(segment.tokens)
        positions = np.arange(segment.start, segment.end)
        table[0, row:end] = segment.tokens
        table[1, row:end] = positions
        table[2, row:end] = np.where(positions < entry.prompt_tokens, entry.prompt_tokens, positions + 1)
        slot_pages[row:end] = entry.pages[positions // page_size]
        slot_offsets[row:end] = positions % page_size
        used = entry.pages[: (segment.end - 1) // page_size + 1]
        prefills.append(PrefillRun(row, len(segment.tokens), segment.start, used))
        last_row[i] = end - 1
        row = end
    first_single = row
    decode_pages: list[Ints] = []
    for i in singles:
        segment, entry = segments[i], _checked(segments[i], tables, page_size, step)
        at = segment.start
        table[0, row] = segment.tokens[0]
        table[1, row] = at
        table[2, row] = max(entry.prompt_tokens, at + 1)
        slot_pages[row] = entry.pages[at // page_size]
        slot_offsets[row] = at % page_size
        decode_pages.append(entry.pages[: at // page_size + 1])
        last_row[i] = row
        row += 1
    if n and (int(table[0].min()) < 0 or int(table[0].max()) >= tables.vocab_size):
        raise EngineError(f"a token id is outside the vocabulary of {tables.vocab_size}", where=_where(step))

    wanted = [last_row[i] for i, s in enumerate(segments) if s.sample]
    table[3, : len(wanted)] = wanted
    on_device = torch.from_numpy(table).to(device)
    return BatchInputs(
        tokens=on_device[0],
        positions=on_device[1],
        lengths=on_device[2],
        slot_pages=slot_pages,
        slot_offsets=slot_offsets,
        prefills=tuple(prefills),
        decodes=Decodes(first_single, tuple(segments[i].start for i in singles), tuple(decode_pages)),
        sample_rows=None if wanted == list(range(n)) else on_device[3, : len(wanted)],
        sampled=len(wanted),
        device=torch.device(device),
    )


def _checked(segment: Segment, tables: PageTables, page_size: int, step: Step) -> _Sequence:
    entry = tables.sequence(segment.sequence, step)
    if segment.start < 0 or segment.end > entry.count * page_size:
        raise EngineError(
            f"sequence {segment.sequence} has {entry.count} pages, too few for positions up to {segment.end}",
            where=_where(step),
        )
    return entry


def _where(step: Step) -> str:
    return f"route {step.route}, step {step.number}"
