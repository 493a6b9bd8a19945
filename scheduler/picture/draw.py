"""The cluster as an SVG picture: regions, nodes with what each device's memory holds, and the routes over them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from hexgen.cluster import Cluster
from hexgen.plan import DevicePrediction, StagePrediction
from hexgen.scheduler.explain.changes import bandwidth_text
from hexgen.scheduler.explain.facts import DeviceUse, LinkUse
from hexgen.scheduler.picture.layout import (
    BAR,
    BAR_GAP,
    CARD_WIDTH,
    GAP_X,
    GAP_Y,
    HEAD,
    STAGE_HEAD,
    WIDTH,
    Card,
    Layout,
    layout_of,
)
from hexgen.scheduler.picture.markup import Html, el
from hexgen.scheduler.picture.style import ROUTE_COLOURS
from hexgen.scheduler.picture.view import StageView, View, WayView
from hexgen.units import format_bytes

_INSET = 9.0  # of a card's text
_THIN, _THICK = 1.8, 7.0  # of a route's line
_MARGIN = 22.0  # around the picture: lines may run there
_LABELLED = 0.01  # load of a link between regions that is written beside it
_LETTER = 6.3  # pixels of one at the size that labels have


@dataclass(frozen=True, slots=True)
class Facts:
    """What cards and lines say, by id."""

    cluster: Cluster
    held: Mapping[str, DevicePrediction]
    uses: Mapping[str, DeviceUse]
    stages: Mapping[str, StagePrediction]
    links: Mapping[tuple[str, str], LinkUse]


def colour(route: int) -> str:
    return ROUTE_COLOURS[route % len(ROUTE_COLOURS)]


def picture(view: View, facts: Facts) -> Html:
    """Lines first, so that cards stay readable where a route passes behind them; labels last."""
    layout = layout_of(view)
    lines, labels = _lines(view, layout, facts)
    width, height = WIDTH + 2 * _MARGIN, layout.height + 2 * _MARGIN
    return el(
        "svg",
        *_regions(layout),
        *lines,
        *(_card(card, facts) for card in layout.cards),
        *labels,
        viewBox=f"{-_MARGIN} {-_MARGIN} {width:.0f} {height:.0f}",
        role="img",
        aria_label="nodes, devices and routes",
        class_="map",
    )


def _regions(layout: Layout) -> Iterator[Html]:
    for region in layout.regions:
        box = region.box
        yield el("rect", x=box.x, y=box.y, width=box.width, height=box.height, rx=12, class_="region")
        if region.title is not None:
            title = _cut(region.title, box.width - 24)
            yield el("text", title, x=box.x + 14, y=box.y + 18, class_="region-title")


# ---- cards ----------------------------------------------------------------------------------------------------


def _card(card: Card, facts: Facts) -> Html:
    node, box = card.view, card.box
    kind = node.node.device.name if node.node.count == 1 else f"{node.node.count} × {node.node.device.name}"
    body: list[Html] = [
        el("rect", x=box.x, y=box.y, width=box.width, height=box.height, rx=8, class_="card"),
        el("text", _cut(node.title, box.width - 2 * _INSET), x=box.x + _INSET, y=box.y + 15, class_="node"),
        el("text", _cut(kind, box.width - 2 * _INSET), x=box.x + _INSET, y=box.y + 28, class_="kind"),
        el("title", ", ".join(node.names)),
    ]
    for stage, top in zip(node.stages, card.stage_y, strict=True):
        body.extend(_stage(stage, card, top, facts))
    if node.unused:
        last = card.stage_y[-1] if card.stage_y else box.y + HEAD
        devices = len(node.stages[-1].devices) if node.stages else 0
        top = last + (STAGE_HEAD + devices * (BAR + BAR_GAP) if node.stages else 0)
        body.append(el("text", "unused", x=box.x + _INSET, y=top + 12, class_="stage idle"))
        for i, device in enumerate(node.unused):
            body.append(_empty(device, box.x + _INSET, top + STAGE_HEAD + i * (BAR + BAR_GAP)))
    return el("g", *body)


def _stage(stage: StageView, card: Card, top: float, facts: Facts) -> Iterator[Html]:
    x, right = card.box.x, card.box.right
    size = len(stage.devices)
    mark = colour(stage.routes[0]) if stage.routes else "var(--faint)"
    yield el(
        "rect", x=x, y=top + 3, width=4, height=STAGE_HEAD + size * (BAR + BAR_GAP) - 6, rx=2, style=f"fill:{mark}"
    )
    layers = (
        f"{stage.layers[0]}–{stage.layers[1] - 1}"
        if stage.layers[1] > stage.layers[0] + 1
        else f"{stage.layers[0]}"
    )
    wide = f" TP{size}" if size > 1 else ""
    yield el("text", _cut(f"{layers}{wide}", CARD_WIDTH - 60), x=x + _INSET, y=top + 12, class_="stage")
    busy = facts.stages.get(stage.name)
    if busy is not None:
        yield el("text", f"{busy.utilisation:.0%}", x=right - _INSET, y=top + 12, class_="busy")
    for i, device in enumerate(stage.devices):
        yield _bar(device, stage, x + _INSET, top + STAGE_HEAD + i * (BAR + BAR_GAP), facts)


def _bar(device: str, stage: StageView, x: float, y: float, facts: Facts) -> Html:
    held, use = facts.held.get(device), facts.uses.get(device)
    width = CARD_WIDTH - 2 * _INSET
    if held is None:
        return _empty(device, x, y)
    parts = [("weights", held.weights_bytes), ("kv", held.kv_bytes), ("buffers", held.buffers_bytes)]
    if use is not None:
        parts.append(("kept", use.memory.kept_bytes))
    bars: list[Html] = [el("rect", x=x, y=y, width=width, height=BAR, class_="stranded")]
    at = x
    for name, size in parts:
        wide = width * size / max(1, held.memory_bytes)
        bars.append(el("rect", x=at, y=y, width=wide, height=BAR, class_=name))
        at += wide
    return el("g", *bars, el("title", _device_text(device, stage, held, use)))


def _device_text(device: str, stage: StageView, held: DevicePrediction, use: DeviceUse | None) -> str:
    text = (
        f"{device}, stage {stage.name}, layers {stage.layers[0]} to {stage.layers[1] - 1}\n"
        f"weights {format_bytes(held.weights_bytes)}, KV {format_bytes(held.kv_bytes)}, "
        f"buffers {format_bytes(held.buffers_bytes)} of {format_bytes(held.memory_bytes)}"
    )
    if use is not None:
        text += f"\nstranded {format_bytes(use.memory.stranded_bytes)}"
        text += f": {use.memory.why}" if use.memory.why else ""
        text += f"\nbusy {use.time.busy:.0%} (prefill {use.time.prefill:.0%}, decode {use.time.decode:.0%}); "
        text += f"limit: {use.time.limit}"
    return text


def _empty(device: str, x: float, y: float) -> Html:
    return el(
        "g",
        el("rect", x=x, y=y, width=CARD_WIDTH - 2 * _INSET, height=BAR, class_="stranded"),
        el("title", f"{device}: unused"),
    )


# ---- lines ----------------------------------------------------------------------------------------------------


def _lines(view: View, layout: Layout, facts: Facts) -> tuple[list[Html], list[Html]]:
    """The ways of the routes, and the labels of those between regions."""
    cards = {card.view.key: card for card in layout.cards}
    most = max((way.share for way in view.ways), default=1.0)
    beside: dict[frozenset[object], int] = {}  # ways between the same two cards lie side by side
    lines: list[Html] = []
    labels: list[Html] = []
    for way in view.ways:
        a, b = cards[way.sender[0]], cards[way.receiver[0]]
        pair = frozenset((way.sender[0], way.receiver[0]))
        turn = beside[pair] = beside.get(pair, -1) + 1
        thick = _THIN + (_THICK - _THIN) * way.share / most
        curve = _curve(a, b, way, turn)
        lines.append(
            el(
                "path",
                el("title", _way_text(way, view, facts)),
                d=curve.path,
                style=f"stroke:{colour(way.route)};stroke-width:{thick:.1f}",
                class_="way",
            )
        )
        lines.append(el("path", d=_head(curve, thick), style=f"fill:{colour(way.route)}"))
        if a.region != b.region:
            labels.extend(_label(way, facts, curve.label))
    return lines, labels


@dataclass(frozen=True, slots=True)
class _Curve:
    """An SVG path, where its label goes, and where and which way it arrives (a unit vector along x or y)."""

    path: str
    label: tuple[float, float]
    end: tuple[float, float]
    towards: tuple[int, int]


def _curve(a: Card, b: Card, way: WayView, turn: int) -> _Curve:
    """From one card to another: straight across a gutter where they are neighbours, else along the gutters."""
    shift = (turn % 5) * 7.0 - (7.0 if turn else 0.0)
    if a is b:
        return _inside(a, way, shift)
    if a.box.y == b.box.y:
        ahead = b.box.x > a.box.x
        x, end_x = (a.box.right, b.box.x) if ahead else (a.box.x, b.box.right)
        if abs(end_x - x) > GAP_X * 1.5:
            return _above(a, b, shift)
        y, end_y = _stage_middle(a, way.sender[1]), _stage_middle(b, way.receiver[1])
        half = (x + end_x) / 2
        path = f"M{x:.1f} {y:.1f} C{half:.1f} {y:.1f} {half:.1f} {end_y:.1f} {end_x:.1f} {end_y:.1f}"
        return _Curve(path, (half, (y + end_y) / 2), (end_x, end_y), (1 if ahead else -1, 0))
    down = b.box.y > a.box.y
    y, end_y = (a.box.bottom, b.box.y) if down else (a.box.y, b.box.bottom)
    x, end_x = a.box.middle + shift, b.box.middle + shift
    half = (y + end_y) / 2
    path = f"M{x:.1f} {y:.1f} C{x:.1f} {half:.1f} {end_x:.1f} {half:.1f} {end_x:.1f} {end_y:.1f}"
    beside = end_y - GAP_Y / 2 if down else end_y + GAP_Y / 2
    return _Curve(path, (end_x, beside), (end_x, end_y), (0, 1 if down else -1))


def _inside(card: Card, way: WayView, shift: float) -> _Curve:
    """From one stage to another of the same node: a bow on its right side."""
    y, end = _stage_middle(card, way.sender[1]), _stage_middle(card, way.receiver[1])
    x = card.box.right
    out = x + GAP_X * 0.45 + shift
    path = f"M{x:.1f} {y:.1f} C{out:.1f} {y:.1f} {out:.1f} {end:.1f} {x:.1f} {end:.1f}"
    return _Curve(path, (out, (y + end) / 2), (x, end), (-1, 0))


def _above(a: Card, b: Card, shift: float) -> _Curve:
    """Past other cards of the row: through the gutter above."""
    x, end_x = a.box.middle + shift, b.box.middle + shift
    y, top = a.box.y, a.box.y - GAP_Y * 0.55 - shift / 2
    half = (x + end_x) / 2
    path = (
        f"M{x:.1f} {y:.1f} C{x:.1f} {top:.1f} {x:.1f} {top:.1f} {half:.1f} {top:.1f} "
        f"S{end_x:.1f} {top:.1f} {end_x:.1f} {b.box.y:.1f}"
    )
    return _Curve(path, (half, top), (end_x, b.box.y), (0, 1))


def _head(curve: _Curve, thick: float) -> str:
    """The tip of an arrow, as a path."""
    (x, y), (dx, dy) = curve.end, curve.towards
    size = 4.0 + thick * 0.8
    back_x, back_y = x - dx * size, y - dy * size
    half = size * 0.75
    return (
        f"M{x:.1f} {y:.1f} L{back_x - dy * half:.1f} {back_y - dx * half:.1f} "
        f"L{back_x + dy * half:.1f} {back_y + dx * half:.1f} Z"
    )


def _stage_middle(card: Card, key: object) -> float:
    for stage, top in zip(card.view.stages, card.stage_y, strict=True):
        if stage.key == key:
            return top + (STAGE_HEAD + len(stage.devices) * (BAR + BAR_GAP)) / 2
    return card.box.y + HEAD


def _way_text(way: WayView, view: View, facts: Facts) -> str:
    route = view.routes[way.route]
    a, b = way.pairs[0]
    link = facts.cluster.link(a, b)
    title = route.title if way.routes == 1 else f"{way.routes} routes, most of it {route.title}"
    text = f"{title}: {way.share:.1%} of the requests\n{a} to {b}: {bandwidth_text(link.bandwidth_bytes_s)}"
    use = facts.links.get((a, b))
    return text if use is None else f"{text}, {use.load:.0%} loaded"


def _label(way: WayView, facts: Facts, at: tuple[float, float]) -> Iterator[Html]:
    use = facts.links.get(way.pairs[0])
    if use is None or use.load < _LABELLED:
        return
    text = f"{bandwidth_text(use.bandwidth_bytes_s)}, {use.load:.0%}"
    width = len(text) * _LETTER
    x, y = at
    yield el("rect", x=x - width / 2, y=y - 9, width=width, height=16, rx=4, class_="label-back")
    yield el("text", text, x=x, y=y + 3, class_="label")


def _cut(text: str, width: float) -> str:
    """The text, or as much of it as fits with an ellipsis."""
    most = max(3, int(width / _LETTER))
    return text if len(text) <= most else f"{text[: most - 1]}…"
