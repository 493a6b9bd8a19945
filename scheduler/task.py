"""What is asked of the planner, checked and with every default filled in."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Sequence
from typing import Literal, get_args

from hexgen.cluster import Cluster, Node
from hexgen.errors import SpecError
from hexgen.memory import plan_dtype
from hexgen.model import ModelSpec
from hexgen.plan import EngineOptions
from hexgen.scheduler.progress import OnProgress
from hexgen.scheduler.reachable import reachable
from hexgen.scheduler.tables.source import CostTable
from hexgen.workload import Lengths, Workload

log = logging.getLogger("hexgen.scheduler")

Objective = Literal["throughput", "latency", "slo", "cost", "maxflow"]
Engine = Literal["auto", "exact", "heuristic", "genetic"]


@dataclasses.dataclass(frozen=True, slots=True)
class Task:
    """What is planned, with every default filled in."""

    cluster: Cluster
    model: ModelSpec
    workload: Workload
    options: EngineOptions
    engine: Engine
    seed: int
    deadline: float | None  # of time.monotonic()
    time_limited: bool
    cost_table: CostTable | None = None  # figures instead of the catalogue's
    quick: bool = False  # regular partitions only, for planners that compare many sets of nodes
    unreachable: tuple[str, ...] = ()  # nodes that were asked for and are not in `cluster`: no link leads to them
    progress: OnProgress | None = None


def make_task(
    cluster: Cluster,
    model: ModelSpec,
    workload: Workload | None,
    objective: str,
    time_limit_s: float | None,
    seed: int,
    engine: str,
    options: EngineOptions | None,
    cost_table: CostTable | None = None,
    progress: OnProgress | None = None,
) -> Task:
    """Check what was asked, and fill in what was not. Raises ``SpecError``."""
    if objective not in get_args(Objective):
        raise SpecError(f"unknown objective {objective!r}", remedy=f"one of {', '.join(get_args(Objective))}")
    if engine not in get_args(Engine):
        raise SpecError(f"unknown engine {engine!r}", remedy=f"one of {', '.join(get_args(Engine))}")
    if time_limit_s is not None and not (math.isfinite(time_limit_s) and time_limit_s >= 0):
        raise SpecError(
            f"{time_limit_s} s is no time limit", where="time limit", remedy="give it 0 or more seconds"
        )
    if time_limit_s == 0:
        log.warning("a time limit of 0 s leaves no time to search: the plan is the first that was found")
    if not any(node.count for node in cluster.nodes):
        raise SpecError("there are no devices", where=cluster.name, remedy="add a node under `nodes:`")
    check_links(cluster)
    check_prices(cluster, objective)
    cluster, unreachable = reachable(cluster)
    if unreachable:
        log.warning("planned without nodes that no link leads to: %s", ", ".join(unreachable))
    asked = workload or cluster.workload
    engine_options = options or default_options(cluster)
    limit = min(engine_options.max_context or model.max_context, model.max_context)
    filled = asked or default_workload(limit)
    needed = filled.prompt_tokens.mean + filled.output_tokens.mean
    if needed > limit:
        raise SpecError(
            f"the workload's mean request has {needed:g} tokens, and {model.name} takes at most {limit}",
            where="workload",
            remedy="lower prompt_tokens or output_tokens",
        )
    if (
        objective == "slo"
        and filled.slo.ttft_s is None
        and filled.slo.tpot_s is None
        and filled.slo.latency_s is None
    ):
        raise SpecError(
            "the objective slo needs limits, and the workload names none",
            where="workload: slo",
            remedy="add slo: {ttft: 2s, tpot: 100ms}",
        )
    if cost_table is not None:
        nodes = [node for node in cluster.nodes if node.count]
        cost_table.check(model, nodes, plan_dtype(engine_options, model, [node.device for node in nodes]))
    deadline = None if time_limit_s is None else time.monotonic() + time_limit_s
    return Task(
        cluster,
        model,
        filled,
        engine_options,
        engine,  # type: ignore[arg-type]
        seed,
        deadline,
        time_limit_s is not None,
        cost_table,
        progress=progress,
        unreachable=unreachable,
    )


def default_workload(max_context: int) -> Workload:
    """The built-in chat workload, shortened where a model's context is."""
    usual = Workload()
    longest = usual.prompt_tokens.mean + usual.output_tokens.mean
    if longest <= max_context:
        return usual
    share = max_context / longest
    return Workload(
        prompt_tokens=Lengths(mean=max(1, int(usual.prompt_tokens.mean * share))),
        output_tokens=Lengths(mean=max(1, int(usual.output_tokens.mean * share))),
    )


def default_options(cluster: Cluster) -> EngineOptions:
    """GPUs gain from larger batches; a CPU worker is busy with a few sequences."""
    only_gpus = all(node.device.kind != "cpu" for node in cluster.nodes)
    return EngineOptions(max_sequences=256) if only_gpus else EngineOptions()


def check_links(cluster: Cluster) -> None:
    """Between nodes a bandwidth of zero is no link; inside a node there must be one. Raises ``SpecError``."""
    for node in cluster.nodes:
        if not node.link.bandwidth_bytes_s > 0 and node.count > 1:
            raise SpecError(
                f"the link inside the node {node.name} has no bandwidth",
                where=cluster.name,
                remedy="give it a positive bandwidth, or count its devices as nodes of one device",
            )
    links = [node.link for node in cluster.nodes] + [cluster.default_link]
    links += [entry.link for entry in cluster.region_links] + [entry.link for entry in cluster.node_links]
    if any(not link.bandwidth_bytes_s >= 0 or not link.latency_s >= 0 for link in links):
        raise SpecError("a link has a negative bandwidth or latency", where=cluster.name)


def check_prices(cluster: Cluster, objective: str) -> None:
    """What is to be bounded or minimised must be known. Raises ``SpecError``."""
    if cluster.budget_usd_h is None and objective != "cost":
        return
    unpriced = [node.name for node in cluster.nodes if node.count and node.price_usd_h is None]
    if unpriced:
        more = f" and {len(unpriced) - 3} more" if len(unpriced) > 3 else ""
        asked = "a budget" if cluster.budget_usd_h is not None else "the objective cost"
        raise SpecError(
            f"{asked} needs the price of every node, and {', '.join(unpriced[:3])}{more} has none",
            where=f"cluster {cluster.name}",
            remedy="add price: USD per hour to each node (0 for what costs nothing)",
        )


def total_price(nodes: Sequence[Node]) -> float:
    return sum(node.price_usd_h or 0.0 for node in nodes)
