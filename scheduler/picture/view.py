"""What is drawn: nodes with their stages, and the ways of the routes between them; equal ones together if many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hexgen.cluster import Cluster, Node
from hexgen.plan import Plan
from hexgen.scheduler.explain.classes import range_text
from hexgen.scheduler.explain.state import node_of

DRAWN_SINGLY = 96  # devices: more are drawn by kinds of equal nodes
DRAWN_AT_MOST = 160  # cards
DRAWN_APART = 12  # routes: of more, those that take the same way between two stages share a line


@dataclass(frozen=True, slots=True)
class StageView:
    """A stage on one node: of a stage over several nodes, this node's part."""

    key: object
    name: str
    layers: tuple[int, int]
    devices: tuple[str, ...]
    routes: tuple[int, ...]  # indices of `View.routes`


@dataclass(frozen=True, slots=True)
class NodeView:
    """A node, or several that hold the same in the same way."""

    key: object
    title: str
    node: Node
    names: tuple[str, ...]
    stages: tuple[StageView, ...]
    unused: tuple[str, ...]  # devices that no stage holds


@dataclass(frozen=True, slots=True)
class RouteView:
    """A route, or several that are alike. ``share``: of all requests, together."""

    title: str
    numbers: tuple[int, ...]
    share: float


@dataclass(frozen=True, slots=True)
class WayView:
    """A hop from one stage to the next, of one route (or of several alike, or of all that take it)."""

    route: int  # index of `View.routes`: of several, the one that carries most
    sender: tuple[object, object]  # keys of the node and of the stage
    receiver: tuple[object, object]
    share: float
    pairs: tuple[tuple[str, str], ...]  # nodes
    routes: int = 1  # that it stands for


@dataclass(frozen=True, slots=True)
class View:
    nodes: tuple[NodeView, ...]
    routes: tuple[RouteView, ...]
    ways: tuple[WayView, ...]
    hidden: int  # kinds of nodes that are not drawn


def view_of(plan: Plan, cluster: Cluster) -> View:
    """Every node by itself up to `DRAWN_SINGLY` devices; beyond, equal nodes in equal roles are one."""
    singly = len(cluster.devices()) <= DRAWN_SINGLY
    routes, group_of = _routes(plan, cluster, singly)
    stage_keys = _stage_keys(plan, group_of, singly)
    nodes, node_keys = _nodes(plan, cluster, stage_keys, group_of, singly)
    ways = _ways(plan, group_of, stage_keys, node_keys)
    if len(routes) > DRAWN_APART:
        ways = _merged(ways)
    shown = nodes[:DRAWN_AT_MOST]
    drawn = {node.key for node in shown}
    ways = [way for way in ways if way.sender[0] in drawn and way.receiver[0] in drawn]
    return View(tuple(shown), tuple(routes), tuple(ways), len(nodes) - len(shown))


def _routes(plan: Plan, cluster: Cluster, singly: bool) -> tuple[list[RouteView], list[int]]:
    stages = {stage.name: stage for stage in plan.stages}
    total = sum(route.weight for route in plan.routes)
    alike: dict[object, list[int]] = {}
    for number, route in enumerate(plan.routes):
        if singly:
            alike[number] = [number]
            continue
        path = tuple(
            (
                hop.layers,
                stages[hop.stage].shares,
                tuple(_kind(cluster, node_of(d)) for d in stages[hop.stage].devices),
            )
            for hop in route.path
        )
        alike.setdefault(path, []).append(number)
    views: list[RouteView] = []
    group_of = [0] * len(plan.routes)
    for index, numbers in enumerate(alike.values()):
        names = f"route {numbers[0]}" if len(numbers) == 1 else f"{len(numbers)} routes like route {numbers[0]}"
        views.append(RouteView(names, tuple(numbers), sum(plan.routes[n].weight for n in numbers) / total))
        for number in numbers:
            group_of[number] = index
    return views, group_of


def _kind(cluster: Cluster, name: str) -> object:
    node = cluster.node(name)
    return node.device, node.count, node.link, node.region, node.price_usd_h


