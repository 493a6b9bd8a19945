"""The cheapest pipeline of exactly ``depth`` groups that holds all layers, out of what a pool has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

MIDDLE, FIRST, LAST = 0, 1, 2
_COUNTED = 48  # devices of a class: of more than these, widths are not weighed against each other


@dataclass(frozen=True, slots=True)
class Kind:
    """A group type in a pool: how many groups there are if nothing else used the devices, and their devices."""

    node_class: int
    width: int
    available: int
    devices: int  # of the class, in the pool


@dataclass(frozen=True, slots=True)
class _Option:
    """``copies`` groups of one type at one place of the pipeline."""

    kind: int
    place: int
    copies: int
    layers: int
    price: float
    devices: int


_Item = tuple[_Option, ...]  # at most one of these is taken


def cheapest(
    holds: Ints, cost: Floats, kinds: Sequence[Kind], depth: int, layers: int, most: float
) -> tuple[float, tuple[int, ...]] | None:
    """The least price, at most ``most``, and the types used; None where nothing holds the layers at that price.

    ``holds``: layers that a group of each type holds in the middle, as the first, as the last stage: [3, types].
    Dynamic programming over (has a first stage, has a last, groups, layers), class by class, within a class also
    over devices used; multiplicities as bundles of 1, 2, 4, ... groups, of which some may stand at an end.
    """
    table = np.full((2, 2, depth + 1, layers + 1, 1), np.inf)
    table[0, 0, 0, 0, 0] = 0.0
    history: list[tuple[Floats, _Item | None]] = []  # before each step; None: a class is done
    for members in _by_class(kinds):
        items = [item for i in members for item in _items(i, holds[:, i], float(cost[i]), kinds[i], depth, most)]
        if not items:
            continue
        devices = kinds[members[0]].devices
        if len(members) > 1 and devices <= _COUNTED:
            wide = np.full((*table.shape[:-1], devices + 1), np.inf)
            wide[..., 0] = table[..., 0]
            table = wide
        for item in items:
            history.append((table, item))
            table = _with(table, item, layers)
        history.append((table, None))
        table = table.min(axis=-1, keepdims=True)
    price = float(table[1, 1, depth, layers, 0])
    if not np.isfinite(price) or price > most:
        return None
    return price, _trace(history, price, depth, layers)


def _by_class(kinds: Sequence[Kind]) -> list[list[int]]:
    classes: dict[int, list[int]] = {}
    for i, kind in enumerate(kinds):
        if kind.available > 0:
            classes.setdefault(kind.node_class, []).append(i)
    return list(classes.values())


def _items(index: int, holds: Ints, price: float, kind: Kind, depth: int, most: float) -> list[_Item]:
    if price > most:
        return []
    items: list[_Item] = []
    ends = min(2, kind.available)  # copies that may stand at an end
    places = [(place, int(holds[place])) for place in (MIDDLE, FIRST, LAST)]
    for i in range(ends):
        # Of two copies one may be the first stage and one the last: telling them apart would only repeat.
        allowed = places if ends == 1 else places[:2] if i == 0 else [places[0], places[2]]
        item = tuple(_Option(index, place, 1, n, price, kind.width) for place, n in allowed if n > 0)
        if item:
            items.append(item)
    left, bundle = min(kind.available - ends, depth - 2), 1
    while places[0][1] > 0 and left > 0:
        copies = min(bundle, left)
        held = places[0][1] * copies
        items.append((_Option(index, MIDDLE, copies, held, price * copies, kind.width * copies),))
        left -= copies
        bundle *= 2
    return items


def _with(table: Floats, item: _Item, layers: int) -> Floats:
    """The table when one of the item's options may also be taken: more layers than all are all."""
    result = table.copy()
    counted = table.shape[-1] > 1
    for option in item:
        source, target = table, result
        if option.place == FIRST:
            source, target = table[:1], result[1:]
        elif option.place == LAST:
            source, target = table[:, :1], result[:, 1:]
        rest = table.shape[2] - option.copies
        if counted:
            room = table.shape[-1] - option.devices
            if room <= 0:
                continue
            source, target = source[..., :room], target[..., option.devices :]
        if rest <= 0:
            continue
        held = min(option.layers, layers)
        moved = source[:, :, :rest] + option.price
        if held < layers:
            view = target[:, :, option.copies :, held:layers]
            np.minimum(view, moved[:, :, :, : layers - held], out=view)
        view = target[:, :, option.copies :, layers]
        np.minimum(view, moved[:, :, :, layers - held :].min(axis=3), out=view)
    return result


def _trace(
    history: Sequence[tuple[Floats, _Item | None]], value: float, depth: int, layers: int
) -> tuple[int, ...]:
    """The options behind the table's last corner."""
    first, last, groups, held, used = 1, 1, depth, layers, 0
    types: list[int] = []
    for before, item in reversed(history):
        if item is None:
            used = int(before[first, last, groups, held].argmin())
            continue
        if before[first, last, groups, held, used] <= value:
            continue
        counted = before.shape[-1] > 1
        best: tuple[float, _Option, int] | None = None
        for option in item:
            a, b = first - (option.place == FIRST), last - (option.place == LAST)
            devices = used - option.devices if counted else 0
            if a < 0 or b < 0 or groups < option.copies or devices < 0:
                continue
            row = before[a, b, groups - option.copies, :, devices]
            at = held - option.layers
            if held == layers:
                start = max(0, at)
                at = start + int(row[start:].argmin())
            if at >= 0 and (best is None or row[at] + option.price < best[0]):
                best = (float(row[at]) + option.price, option, at)
        if best is None:
            break
        _, option, held = best
        first, last = first - (option.place == FIRST), last - (option.place == LAST)
        groups -= option.copies
        used = used - option.devices if counted else 0
        value = float(before[first, last, groups, held, used])
        types.extend([option.kind] * option.copies)
    return tuple(types)
