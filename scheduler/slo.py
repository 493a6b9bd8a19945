"""Plans under limits, judged by simulation: the largest rate at which 99 % of the requests keep all of them.

The search keeps limits on means, which it can work out thousands of times a second. What 99 of 100 requests meet
has queues and bubbles in it, which only a run shows. So several plans that the search likes for different reasons
are each run, and the best is taken.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

from hexgen.errors import InfeasibleError, SpecError
from hexgen.plan import Plan
from hexgen.scheduler.baselines.symmetric import symmetric
from hexgen.scheduler.best import Found, best_on_nodes, bounded, finish
from hexgen.scheduler.deadline import part_until, passed
from hexgen.scheduler.simulation import Requests, attainment_curve, carries, largest_rate, requests_of
from hexgen.scheduler.subsets import plan_within_price
from hexgen.scheduler.task import Task
from hexgen.workload import Slo

log = logging.getLogger("hexgen.scheduler")

SHARE = 0.99  # of the requests
_TOLERANCE = 0.02  # of a rate: less is noise, and the earlier candidate stays
_TIGHTER = (0.8, 0.6)  # of the limits: plans made for these have room for queues
_USUAL = 0.8  # of what is served by means: where the rate for 99 % mostly lies
_IDLE = 0.05  # of that rate: a plan that fails there keeps the limits at no rate worth having
_SPARE_RATES = (1.15, 1.35, 1.6, 2.0)  # of the workload's: what cheap nodes are chosen to carry, in turn
_FEWEST, _MOST = 1000, 2000  # requests of a trial
_FILLS = 3  # trials see so many times the requests that are in the cluster at once
_FOR_SEARCH = 0.5  # of the time limit; the rest is for trials
_FOR_ANOTHER = 0.3  # of the time that is left, for one more candidate
_MANY_DEVICES = 160  # beyond this many, only the candidates that are found in no time


def best_for_slo(
    task: Task, candidates: Sequence[Plan], others: Iterable[Plan] = (), regular: Plan | None = None
) -> Plan:
    """The candidate with the largest simulated rate within the limits, and that rate in its prediction.

    All meet the same requests, 1,000 to 2,000: three times what the plan holds at once. For large plans that is
    less, which flatters all alike: a short run ends before queues have grown. A candidate that does not carry the
    best rate so far and 2 % more costs one trial; of equals the earlier is taken. After the deadline no more are
    judged; where none was, the first is returned as it is. There must be one. ``others`` are looked for only when
    those before them have been judged, so that a limit of time is not spent on candidates alone. ``regular`` is
    judged before all.
    """
    best, best_rate = candidates[0], -1.0
    requests = _requests(task, candidates)
    if requests is None:
        return best
    seen: list[Plan] = []
    for made in chain(() if regular is None else (regular,), candidates, others):
        if passed(task.deadline):
            break
        if any(_same(made, other) for other in seen):
            continue
        seen.append(made)
        rate = _largest(task, made, requests, best_rate)
        if rate > best_rate:
            best, best_rate = made, rate
    if best_rate < 0:
        return best
    return _noted(task, best, best_rate, requests)


def other_candidates(task: Task, made: Plan) -> Iterator[Plan]:
    """Plans that may beat ``made``, which is the best by means: for tighter limits, for throughput, for latency.

    Quick searches; none after the deadline.
    """
    quick = dataclasses.replace(task, quick=True, engine="heuristic")
    bound = math.inf if made.predicted is None else made.predicted.upper_bound_tokens_s or math.inf
    for found in _founds(quick):
        if found is not None:
            yield bounded(found.emit(task, "slo"), bound)


def regular_candidate(task: Task) -> Plan | None:
    """Equal stages leave no bubbles, which means do not see and limits on 99 % do. Found and judged in no time."""
    if passed(task.deadline) or sum(node.count for node in task.cluster.nodes) > _MANY_DEVICES:
        return None
    return symmetric(task, "slo").plan


def for_search(task: Task) -> Task:
    """The task with a share of its time: trials need the rest."""
    return _with_share(task, _FOR_SEARCH)


def _with_share(task: Task, share: float) -> Task:
    return dataclasses.replace(task, deadline=part_until(task.deadline, share))


def cheapest_within_limits(task: Task) -> Plan:
    """The objective ``cost`` for a workload with a rate and limits: nodes chosen by means, checked by simulation.

    Where 99 % do not keep the limits, nodes are chosen for more than the rate, up to twice. Where that does not
    help either, the plan that comes nearest is returned, and its ``slo_attainment`` says so.
    """
    first = finish(task, plan_within_price(task, "cost"), "cost")
    requests = _requests(task, [first])
    if requests is None or passed(task.deadline):
        return first
    best = _noted(task, first, None, requests)
    for spare in _SPARE_RATES:
        if _attainment(best) >= SHARE or passed(task.deadline):
            break
        more = dataclasses.replace(task.workload, rate=float(task.workload.rate) * spare)
        try:
            draft = plan_within_price(dataclasses.replace(task, workload=more), "cost")
        except InfeasibleError:
            break  # nor would any further one be
        if not _same(draft, best):
            found = _noted(task, finish(task, draft, "cost"), None, requests)
            best = max(best, found, key=_attainment)
    return best


# ---- candidates ------------------------------------------------------------------------------------------------


def _founds(task: Task) -> Iterator[Found | None]:
    nodes = task.cluster.nodes
    few = sum(node.count for node in nodes) <= _MANY_DEVICES
    for share in _TIGHTER if few else ():
        if not passed(task.deadline):
            slo = _scaled(task.workload.slo, share)
            tighter = dataclasses.replace(task, workload=dataclasses.replace(task.workload, slo=slo))
            yield best_on_nodes(_with_share(tighter, _FOR_ANOTHER), nodes, "slo")
    if not passed(task.deadline):
        yield best_on_nodes(_with_share(task, _FOR_ANOTHER), nodes, "throughput")
    if not passed(task.deadline):
        yield _quickest_everywhere(_with_share(task, _FOR_ANOTHER))


def _quickest_everywhere(task: Task) -> Found | None:
    """The pipeline that answers soonest, then the one that does so on the nodes that are left, and so on."""
    left = list(task.cluster.nodes)
    found = best_on_nodes(task, left, "latency")
    if found is None or sum(node.count for node in left) > _MANY_DEVICES:
        return found
    routes = list(found.partition.routes)
    while not passed(task.deadline):
        used = {device.rsplit("/", 1)[0] for route in routes for g in route.groups for device in g.devices}
        left = [node for node in left if node.name not in used]
        more = best_on_nodes(task, left, "latency") if left else None
        if more is None:
            break
        routes += more.partition.routes
    return Found(dataclasses.replace(found.partition, routes=tuple(routes), spare=()))


def _scaled(slo: Slo, share: float) -> Slo:
    limits = (slo.ttft_s, slo.tpot_s, slo.latency_s)
    return Slo(*(None if limit is None else limit * share for limit in limits))


def _same(a: Plan, b: Plan) -> bool:
    return (a.stages, a.routes) == (b.stages, b.routes)


# ---- trials ----------------------------------------------------------------------------------------------------


def _requests(task: Task, candidates: Sequence[Plan]) -> Requests | None:
    """Those that the model's context takes: others are refused whatever the plan. None where none can be drawn."""
    held = max(
        (p.requests_s * p.latency_s for made in candidates if (p := made.predicted) is not None), default=0.0
    )
    count = min(_MOST, max(_FEWEST, math.ceil(_FILLS * held)))
    try:
        drawn = requests_of(task.workload, count, task.seed, rate=1.0)
    except SpecError as error:
        log.warning("limits are kept on average only: %s", error)
        return None
    taken = drawn.prompt_tokens < min(task.options.max_context or task.model.max_context, task.model.max_context)
    return Requests(drawn.arrival_s[taken], drawn.prompt_tokens[taken], drawn.output_tokens[taken])


