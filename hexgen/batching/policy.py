"""Which sequences make the next step, and who gives way where pages run out (in words: docs/batching.md)."""

from __future__ import annotations

from hexgen.batching.limits import BatchLimits
from hexgen.batching.segments import Admission, Segment
from hexgen.batching.sequence import SequenceState
from hexgen.batching.table import SequenceTable

# A new sequence must leave this part of the pool free, and a page for every running sequence to grow into.
WATERMARK = 0.01
# Where decodes alone would fill the budget, this part of it goes to prefill all the same.
PREFILL_RESERVE = 1 / 8
# A pipeline's prefill is not dealt into chunks below this many tokens. Around 100 to 300 tokens, a matrix product
# turns from bandwidth-bound to compute-bound on current devices; smaller chunks would only read the weights again.
PREFILL_CHUNK_FLOOR = 128
# Rounds of a pipeline's steps that what waits for prefill is dealt over. Prompts come in bunches; a queue evens
# them out, and steps of equal size hold each other up least. In simulation (LLaMA-2-70B, unlike pipelines of 2 to
# 16 stages) 8 rounds served 0 to 10 % more than one, median first tokens came no later; 16 served about the same.
PREFILL_ROUNDS = 8

Choice = tuple[SequenceState, int]  # a running sequence, and how many of its tokens to compute


def form(
    table: SequenceTable, limits: BatchLimits, in_flight: int, number: int
) -> tuple[list[Admission], list[Segment]]:
    """What step ``number`` admits and runs, while ``in_flight`` others are under way. Empty: nothing can run."""
    decodes, chunks, prefill_tokens = _choose(table, limits, in_flight, number)
    segments = _place(table, decodes, chunks)
    admitted: list[Admission] = []
    _admit(table, limits, prefill_tokens, admitted, segments)
    if not segments and (table.ready_count or table.prefilling):
        # Every chosen one lacks pages. The oldest may take them from all others, so that something moves.
        oldest = table.oldest_idle()
        if oldest is not None:
            segments = _squeeze(table, [(oldest, min(oldest.remaining, limits.token_budget))])
    return admitted, segments