def _stage_keys(plan: Plan, group_of: Sequence[int], singly: bool) -> dict[str, object]:
    if singly:
        return {stage.name: stage.name for stage in plan.stages}
    on: dict[str, list[tuple[int, int]]] = {stage.name: [] for stage in plan.stages}
    for number, route in enumerate(plan.routes):
        for index, hop in enumerate(route.path):
            on[hop.stage].append((group_of[number], index))
    return {
        stage.name: (stage.layers, stage.width, stage.shares, tuple(sorted(on[stage.name])))
        for stage in plan.stages
    }


def _nodes(
    plan: Plan, cluster: Cluster, stage_keys: dict[str, object], group_of: Sequence[int], singly: bool
) -> tuple[list[NodeView], dict[str, object]]:
    """In the order of the routes, unused nodes last; and the key of each node."""
    held: dict[str, list[tuple[str, tuple[str, ...]]]] = {node.name: [] for node in cluster.nodes}
    for stage in plan.stages:
        for name in dict.fromkeys(node_of(device) for device in stage.devices):
            held[name].append((stage.name, tuple(d for d in stage.devices if node_of(d) == name)))
    first: dict[str, tuple[int, int]] = {}
    routes: dict[str, dict[int, None]] = {stage.name: {} for stage in plan.stages}
    for number, route in enumerate(plan.routes):
        for index, hop in enumerate(route.path):
            first.setdefault(hop.stage, (number, index))
            routes[hop.stage][group_of[number]] = None
    last = (len(plan.routes), 0)

    def position(name: str) -> tuple[int, int]:
        return min((first.get(stage, last) for stage, _ in held[name]), default=last)

    layers = {stage.name: stage.layers for stage in plan.stages}
    alike: dict[object, list[Node]] = {}
    node_keys: dict[str, object] = {}
    for node in sorted(cluster.nodes, key=lambda node: position(node.name)):
        role = tuple((stage_keys[stage], len(devices)) for stage, devices in held[node.name])
        key: object = node.name if singly else (_kind(cluster, node.name), role)
        node_keys[node.name] = key
        alike.setdefault(key, []).append(node)
    views: list[NodeView] = []
    order = {node.name: i for i, node in enumerate(cluster.nodes)}
    for key, members in alike.items():
        node = members[0]  # the one that the routes reach first stands for the others
        stages = tuple(
            StageView(stage_keys[stage], stage, layers[stage], devices, tuple(routes[stage]))
            for stage, devices in sorted(held[node.name], key=lambda entry: first.get(entry[0], last))
        )
        used = {device for _, devices in held[node.name] for device in devices}
        unused = tuple(d for i in range(node.count) if (d := f"{node.name}/{i}") not in used)
        names = tuple(sorted((member.name for member in members), key=lambda name: order[name]))
        title = node.name if len(names) == 1 else f"{len(names)} × {range_text(names)}"
        views.append(NodeView(key, title, node, names, stages, unused))
    return views, node_keys


def _ways(
    plan: Plan, group_of: Sequence[int], stage_keys: dict[str, object], node_keys: dict[str, object]
) -> list[WayView]:
    devices = {stage.name: stage.devices for stage in plan.stages}
    total = sum(route.weight for route in plan.routes)
    found: dict[
        tuple[int, tuple[object, object], tuple[object, object]], tuple[float, dict[tuple[str, str], None]]
    ]
    found = {}
    for number, route in enumerate(plan.routes):
        for a, b in zip(route.path, route.path[1:], strict=False):
            names = node_of(devices[a.stage][0]), node_of(devices[b.stage][0])
            key = (
                group_of[number],
                (node_keys[names[0]], stage_keys[a.stage]),
                (node_keys[names[1]], stage_keys[b.stage]),
            )
            share, pairs = found.get(key, (0.0, {}))
            pairs[names] = None
            found[key] = share + route.weight / total, pairs
    return [
        WayView(route, sender, receiver, share, tuple(pairs))
        for (route, sender, receiver), (share, pairs) in found.items()
    ]


def _merged(ways: Sequence[WayView]) -> list[WayView]:
    """One way for all routes between the same two stages, named after the one that carries most."""
    found: dict[object, list[WayView]] = {}
    for way in ways:
        found.setdefault((way.sender, way.receiver), []).append(way)
    merged: list[WayView] = []
    for members in found.values():
        main = max(members, key=lambda way: way.share)
        pairs = tuple(dict.fromkeys(pair for way in members for pair in way.pairs))
        merged.append(replace(main, share=sum(way.share for way in members), pairs=pairs, routes=len(members)))
    return merged
