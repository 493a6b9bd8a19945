"""The tables of the page."""

from __future__ import annotations

from collections.abc import Sequence

from hexgen.cluster import Cluster
from hexgen.plan import Plan, Prediction
from hexgen.scheduler.compare import Baseline
from hexgen.scheduler.explain.changes import bandwidth_text
from hexgen.scheduler.explain.classes import range_text
from hexgen.scheduler.explain.facts import Explanation, TimeUse
from hexgen.scheduler.explain.words import COMPARED, compared_rows, left_out_words, what_if_words
from hexgen.scheduler.picture.markup import Child, Html, el, joined
from hexgen.scheduler.picture.style import TIME_PARTS
from hexgen.units import format_bytes, format_time

_LINKS_SHOWN = 40
_OPEN_ROWS = 64  # longer tables are folded


def stage_part(plan: Plan, cluster: Cluster, predicted: Prediction, explanation: Explanation) -> Html:
    """Every stage: who, what, and what its time goes into."""
    held = {device.device: device for device in predicted.devices}
    times = {use.device: use.time for use in explanation.devices}
    steps = {stage.stage: stage for stage in predicted.stages}
    rows: list[Sequence[Child]] = []
    for stage in plan.stages:
        members = [held[device] for device in stage.devices]
        step = steps[stage.name]
        slowest = min((times[device] for device in stage.devices), key=lambda time: time.group)
        shares = "equal" if stage.shares is None else ":".join(f"{share:g}" for share in stage.shares)
        rows.append(
            (
                stage.name,
                f"{stage.layers[0]}–{stage.layers[1] - 1}",
                ", ".join(stage.devices),
                cluster.device(stage.devices[0]).type.name,
                shares if stage.width > 1 else "",
                format_bytes(sum(m.weights_bytes for m in members)),
                format_bytes(sum(m.kv_bytes for m in members)),
                format_time(step.prefill_step_s),
                format_time(step.decode_step_s),
                f"{slowest.prefill:.0%}",
                f"{slowest.decode:.0%}",
                _time_bar(slowest),
            )
        )
    names = ("stage", "layers", "devices", "type", "shares", "weights", "KV", "prefill step", "decode step",
             "prefill", "decode", "busy with")  # fmt: skip
    keys = el(
        "div",
        *(el("span", el("i", style=f"background:var(--{name})"), text) for name, text in TIME_PARTS),
        class_="keys",
    )
    return joined(el("h2", "Stages"), keys, _table(names, (5, 6, 7, 8, 9, 10), rows))


def _time_bar(time: TimeUse) -> Html:
    bars = [
        el("i", style=f"width:{100 * getattr(time, name):.1f}%;background:var(--{name})")
        for name, _ in TIME_PARTS
        if getattr(time, name) > 0
    ]
    return el("div", *bars, class_="split", title=f"{time.busy:.0%} busy; limit: {time.limit}")


def device_part(explanation: Explanation) -> Html:
    """Every device: where its memory goes and what keeps the rest from being used."""
    rows: list[Sequence[Child]] = []
    for use in explanation.devices:
        memory, time = use.memory, use.time
        rows.append(
            (
                use.device,
                use.stage,
                format_bytes(memory.weights_bytes),
                format_bytes(memory.kv_bytes),
                format_bytes(memory.buffers_bytes),
                format_bytes(memory.kept_bytes),
                format_bytes(memory.stranded_bytes),
                format_bytes(memory.total_bytes),
                memory.why,
                time.limit,
                time.waits_for,
            )
        )
    names = ("device", "stage", "weights", "KV", "buffers", "kept back", "stranded", "of", "why stranded", "limit",
             "waits for")  # fmt: skip
    return joined(el("h2", "Devices"), _table(names, (2, 3, 4, 5, 6, 7), rows, folded=True))


def link_part(explanation: Explanation) -> Html | None:
    if not explanation.links:
        return None
    rows: list[Sequence[Child]] = [
        (
            use.sender if use.sender == use.receiver else f"{use.sender} → {use.receiver}",
            bandwidth_text(use.bandwidth_bytes_s),
            format_time(use.latency_s),
            bandwidth_text(use.bytes_s),
            f"{use.load:.1%}",
            range_text(f"{a} → {b}" for a, b in use.edges),
        )
        for use in explanation.links[:_LINKS_SHOWN]
    ]
    more = len(explanation.links) - len(rows)
    return joined(
        el("h2", "Links"),
        _table(("way", "bandwidth", "latency", "carries", "load", "stages"), (1, 2, 3, 4), rows),
        el("p", f"and {more} less loaded ones", class_="faint") if more else None,
    )


def left_out_part(explanation: Explanation) -> Html | None:
    if not explanation.left_out:
        return None
    return joined(
        el("h2", "Devices that stay unused"),
        *(el("p", left_out_words(entry, explanation)) for entry in explanation.left_out),
    )


def what_if_part(explanation: Explanation) -> Html | None:
    if explanation.what_if is None:
        return None
    words = what_if_words(explanation)
    rows: list[Sequence[Child]] = [
        (text, el("span", gain, class_="loss" if gain.startswith("-") else "gain"), price)
        for text, gain, price in (*words.helps, *words.hurts)
    ]
    return joined(
        el("h2", "What would change it"),
        _table(("change", explanation.metric, "price"), (1, 2), rows) if rows else None,
        *(el("p", line, class_="faint") for line in words.notes),
    )


def baseline_part(plan: Plan, others: Sequence[Baseline]) -> Html:
    return joined(el("h2", "Compared with"), _table(COMPARED, (1, 2, 3, 4), list(compared_rows(plan, others))))


def _table(
    names: Sequence[str], right: Sequence[int], rows: Sequence[Sequence[Child]], *, folded: bool = False
) -> Html:
    """``right``: columns of figures. Long tables are folded."""
    kind = ["n" if i in right else None for i in range(len(names))]
    head = el("tr", *(el("th", name, class_=k) for name, k in zip(names, kind, strict=True)))
    body = [el("tr", *(el("td", cell, class_=k) for cell, k in zip(row, kind, strict=True))) for row in rows]
    table = el("div", el("table", el("thead", head), el("tbody", *body)), class_="scroll")
    if folded or len(rows) > _OPEN_ROWS:
        return el("details", el("summary", f"{len(rows)} rows"), table)
    return table