def _choose(
    table: SequenceTable, limits: BatchLimits, in_flight: int, number: int
) -> tuple[int, list[Choice], int]:
    """Decodes first, at most a micro-batch of 1/depth of them, longest ready first; then chunks of prompts.

    Returns how many decodes, the chunks, and the prefill tokens left for admissions.
    """
    budget = limits.token_budget
    reserve = 0
    if table.prefilling or _may_admit(table, limits):
        # A budget of a single token alternates.
        reserve = max(1, int(budget * PREFILL_RESERVE)) if budget > 1 else number % 2
    decoding = len(table.running) - len(table.prefilling)
    micro_batch = -(-decoding // limits.depth)
    decodes = min(table.ready_count, micro_batch, budget - reserve)
    chunks: list[Choice] = []
    prefill_tokens = _prefill_tokens(table, limits, in_flight, decodes)
    for state in table.prefilling.values():
        if prefill_tokens == 0:
            break
        tokens = min(state.remaining, prefill_tokens)
        chunks.append((state, tokens))
        prefill_tokens -= tokens
    return decodes, chunks, prefill_tokens


def _prefill_tokens(table: SequenceTable, limits: BatchLimits, in_flight: int, decodes: int) -> int:
    """How many prefill tokens the step takes beside its ``decodes``: all that fit, or a pipeline's even part.

    One large chunk would keep one stage busy and the others idle. Where sequences decode, the route's steps go
    round without a pause, and the longest of them holds up the others at every stage: what could be computed now
    is dealt over several rounds of ``depth`` steps. Else it is dealt over those that may still be sent before one
    returns.
    """
    budget = limits.token_budget - decodes
    if limits.depth == 1:
        return budget
    steps = limits.depth - in_flight
    waiting = table.waiting_tokens
    if decodes > 0:
        steps = limits.depth * PREFILL_ROUNDS
        # What no page is free for is not coming soon: counting it would make the next prompt's chunks large.
        waiting = min(waiting, _room(table) * table.page_size)
    if steps == 1:
        return budget
    pending = waiting + sum(state.remaining for state in table.prefilling.values())
    return min(budget, max(PREFILL_CHUNK_FLOOR, -(-pending // steps)))


def _room(table: SequenceTable) -> int:
    """Pages for new sequences, beside what the running ones need to grow into."""
    return max(0, table.pool.available - max(len(table.running), int(table.pool.pages * WATERMARK)))


def _place(table: SequenceTable, decodes: int, chunks: list[Choice]) -> list[Segment]:
    """Segments for what was chosen, as far as there are pages."""
    pool = table.pool
    needed = table.pages_to_decode(decodes)
    for state, tokens in chunks:
        needed += pool.pages_for(state.computed + tokens) - len(state.pages)
    if needed > pool.available:
        return _squeeze(table, [*((state, 1) for state in table.longest_ready(decodes)), *chunks])
    segments = table.decode(decodes)
    for state, tokens in chunks:
        segments.append(table.extend(state, tokens))
    return segments


def _squeeze(table: SequenceTable, chosen: list[Choice]) -> list[Segment]:
    """Where pages run out, older sequences take those of younger ones: the youngest is preempted until the older
    fits. One that is itself the youngest keeps what it has and waits, or gets a shorter chunk.
    """
    segments: list[Segment] = []
    # Oldest first, so that no victim has a segment in this step yet.
    for state, wanted in sorted(chosen, key=lambda choice: choice[0].arrival):
        if not state.running:  # preempted for an older one just now
            continue
        tokens = _make_room(table, state, wanted)
        if tokens > 0:
            segments.append(table.extend(state, tokens))
        else:
            table.postpone(state)
    return segments


def _make_room(table: SequenceTable, state: SequenceState, tokens: int) -> int:
    """Preempt younger sequences until ``tokens`` more of ``state`` have pages; how many have in the end."""
    pool = table.pool
    missing = pool.pages_for(state.computed + tokens) - len(state.pages)
    while missing > pool.available:
        youngest = next(reversed(table.running.values()))
        if youngest is state:
            room = (len(state.pages) + pool.available) * pool.page_size - state.computed
            return min(tokens, room)
        table.preempt(youngest)
    return tokens


def _may_admit(table: SequenceTable, limits: BatchLimits) -> bool:
    """Whether the first of the waiting could be admitted, as far as can be told without looking for pages.

    One whose token is still in flight could not: its history is not complete before that token is back.
    """
    first = table.first_waiting
    return first is not None and not first.awaiting and len(table.running) < limits.max_sequences


def _admit(
    table: SequenceTable,
    limits: BatchLimits,
    prefill_tokens: int,
    admitted: list[Admission],
    segments: list[Segment],
) -> None:
    """Waiting sequences, in order, while tokens, pages and places last; the first that does not fit blocks."""
    while prefill_tokens > 0 and _may_admit(table, limits):
        state = next(iter(table.waiting.values()))
        cached = _pages_to_start(table, state)
        if cached is None:
            return
        admitted.append(table.start(state, cached))
        tokens = min(state.remaining, prefill_tokens)
        segments.append(table.extend(state, tokens))
        prefill_tokens -= tokens


def _pages_to_start(table: SequenceTable, state: SequenceState) -> list[int] | None:
    """Its cached pages, where the pool has room for all its known tokens beside the watermark; else None.

    With nothing running it always has: the whole pool is available, and no sequence is longer than that. Nobody
    else is in the middle of a prompt: those come before admissions, and would have taken all the step's tokens.
    """
    pool = table.pool
    if not table.running:
        return table.cached_pages(state)
    room = _room(table)
    if room == 0:
        return None
    cached = table.cached_pages(state)
    needed = pool.pages_for(len(state.tokens)) - len(cached) + pool.unreferenced(cached)
    return cached if needed <= room else None
