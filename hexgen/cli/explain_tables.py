"""Explanations as tables for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from hexgen.scheduler.explain import DeviceUse, Explanation
from hexgen.scheduler.explain.changes import bandwidth_text
from hexgen.scheduler.explain.classes import range_text
from hexgen.scheduler.explain.words import left_out_words, what_if_words
from hexgen.units import format_bytes

_LINKS_SHOWN = 8


def explain_tables(explanation: Explanation) -> list[RenderableType]:
    """Devices (equal neighbours together), stranded memory, links, what bounds the plan, what would change it."""
    found: list[RenderableType] = [_devices(explanation)]
    reasons = list(_reasons(explanation))
    if reasons:
        found.append(Text("\n".join(reasons)))
    if explanation.links:
        found.append(_links(explanation))
    bounds = list(_bounds(explanation))
    if bounds:
        found.append(Text("\n".join(bounds)))
    if explanation.what_if is not None:
        found.extend(_changes(explanation))
    return found


def _devices(explanation: Explanation) -> Table:
    table = Table(title="devices: memory, and time while the cluster serves all it can", title_justify="left")
    figures = ("weights", "KV", "buffers", "kept", "stranded", "of", "busy", "prefill", "decode")
    for name in ("device", "stage", *figures, "limit", "waits for"):
        table.add_column(name, justify="right" if name in figures else "left", overflow="fold")
    for cells, members in groupby(explanation.devices, key=_cells):
        uses = list(members)
        stages = list(dict.fromkeys(use.stage for use in uses))
        table.add_row(range_text(use.device for use in uses), range_text(stages), *cells)
    return table


def _cells(use: DeviceUse) -> tuple[str, ...]:
    memory, time = use.memory, use.time
    sizes = (
        memory.weights_bytes, memory.kv_bytes, memory.buffers_bytes, memory.kept_bytes, memory.stranded_bytes,
        memory.total_bytes,
    )  # fmt: skip
    shares = (time.busy, time.prefill, time.decode)
    return (*map(format_bytes, sizes), *(f"{share:.0%}" for share in shares), time.limit, time.waits_for)


def _reasons(explanation: Explanation) -> Iterator[str]:
    """Why memory is stranded, once for all neighbours of the same reason."""
    for why, members in groupby(explanation.devices, key=lambda use: use.memory.why):
        if why:
            uses = list(members)
            size = format_bytes(max(use.memory.stranded_bytes for use in uses))
            upto = "" if len(uses) == 1 else " each at most"
            yield f"{range_text(use.device for use in uses)}: {size} stranded{upto}: {why}"


def _links(explanation: Explanation) -> Table:
    table = Table(title="links, the most loaded first", title_justify="left")
    for name in ("way", "bandwidth", "carries", "load", "stages"):
        table.add_column(name, justify="left" if name in ("way", "stages") else "right", overflow="fold")
    for use in explanation.links[:_LINKS_SHOWN]:
        table.add_row(
            f"within {use.sender}" if use.sender == use.receiver else f"{use.sender} -> {use.receiver}",
            bandwidth_text(use.bandwidth_bytes_s),
            bandwidth_text(use.bytes_s),
            f"{use.load:.0%}",
            range_text(f"{a} -> {b}" for a, b in use.edges),
        )
    return table


def _bounds(explanation: Explanation) -> Iterator[str]:
    """Beside the bottleneck, which the plan's own table names."""
    for split in explanation.even:
        if split.value is None or split.lost is None:
            yield f"{split.name} in the same stages: {split.reason}"
        else:
            yield f"{split.name} in the same stages: {split.value:,.0f} {explanation.metric} ({-split.lost:+.1%})"
    for entry in explanation.left_out:
        yield left_out_words(entry, explanation)


def _changes(explanation: Explanation) -> list[RenderableType]:
    words = what_if_words(explanation)
    table = Table(title="what would change it", title_justify="left")
    table.add_column("change", overflow="fold")
    table.add_column(explanation.metric, justify="right")
    table.add_column("price", justify="right")
    rows: Sequence[tuple[str, str, str]] = (*words.helps, *words.hurts)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    notes = Text("\n".join(words.notes))
    return [table, notes] if rows else [notes]
