"""Does anything fit at all? The question behind every refusal, answered by the search's own last resort."""

from __future__ import annotations

from collections.abc import Sequence

from hexgen.cluster import Cluster, Node
from hexgen.memory import plan_dtype
from hexgen.model import ModelSpec
from hexgen.plan import EngineOptions
from hexgen.scheduler.cost import CostModel
from hexgen.scheduler.groups import Topology
from hexgen.scheduler.solver import RouteSolver
from hexgen.scheduler.tables.source import CostTable
from hexgen.scheduler.tight import tight_starts
from hexgen.scheduler.traffic import Traffic


def fits(
    cluster: Cluster,
    model: ModelSpec,
    options: EngineOptions,
    traffic: Traffic,
    cost_table: CostTable | None = None,
) -> bool:
    """Whether some pipeline holds the model with room for one mean request: on all nodes, or on the GPUs alone."""
    gpus = [node for node in cluster.nodes if node.device.kind != "cpu"]
    sets: list[Sequence[Node]] = [cluster.nodes]
    if gpus and len(gpus) < len(cluster.nodes) and options.dtype is None:
        sets.insert(0, gpus)  # a CPU on a route makes the plan compute in float32
    return any(_holds(cluster, nodes, model, options, traffic, cost_table) for nodes in sets)


def _holds(
    cluster: Cluster,
    nodes: Sequence[Node],
    model: ModelSpec,
    options: EngineOptions,
    traffic: Traffic,
    cost_table: CostTable | None,
) -> bool:
    dtype = plan_dtype(options, model, [node.device for node in nodes])
    cost = CostModel(model, dtype, options, cost_table)
    solver = RouteSolver(Topology(cluster, nodes), cost, traffic, "throughput")
    return next(tight_starts(solver), None) is not None
