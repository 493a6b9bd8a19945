"""The best plan with shared stages, and the front between what is served and how quickly it is answered."""

from __future__ import annotations

from collections.abc import Sequence

from hexgen.errors import HexgenError
from hexgen.plan import Plan
from hexgen.scheduler.best import computing_alike, solver_for
from hexgen.scheduler.deadline import passed
from hexgen.scheduler.lanes.kinds import kinds_of
from hexgen.scheduler.lanes.program import Program
from hexgen.scheduler.lanes.search import NEAR, Point, Search
from hexgen.scheduler.lanes.ways import Space
from hexgen.scheduler.task import Task
from hexgen.workload import Slo

_FINISHED = 8  # shapes whose plans are made and predicted
_FINISHED_APART = 160  # where each route's steps are apart: the search goes by merged ones and ranks otherwise
_MOST_MACHINES = 256
_AS_QUICK = 1.01


def best_lanes(task: Task, objective: str = "throughput") -> Plan | None:
    """The plan of shared stages that is predicted to serve most, or the quickest of about as much.

    With the objective ``slo``, what keeps the workload's limits counts. One series of ranges over all machines,
    for clusters of up to some hundred: larger ones are better cut into several. None where nothing fits.
    """
    limited = objective in ("slo", "cost") and task.workload.slo != Slo()
    points = sorted(_points(task, limited), key=lambda point: -point.pace.requests_s)
    near = [point for point in points if point.pace.requests_s >= NEAR * points[0].pace.requests_s]
    number = _FINISHED if all(point.space.merges for point in points) else _FINISHED_APART
    tried = dict.fromkeys([*points[:number], *sorted(near, key=lambda point: point.pace.trip_s)[:number]])
    made: list[tuple[float, float, Plan]] = []
    for point in tried:
        if made and passed(task.deadline):
            break
        try:
            plan = point.plan(task, objective)
        except HexgenError:
            continue  # an engine's buffers, or a page more, do not fit: the next shape
        if plan.predicted is not None:
            made.append((plan.predicted.tokens_s, point.pace.trip_s, plan))
    most = max((tokens_s for tokens_s, _, _ in made), default=0.0)
    enough = [m for m in made if m[0] >= NEAR * most]
    quickest_s = min((trip_s for _, trip_s, _ in enough), default=0.0)
    # Within limits, many shapes take just what is granted: of these, most counts.
    quick = max((m for m in enough if m[1] <= quickest_s * _AS_QUICK), key=lambda m: (m[0], -m[1]), default=None)
    return None if quick is None else quick[2]


def front(task: Task) -> tuple[Point, ...]:
    """Shapes that no other beats in both tokens/s and mean time of a decode, most tokens/s first."""
    return undominated(_points(task, False, wide=True))


def undominated(points: Sequence[Point]) -> tuple[Point, ...]:
    found: list[Point] = []
    for point in sorted(points, key=lambda p: (-p.pace.requests_s, p.pace.trip_s)):
        if not found or point.pace.trip_s < found[-1].pace.trip_s * (1 - 1e-9):
            found.append(point)
    return tuple(found)


def _points(task: Task, limited: bool, wide: bool = False) -> list[Point]:
    """Every shape that the search came by, priced."""
    found: list[Point] = []
    for nodes in computing_alike(task.cluster.nodes, task.options):
        solver = solver_for(task, nodes, "throughput")
        kinds = kinds_of(solver)
        if not kinds or sum(len(kind.groups) for kind in kinds) > _MOST_MACHINES:
            continue
        program = Program(Space(solver, tuple(kinds)))
        # What serves most within limits is near to what is quickest without them.
        some = Search(task, program, False, wide or limited).points()
        if limited:
            some = Search(task, program, True, wide).points([point.shape for point in undominated(some)])
        found += some
    return found
