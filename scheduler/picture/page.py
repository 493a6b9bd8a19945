"""One page about a plan: no script, no font, nothing from elsewhere. It can be mailed and opened anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hexgen.cluster import Cluster
from hexgen.errors import SpecError
from hexgen.plan import Plan, Prediction
from hexgen.scheduler.compare import Baseline
from hexgen.scheduler.explain.facts import Explanation
from hexgen.scheduler.picture.draw import Facts, colour, picture
from hexgen.scheduler.picture.markup import Html, el, joined
from hexgen.scheduler.picture.parts import (
    baseline_part,
    device_part,
    left_out_part,
    link_part,
    stage_part,
    what_if_part,
)
from hexgen.scheduler.picture.style import STYLE
from hexgen.scheduler.picture.view import View, view_of
from hexgen.units import format_time

_ROUTES_NAMED = 16


def write_page(
    path: str | Path,
    plan: Plan,
    cluster: Cluster,
    explanation: Explanation,
    others: Sequence[Baseline] | None = None,
) -> None:
    """Raises ``SpecError`` where the file cannot be written."""
    try:
        Path(path).write_text(page(plan, cluster, explanation, others), encoding="utf-8")
    except OSError as error:
        raise SpecError(f"cannot be written: {error.strerror}", where=str(path)) from error


def page(plan: Plan, cluster: Cluster, explanation: Explanation, others: Sequence[Baseline] | None = None) -> str:
    """``others``: baselines, where they were asked for. Raises ``ValueError`` for a plan without prediction."""
    predicted = plan.predicted
    if predicted is None:
        raise ValueError("the plan has no prediction")
    view = view_of(plan, cluster)
    facts = Facts(
        cluster=cluster,
        held={device.device: device for device in predicted.devices},
        uses={use.device: use for use in explanation.devices},
        stages={stage.stage: stage for stage in predicted.stages},
        links={(use.sender, use.receiver): use for use in explanation.links},
    )
    title = f"{plan.model} on {cluster.name}"
    body = el(
        "main",
        el("h1", title),
        el("p", _subtitle(plan, cluster, predicted), class_="faint"),
        _tiles(predicted),
        el("h2", "Who holds what, and which way requests go"),
        _keys(view),
        el("div", picture(view, facts), class_="scroll"),
        _hidden(view),
        _bounds(explanation),
        left_out_part(explanation),
        what_if_part(explanation),
        baseline_part(plan, others) if others is not None else None,
        stage_part(plan, cluster, predicted, explanation),
        link_part(explanation),
        device_part(explanation),
    )
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("title", title),
        el("style", Html(STYLE)),
    )
    return "<!doctype html>\n" + el("html", head, el("body", body), lang="en") + "\n"


def _subtitle(plan: Plan, cluster: Cluster, predicted: Prediction) -> str:
    used = sum(stage.width for stage in plan.stages)
    return (
        f"best found for {predicted.objective}: {len(plan.stages)} stages on {used} of {len(cluster.devices())} "
        f"devices, {len(plan.routes)} route{'s' if len(plan.routes) > 1 else ''}"
    )


def _tiles(predicted: Prediction) -> Html:
    tiles = [
        (f"{predicted.tokens_s:,.0f}", "tokens/s"),
        (f"{predicted.requests_s:.3g}", "requests/s"),
        (format_time(predicted.ttft_s), "TTFT"),
        (format_time(predicted.tpot_s), "TPOT"),
        (f"{predicted.single_tokens_s:,.1f}", "tokens/s of one request alone"),
    ]
    if predicted.upper_bound_tokens_s:
        share = predicted.tokens_s / predicted.upper_bound_tokens_s
        tiles.append((f"{share:.0%}", f"of the most possible ({predicted.upper_bound_tokens_s:,.0f} tokens/s)"))
    if predicted.price_usd_h and predicted.tokens_s:
        million = predicted.price_usd_h / 3600 / predicted.tokens_s * 1e6
        tiles.append((f"{million:,.2f} $", f"per million tokens ({predicted.price_usd_h:,.2f} $/h)"))
    return el("div", *(el("div", el("b", b), el("span", s), class_="tile") for b, s in tiles), class_="tiles")


def _keys(view: View) -> Html:
    memory = [("weights", "weights"), ("kv", "KV cache"), ("buffers", "buffers"), ("kept", "kept back")]
    keys = [el("span", el("i", class_=name), text) for name, text in memory]
    keys.append(el("span", el("i", class_="stranded"), "stranded"))
    routes = [
        el("span", el("i", style=f"background:{colour(i)}"), f"{route.title}: {route.share:.1%}")
        for i, route in enumerate(view.routes[:_ROUTES_NAMED])
    ]
    rest = view.routes[_ROUTES_NAMED:]
    if rest:
        routes.append(el("span", f"and {len(rest)} more: {sum(route.share for route in rest):.1%}"))
    note = el("span", "numbers in a card: layers held, share of the time busy; thickness: share of the requests")
    return joined(el("div", *keys, note, class_="keys"), el("div", *routes, class_="keys"))


def _hidden(view: View) -> Html | None:
    if not view.hidden:
        return None
    return el("p", f"{view.hidden} more kinds of nodes are not drawn; the tables below have them.", class_="faint")


def _bounds(explanation: Explanation) -> Html:
    lines = [el("h2", "What bounds it"), el("p", explanation.bottleneck.text)]
    for split in explanation.even:
        if split.value is not None and split.lost is not None:
            text = f"{split.name} in the same stages would serve {split.value:,.0f} {explanation.metric}: "
            lines.append(el("p", text, _change(-split.lost)))
        else:
            lines.append(el("p", f"{split.name} in the same stages: {split.reason}"))
    return joined(*lines)


def _change(gain: float) -> Html:
    return el("span", f"{gain:+.1%}", class_="gain" if gain >= 0 else "loss")
