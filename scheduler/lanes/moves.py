"""Shapes one step away: a layer or a machine moved, a range cut in two or joined with its neighbour.

Layouts (`hexgen.scheduler.lanes.kinds`) are as even as can be; the best shape need not be. Where a move changes
how many layers are held, layers are added where the range lets most through, or taken where it lets least.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from hexgen.scheduler.lanes.kinds import MOST_LANES, Kind, Range, Shape


def neighbours(
    shape: Shape, kinds: Sequence[Kind], layers: int, limit: Callable[[Range], float]
) -> Iterator[Shape]:
    """Distinct shapes of ``layers`` in all; ``limit``: requests/s that a range lets through."""
    seen = {shape}
    for raw in _moves(shape, kinds):
        fitted = _fitted(raw, kinds, layers, limit)
        if fitted is not None and fitted not in seen:
            seen.add(fitted)
            yield fitted


def _moves(shape: Shape, kinds: Sequence[Kind]) -> Iterator[list[Range]]:
    used = Counter[int]()
    for part in shape:
        used[part.kind] += part.lanes
    # Equal ranges of a kind are alike, whichever of them changes: the last one does.
    last = {part: i for i, part in enumerate(shape)}
    places = sorted(last.values())
    for number, kind in enumerate(kinds):  # machines that have nothing to do take layers from another range
        spare = min(MOST_LANES, len(kind.groups) - used[number])
        for alike in sorted({1, spare}) if spare > 0 else ():
            for i in places:
                for layers in sorted({1, min(kind.most_layers, shape[i].layers)}):
                    yield [*_with(shape, {i: _grown(shape[i], -layers, 0)}), Range(number, layers, alike)]
    for i in places:
        part = shape[i]
        spare = len(kinds[part.kind].groups) - used[part.kind]
        if spare and part.lanes < MOST_LANES:
            yield _with(shape, {i: _grown(part, 0, 1)})
        if part.layers > 1:  # in two, with as many machines each or half of them
            halves = (part.layers + 1) // 2, part.layers // 2
            for lanes in ((part.lanes + 1) // 2, part.lanes // 2), (part.lanes, part.lanes):
                if min(lanes) > 0 and sum(lanes) - part.lanes <= spare:
                    yield _with(shape, {i: [Range(part.kind, n, p) for n, p in zip(halves, lanes, strict=True)]})
        for more in (1, -1):  # which range makes up for it is found by `_fitted`
            yield _with(shape, {i: _grown(part, more, 0)})
        for j in places if last[part] == i else ():
            other = shape[j]
            if i == j:
                if i == 0 or shape[i - 1] != part:
                    continue
                j, other = i - 1, part  # one of its equals
            yield _with(shape, {i: _grown(part, 1, 0), j: _grown(other, -1, 0)})
            if other.kind == part.kind and part.lanes < MOST_LANES:
                yield _with(shape, {i: _grown(part, 0, 1), j: _grown(other, 0, -1)})
                if j > i or other == part:  # joined: all machines of both hold one range
                    whole = Range(part.kind, max(part.layers, other.layers), part.lanes + other.lanes)
                    yield _with(shape, {i: whole, j: []})


def _grown(part: Range, layers: int, lanes: int) -> Range:
    return Range(part.kind, part.layers + layers, part.lanes + lanes)


def _with(shape: Shape, changes: dict[int, Range | list[Range]]) -> list[Range]:
    found: list[Range] = []
    for i, part in enumerate(shape):
        change = changes.get(i, part)
        found += [change] if isinstance(change, Range) else change
    return [part for part in found if part.layers > 0 and part.lanes > 0]


def _fitted(
    parts: list[Range], kinds: Sequence[Kind], layers: int, limit: Callable[[Range], float]
) -> Shape | None:
    """With ``layers`` in all, each kind's ranges in falling order; None where they cannot be held."""
    if any(part.layers > kinds[part.kind].most_layers or part.lanes > MOST_LANES for part in parts):
        return None
    missing = layers - sum(part.layers for part in parts)
    while missing > 0:
        grown = [
            (limit(bigger), -i, bigger)
            for i, part in enumerate(parts)
            if part.layers < kinds[part.kind].most_layers
            for bigger in (replace(part, layers=part.layers + 1),)
        ]
        if not grown:
            return None
        _, at, bigger = max(grown, key=lambda one: one[:2])
        parts[-at], missing = bigger, missing - 1
    while missing < 0:
        at = min(range(len(parts)), key=lambda i: (limit(parts[i]), i))
        if parts[at].layers > 1:
            parts[at] = replace(parts[at], layers=parts[at].layers - 1)
        else:
            del parts[at]
        missing += 1
    order = list(dict.fromkeys(part.kind for part in parts))
    return tuple(sorted(parts, key=lambda part: (order.index(part.kind), -part.layers, -part.lanes)))
