"""Where nodes go on the picture: cards in rows, in a box for each region, boxes side by side. All in pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hexgen.scheduler.picture.view import NodeView, View

WIDTH = 1240.0
CARD_WIDTH = 158.0
GAP_X, GAP_Y = 42.0, 34.0  # between cards: where the routes run
PAD, TITLE = 18.0, 26.0  # of a region's box
HEAD = 34.0  # of a card: two lines
STAGE_HEAD, BAR, BAR_GAP = 17.0, 8.0, 3.0
FOOT = 7.0


@dataclass(frozen=True, slots=True)
class Box:
    x: float
    y: float
    width: float
    height: float

    @property
    def right(self) -> float:
        return self.x + self.width

    @property
    def bottom(self) -> float:
        return self.y + self.height

    @property
    def middle(self) -> float:
        return self.x + self.width / 2


@dataclass(frozen=True, slots=True)
class Card:
    view: NodeView
    box: Box
    stage_y: tuple[float, ...]  # top of each stage's block
    region: int
    row: int  # of all cards: cards of one row have the same top


@dataclass(frozen=True, slots=True)
class RegionBox:
    title: str | None
    box: Box


@dataclass(frozen=True, slots=True)
class Layout:
    regions: tuple[RegionBox, ...]
    cards: tuple[Card, ...]
    height: float


def layout_of(view: View) -> Layout:
    """Rows of cards within regions; regions follow each other on shelves as wide as the page."""
    by_region: dict[str | None, list[NodeView]] = {}
    for node in view.nodes:
        by_region.setdefault(node.node.region, []).append(node)
    regions: list[RegionBox] = []
    cards: list[Card] = []
    x = y = shelf = 0.0
    rows = 0
    for number, (name, nodes) in enumerate(by_region.items()):
        width = _columns(len(nodes)) * (CARD_WIDTH + GAP_X) - GAP_X + 2 * PAD
        if x and x + width > WIDTH:
            x, y, shelf = 0.0, y + shelf + GAP_Y, 0.0
        placed, height = _rows(nodes, x + PAD, y + TITLE, number, rows)
        rows = max(card.row for card in placed) + 1
        cards.extend(placed)
        regions.append(RegionBox(name, Box(x, y, width, height + TITLE + PAD)))
        shelf = max(shelf, height + TITLE + PAD)
        x += width + GAP_X
    return Layout(tuple(regions), tuple(cards), y + shelf)


def card_height(node: NodeView) -> float:
    bars = sum(len(stage.devices) for stage in node.stages) + len(node.unused)
    heads = len(node.stages) + (1 if node.unused else 0)
    return HEAD + heads * STAGE_HEAD + bars * (BAR + BAR_GAP) + FOOT


def _columns(count: int) -> int:
    most = int((WIDTH - 2 * PAD + GAP_X) / (CARD_WIDTH + GAP_X))
    if count <= most:
        return count
    rows = -(-count // most)
    return -(-count // rows)


def _rows(nodes: Sequence[NodeView], x: float, y: float, region: int, first_row: int) -> tuple[list[Card], float]:
    """Row by row, every other from right to left: a route that wraps continues just below."""
    columns = _columns(len(nodes))
    cards: list[Card] = []
    top = y
    for row, start in enumerate(range(0, len(nodes), columns)):
        members = nodes[start : start + columns]
        for place, node in enumerate(members):
            column = columns - 1 - place if row % 2 else place
            box = Box(x + column * (CARD_WIDTH + GAP_X), top, CARD_WIDTH, card_height(node))
            cards.append(Card(node, box, tuple(_stage_tops(node, top)), region, first_row + row))
        top += max(card_height(node) for node in members) + GAP_Y
    return cards, top - GAP_Y - y


def _stage_tops(node: NodeView, top: float) -> list[float]:
    tops: list[float] = []
    at = top + HEAD
    for stage in node.stages:
        tops.append(at)
        at += STAGE_HEAD + len(stage.devices) * (BAR + BAR_GAP)
    return tops
