"""The cheapest pipeline of exactly ``depth`` groups that holds all layers, out of what a pool has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

Room = Literal["devices", "nodes"]
ROOMS: tuple[Room, ...] = ("devices", "nodes")

MIDDLE, FIRST, LAST = 0, 1, 2
_COUNTED = 48  # devices of a class: of more than these, widths are not weighed against each other
_HALVES = 24  # of a class's nodes, likewise


def halves(width: int, node_devices: int) -> int:
    """Halves of a node that a group takes: there is room for one that is wider than half of it, or two as wide.

    Narrower ones take none: with the devices this says all for nodes of up to four, and less than all for larger
    ones (a dual feasible function: Fekete and Schepers, Mathematical Programming 91, 2001).
    """
    return (2 * width > node_devices) + (2 * width >= node_devices)


@dataclass(frozen=True, slots=True)
class Kind:
    """A group type in a pool: how many groups there are if nothing else used the devices, and their devices."""

    node_class: int
    width: int
    available: int
    devices: int  # of the class, in the pool
    node_devices: int  # of one node

    @property
    def halves(self) -> int:
        return halves(self.width, self.node_devices)

    @property
    def node_halves(self) -> int:
        """Of the class's nodes in the pool."""
        return 2 * (self.devices // self.node_devices)


@dataclass(frozen=True, slots=True)
class _Option:
    """``copies`` groups of one type at one place of the pipeline."""

    kind: int
    place: int
    copies: int
    layers: int
    price: float
    halves: int
    devices: int


_Item = tuple[_Option, ...]  # at most one of these is taken


def have_room(groups: Sequence[Kind]) -> bool:
    """Whether each class has the devices and the halves of nodes that these groups take."""
    used: dict[int, tuple[int, int]] = {}
    for kind in groups:
        devices, halves = used.get(kind.node_class, (0, 0))
        used[kind.node_class] = devices + kind.width, halves + kind.halves
        if devices + kind.width > kind.devices or halves + kind.halves > kind.node_halves:
            return False
    return True


def cheapest(
    holds: Ints,
    cost: Floats,
    kinds: Sequence[Kind],
    depth: int,
    layers: int,
    most: float,
    *,
    room: Room = "nodes",
) -> tuple[float, tuple[int, ...]] | None:
    """The least price, at most ``most``, and the types used; None where nothing holds the layers at that price.

    ``holds``: layers that a group of each type holds in the middle, as the first, as the last stage: [3, types].
    ``room``: that groups must find: nodes with room, as far as `Kind.halves` tells; or, quicker, a class's
    devices as one heap.
    Dynamic programming over (has a first stage, has a last, groups, layers), class by class, within a class also
    over halves of nodes and devices used; multiplicities as bundles of 1, 2, 4, ... groups, of which some may
    stand at an end.
    """
    table = np.full((2, 2, depth + 1, layers + 1, 1, 1), np.inf)
    table[0, 0, 0, 0, 0, 0] = 0.0
    history: list[tuple[Floats, _Item | None]] = []  # before each step; None: what is used counts no more
    for members in _by_class(kinds):
        items = [item for i in members for item in _items(i, holds[:, i], float(cost[i]), kinds[i], depth, most)]
        if not items:
            continue
        table = _counting(table, [kinds[i] for i in members], room)
        table = _taking([item for item in items if item[0].halves], table, layers, history)
        if table.shape[-2] > 1:  # narrower groups take no halves of nodes
            history.append((table, None))
            table = table.min(axis=-2, keepdims=True)
        table = _taking([item for item in items if not item[0].halves], table, layers, history)
        history.append((table, None))
        table = table.min(axis=-1, keepdims=True)
    price = float(table[1, 1, depth, layers, 0, 0])
    if not np.isfinite(price) or price > most:
        return None
    return price, _trace(history, price, depth, layers)


def _taking(
    items: Sequence[_Item], table: Floats, layers: int, history: list[tuple[Floats, _Item | None]]
) -> Floats:
    for item in items:
        history.append((table, item))
        table = _with(table, item, layers)
    return table


def _counting(table: Floats, members: Sequence[Kind], room: Room) -> Floats:
    """The table with room to count one class's nodes' halves and devices, of which none is used yet."""
    halves, devices = members[0].node_halves, members[0].devices
    several = len(members) > 1 and devices <= _COUNTED
    shape = (halves + 1 if room == "nodes" and several and halves <= _HALVES else 1, devices + 1 if several else 1)
    found = np.full((*table.shape[:-2], *shape), np.inf)
    found[..., 0, 0] = table[..., 0, 0]
    return found


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
        item = tuple(_Option(index, place, 1, n, price, kind.halves, kind.width) for place, n in allowed if n > 0)
        if item:
            items.append(item)
    left, bundle = min(kind.available - ends, depth - 2), 1
    while places[0][1] > 0 and left > 0:
        copies = min(bundle, left)
        held = places[0][1] * copies
        taken = (kind.halves * copies, kind.width * copies)
        items.append((_Option(index, MIDDLE, copies, held, price * copies, *taken),))
        left -= copies
        bundle *= 2
    return items


def _with(table: Floats, item: _Item, layers: int) -> Floats:
    """The table when one of the item's options may also be taken: more layers than all are all."""
    result = table.copy()
    for option in item:
        source, target = table, result
        if option.place == FIRST:
            source, target = table[:1], result[1:]
        elif option.place == LAST:
            source, target = table[:, :1], result[:, 1:]
        rest = table.shape[2] - option.copies
        halves, devices = _used(table, option)
        left = table.shape[-2] - halves, table.shape[-1] - devices
        if rest <= 0 or min(left) <= 0:
            continue
        source, target = source[..., : left[0], : left[1]], target[..., halves:, devices:]
        held = min(option.layers, layers)
        moved = source[:, :, :rest] + option.price
        if held < layers:
            view = target[:, :, option.copies :, held:layers]
            np.minimum(view, moved[:, :, :, : layers - held], out=view)
        view = target[:, :, option.copies :, layers]
        np.minimum(view, moved[:, :, :, layers - held :].min(axis=3), out=view)
    return result


def _used(table: Floats, option: _Option) -> tuple[int, int]:
    """Halves of nodes and devices that the option takes, where the table counts them."""
    return option.halves * (table.shape[-2] > 1), option.devices * (table.shape[-1] > 1)


def _trace(
    history: Sequence[tuple[Floats, _Item | None]], value: float, depth: int, layers: int
) -> tuple[int, ...]:
    """The options behind the table's last corner."""
    first, last, groups, held, used = 1, 1, depth, layers, (0, 0)
    types: list[int] = []
    for before, item in reversed(history):
        here = before[first, last, groups, held]
        if item is None:
            if here.shape[0] > 1:
                used = int(here[:, used[1]].argmin()), used[1]
            else:
                used = 0, int(here[0].argmin())
            continue
        if here[used] <= value:
            continue
        best: tuple[float, _Option, int, tuple[int, int]] | None = None
        for option in item:
            a, b = first - (option.place == FIRST), last - (option.place == LAST)
            taken = _used(before, option)
            was = used[0] - taken[0], used[1] - taken[1]
            if min(a, b, *was) < 0 or groups < option.copies:
                continue
            row = before[a, b, groups - option.copies, :, *was]
            at = held - option.layers
            if held == layers:
                start = max(0, at)
                at = start + int(row[start:].argmin())
            if at >= 0 and (best is None or row[at] + option.price < best[0]):
                best = (float(row[at]) + option.price, option, at, was)
        if best is None:
            break
        _, option, held, used = best
        first, last = first - (option.place == FIRST), last - (option.place == LAST)
        groups -= option.copies
        value = float(before[first, last, groups, held, *used])
        types.extend([option.kind] * option.copies)
    return tuple(types)
