"""From a packing back to devices: which pipeline gets which group of which node."""

from __future__ import annotations

from collections.abc import Sequence

from hexgen.scheduler.columns.classes import Classes
from hexgen.scheduler.columns.master import Chosen, Column
from hexgen.scheduler.columns.pools import Pool
from hexgen.scheduler.cost import GroupShape
from hexgen.scheduler.groups import Group, Topology, node_groups


def typical(classes: Classes, types: Sequence[int], pool: Pool) -> list[Group] | None:
    """Groups of these types on the pool's nodes, crossing as few areas as a greedy choice can; None: no room."""
    free: dict[int, int] = {place: classes.topology.nodes[place].count for place in pool.places}
    areas: dict[str, list[int]] = {}
    for place in pool.places:
        areas.setdefault(classes.topology.areas[place], []).append(place)
    left = sorted(types, key=lambda t: (-classes.types[t].width, t))
    groups: list[Group] = []
    while left and areas:
        # The area that could take most of what is left goes next.
        fitting = {area: _fitting(classes, left, places, dict(free)) for area, places in areas.items()}
        best = max(fitting, key=lambda area: len(fitting[area]))
        for kind, place in fitting[best]:
            groups.append(_group(classes.topology, place, free, classes.types[kind].width))
            left.remove(kind)
        del areas[best]
    return None if left else groups


def _fitting(
    classes: Classes, types: Sequence[int], places: Sequence[int], free: dict[int, int]
) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for kind in types:
        group = classes.types[kind]
        for place in places:
            if classes.class_of[place] == group.node_class and free[place] >= group.width:
                free[place] -= group.width
                found.append((kind, place))
                break
    return found


def _group(topology: Topology, place: int, free: dict[int, int], width: int) -> Group:
    """The next free devices of the node."""
    node = topology.nodes[place]
    start = node.count - free[place]
    free[place] -= width
    devices = tuple(f"{node.name}/{i}" for i in range(start, start + width))
    return Group(devices, GroupShape((node.device,) * width, node.link), place)


def place(classes: Classes, columns: Sequence[Column], chosen: Chosen) -> tuple[list[list[Group]], list[Group]]:
    """The packing's pipelines as groups of real devices, and the groups that none of them uses."""
    stock = _cut_nodes(classes, chosen)
    pipelines: list[list[Group]] = []
    for index, times in chosen.columns:
        for _ in range(times):
            groups: list[Group] = []
            for kind, number in columns[index].uses:
                groups.extend(_take(stock, kind, number, groups, classes.topology))
            pipelines.append(groups)
    return pipelines, [group for groups in stock.values() for group in groups]


def _cut_nodes(classes: Classes, chosen: Chosen) -> dict[int, list[Group]]:
    stock: dict[int, list[Group]] = {t: [] for t in range(len(classes.types))}
    used: dict[int, int] = {}
    cuts = list(chosen.cuts)
    for k, node in enumerate(classes.nodes):
        whole = len(node.patterns) - 1  # cut as coarsely as it goes: nodes that the packing leaves alone
        number = sum(n for kind, _, n in chosen.cuts if kind == k)
        cuts.append((k, whole, len(node.places) - number))
    for k, p, number in cuts:
        node = classes.nodes[k]
        for _ in range(number):
            place = node.places[used.get(k, 0)]
            used[k] = used.get(k, 0) + 1
            widths = [w for w, n in zip(node.widths, node.patterns[p], strict=True) for _ in range(n)]
            for group in node_groups(classes.topology, place, sorted(widths, reverse=True)):
                stock[classes.index[k, group.width]].append(group)
    return stock


def _take(
    stock: dict[int, list[Group]], kind: int, number: int, mine: Sequence[Group], topology: Topology
) -> list[Group]:
    """Groups of one type, of nodes and areas where the pipeline already is, if it can be."""
    taken: list[Group] = []
    for _ in range(number):
        places = {group.place for group in (*mine, *taken)}
        areas = {topology.areas[p] for p in places}
        best = min(
            stock[kind],
            key=lambda g: (g.place not in places, topology.areas[g.place] not in areas, g.place, g.devices),
        )
        stock[kind].remove(best)
        taken.append(best)
    return taken
