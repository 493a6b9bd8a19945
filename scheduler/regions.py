"""Large clusters, region by region: regions that are alike are planned once, and the answer is dealt to each.

Links between regions are slow as a rule, so few pipelines of a large cluster gain from crossing them. Regions that
cannot hold the model alone are planned together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hexgen.scheduler.groups import Group, Topology
from hexgen.scheduler.improve import Partition, make_partition
from hexgen.scheduler.solver import RouteSolver, Solution

Places = tuple[int, ...]  # indices of nodes in the whole topology
# Of parts of the nodes; places in each answer are the part's own, and None says that the model does not fit there.
PlanParts = Callable[[Sequence[Places]], Sequence[Partition | None]]


def region_by_region(solver: RouteSolver, plan_parts: PlanParts) -> Partition | None:
    """The best partition whose pipelines stay inside regions; None where the model fits nowhere."""
    topology = solver.topology
    routes: list[Solution] = []
    spare: list[Group] = []
    homeless: list[int] = []
    kinds = _alike(topology)
    for alike, found in zip(kinds, plan_parts([alike[0] for alike in kinds]), strict=True):
        if found is None:
            homeless.extend(place for places in alike for place in places)
            continue
        for places in alike:
            routes.extend(_moved(route, topology, alike[0], places) for route in found.routes)
            spare.extend(_moved_group(group, topology, alike[0], places) for group in found.spare)
    if homeless:
        ordered = tuple(sorted(homeless))
        (joined,) = plan_parts([ordered])
        if joined is not None:
            routes.extend(_moved(route, topology, ordered, ordered) for route in joined.routes)
    return make_partition(solver, routes, spare) if routes else None


def regions(topology: Topology) -> list[Places]:
    """The nodes of each area, those of equal make in the same order."""
    areas: dict[str, list[int]] = {}
    for place, area in enumerate(topology.areas):
        areas.setdefault(area, []).append(place)
    return [tuple(sorted(places, key=lambda p: (repr(_make(topology, p)), p))) for places in areas.values()]


def kinds_of_regions(topology: Topology) -> int:
    return len(_alike(topology))


def _alike(topology: Topology) -> list[list[Places]]:
    """Regions with the same nodes and the same link between them, together."""
    found: dict[object, list[Places]] = {}
    for places in regions(topology):
        inside = topology.link(places[0], places[1]) if len(places) > 1 else None
        signature = tuple(_make(topology, place) for place in places), inside
        found.setdefault(signature, []).append(places)
    return list(found.values())


def _make(topology: Topology, place: int) -> tuple[object, ...]:
    node = topology.nodes[place]
    return node.device, node.count, node.link, node.price_usd_h


def _moved(route: Solution, topology: Topology, model: Places, target: Places) -> Solution:
    groups = tuple(_moved_group(group, topology, model, target) for group in route.groups)
    return Solution(groups, route.division, route.value)


def _moved_group(group: Group, topology: Topology, model: Places, target: Places) -> Group:
    """The same group on the nodes of another region; ``model``: the part it was planned for."""
    twins = {topology.nodes[a].name: b for a, b in zip(model, target, strict=True)}

    def twin(device: str) -> str:
        name, number = device.rsplit("/", 1)
        return f"{topology.nodes[twins[name]].name}/{number}"

    lead = group.devices[0].rsplit("/", 1)[0]
    return Group(tuple(twin(device) for device in group.devices), group.shape, twins[lead])


def several(topology: Topology, least: int) -> bool:
    """Whether there is more than one region, and more than ``least`` devices."""
    return len(set(topology.areas)) > 1 and sum(node.count for node in topology.nodes) > least