def _largest(task: Task, made: Plan, requests: Requests, least: float) -> float:
    """The candidate's rate, requests/s; -1 where it is not worth more than ``least``."""
    slo, table = task.workload.slo, task.cost_table
    start = made.predicted.requests_s * _USUAL if made.predicted is not None else 1.0
    late = task.deadline
    tried = least * (1 + _TOLERANCE) if least > 0 else start * _IDLE
    if not carries(
        made, task.cluster, task.model, requests, slo, tried,
        attainment=SHARE, cost_table=table, deadline=late,
    ):  # fmt: skip
        return -1.0 if least > 0 or passed(task.deadline) else 0.0
    start = tried if least > 0 else start
    found = largest_rate(
        made, task.cluster, task.model, requests, slo,
        attainment=SHARE, cost_table=table, tolerance=_TOLERANCE, start=start, deadline=late,
    )  # fmt: skip
    return -1.0 if found == 0 and passed(task.deadline) else found  # nothing is known


def _noted(task: Task, made: Plan, largest: float | None, requests: Requests) -> Plan:
    """The plan with what was simulated in its prediction."""
    if made.predicted is None:
        return made
    attainment: float | None = None
    rate = task.workload.rate
    if rate != "max" and not passed(task.deadline):
        slo, table = task.workload.slo, task.cost_table
        point = attainment_curve(made, task.cluster, task.model, requests, slo, [float(rate)], cost_table=table)[0]
        attainment = None if math.isnan(point.attainment) else point.attainment
    predicted = dataclasses.replace(made.predicted, slo_requests_s=largest, slo_attainment=attainment)
    return dataclasses.replace(made, predicted=predicted)


def _attainment(made: Plan) -> float:
    return (made.predicted.slo_attainment or 0.0) if made.predicted is not None else 0.0
