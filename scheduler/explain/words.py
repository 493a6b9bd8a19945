"""An explanation in words: the same sentences on a terminal and on the page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hexgen.plan import Plan, Prediction
from hexgen.scheduler.baselines.contract import Baseline
from hexgen.scheduler.explain.classes import range_text
from hexgen.scheduler.explain.facts import Change, Explanation, LeftOut
from hexgen.scheduler.explain.what_if import WORTH
from hexgen.units import format_time

_UNTRIED_NAMED = 3
COMPARED = ("placement", "tokens/s", "one request", "TTFT", "TPOT", "why")


@dataclass(frozen=True, slots=True)
class WhatIfWords:
    """Rows of (change, gain, price), and notes below them."""

    helps: tuple[tuple[str, str, str], ...]
    hurts: tuple[tuple[str, str, str], ...]
    notes: tuple[str, ...]


def what_if_words(explanation: Explanation) -> WhatIfWords:
    """What helps by at least one per cent, then what is lost with a node or a device."""
    found = explanation.what_if
    if found is None:
        return WhatIfWords((), (), ())
    helps = [change for change in found.changes if (change.gain or 0.0) >= WORTH]
    drops = [change for change in found.changes if change.kind in ("drop node", "drop device")]
    hurts = sorted(
        (change for change in drops if change not in helps),
        key=lambda change: -1.0 if change.gain is None else change.gain,
    )
    notes: list[str] = []
    if found.missed > 0 and explanation.objective == "maxflow":
        notes.append(
            f"The plan seeks flow; here counts what is served: --objective throughput has {found.missed:.1%} more."
        )
    elif found.missed > 0:
        notes.append(
            f"The search for these found {found.missed:.1%} more than the plan itself: a longer --time-limit pays."
        )
    if explanation.objective != "maxflow" and any(change in helps for change in drops):
        notes.append("What helps by being dropped may as well stay unused: a longer --time-limit finds that.")
    tried = sum(1 for change in found.changes if change.kind not in ("drop node", "drop device"))
    if helps:
        notes.append("Nothing else that was tried helps by more than 1 %.")
    elif tried:
        notes.append("Nothing that was tried helps by more than 1 %.")
    if found.untried:
        named = "; ".join(found.untried[:_UNTRIED_NAMED])
        more = len(found.untried) - _UNTRIED_NAMED
        notes.append(f"Not tried for lack of time: {named}" + (f"; and {more} more" if more > 0 else "") + ".")
    return WhatIfWords(tuple(map(_row, helps)), tuple(map(_row, hurts)), tuple(notes))


def compared_rows(plan: Plan, others: Sequence[Baseline]) -> Iterator[tuple[str, ...]]:
    """Cells by ``COMPARED``: the plan, then simpler placements, all by the same evaluator."""
    own = plan.predicted
    yield _compared("this plan", own, own.bottleneck if own else "")
    for other in others:
        predicted = other.plan.predicted if other.plan else None
        why = (other.shortfall or predicted.bottleneck) if predicted else other.reason
        yield _compared(other.name, predicted, f"{why} ({other.note})" if other.note else why)


def _compared(name: str, predicted: Prediction | None, why: str) -> tuple[str, ...]:
    if predicted is None:
        return name, "does not fit", "", "", "", why
    speeds = f"{predicted.tokens_s:,.0f}", f"{predicted.single_tokens_s:,.1f}"
    return name, *speeds, format_time(predicted.ttft_s), format_time(predicted.tpot_s), why


def gain_text(gain: float | None) -> str:
    if gain is None:
        return "-100 % (nothing fits)"
    digits = 0 if abs(gain) >= 0.1 else 1
    return f"{gain * 100:+.{digits}f} %"


def left_out_words(entry: LeftOut, explanation: Explanation) -> str:
    """``t4-1 .. t4-12 (12 x T4): left out; forcing them in: -7 %``."""
    whole = len(entry.devices)
    named = range_text(entry.nodes) if entry.price_usd_h is not None or whole > 3 else range_text(entry.devices)
    text = f"{named} ({whole} x {entry.type}) left out"
    if entry.price_usd_h:
        text += f", saving {entry.price_usd_h:.2f} USD/h"
    if entry.forced_gain is None:
        return f"{text}: {entry.reason}"
    text += f"; forced in: {gain_text(entry.forced_gain)} {explanation.metric}"
    if entry.reason:
        text += f" ({entry.reason})"
    elif entry.forced_gain >= WORTH:
        text += " (more than the plan serves: the search missed it, a longer --time-limit pays)"
    return text


def _row(change: Change) -> tuple[str, str, str]:
    price = ""
    if change.price_usd_h:
        price = f"{change.price_usd_h:+.2f} USD/h"
        if change.gain_per_usd_h is not None:
            price += f", {change.gain_per_usd_h:+.1%} per USD/h"
    return change.text, gain_text(change.gain), price
