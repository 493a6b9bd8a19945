"""A model timed on one node of each device type that a survey found."""

from __future__ import annotations

from dataclasses import dataclass

from hexgen.cluster import Cluster
from hexgen.discover.records import Measured
from hexgen.discover.survey import Found, Survey, Surveyor, one_of_each_machine
from hexgen.discover.table import Timed, table_text
from hexgen.errors import DeploymentError
from hexgen.memory import plan_dtype
from hexgen.model import DType, ModelSpec
from hexgen.plan import EngineOptions

LIMIT_S = 40.0  # after it the larger loads are left out
TIMEOUT_S = 150.0


@dataclass(frozen=True, slots=True)
class ModelTimes:
    text: str  # of the table
    remarks: tuple[str, ...]


def time_model(
    surveyor: Surveyor, survey: Survey, cluster: Cluster, model: ModelSpec, dtype: DType | None, name: str
) -> ModelTimes:
    """The cost table of ``model`` on this cluster; in the number format that a plan over it would choose.

    Raises ``DeploymentError`` where no device type could be timed.
    """
    chosen = dtype or plan_dtype(EngineOptions(), model, [node.device for node in cluster.nodes])
    by_name = {found.name: found for found in survey.nodes}
    first: dict[tuple[str, float], Found] = {}
    for node in cluster.nodes:
        first.setdefault((node.device.name, node.device.flops(chosen)), by_name[node.name])
    remarks: list[str] = []
    timed: list[Timed] = []

    def failed(node: str, why: str) -> None:
        remarks.append(f"{node} could not time the model: {why}")

    waves = one_of_each_machine(list(first.values()))
    for done, wave in enumerate(waves):
        surveyor.progress(f"timing {len(first)} device types", done, len(waves))
        asked = {n.name: (model, chosen, n.gpus > 0, cluster.node(n.name).threads or 1, LIMIT_S) for n in wave}
        answers = surveyor.asker.ask("calibrate", asked, TIMEOUT_S, failed)
        for found in wave:
            if found.name in answers:
                calibration = answers[found.name]
                timed.append(Timed(cluster.node(found.name).device, found.name, calibration))
                remarks += [f"{found.name}: {line}" for line in calibration.said]
    if not timed:
        raise DeploymentError("no device type could be timed: " + "; ".join(remarks), where="--model")
    hops = [found.measured.hop_s for found in survey.nodes if isinstance(found.measured, Measured)]
    return ModelTimes(table_text(model, chosen, timed, hops, name), tuple(remarks))
