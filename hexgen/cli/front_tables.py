"""The front between throughput and latency, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from hexgen.plan import Plan, plan_to_dict
from hexgen.scheduler.front import FrontPoint
from hexgen.units import format_time

_RANGES_SHOWN = 8


def front_table(points: Sequence[FrontPoint]) -> Table:
    table = Table(title="throughput against latency, at full load", title_justify="left")
    for name in ("", "tokens/s", "TTFT", "TPOT", "one request", "limit on TPOT", "stages, layers of each"):
        table.add_column(
            name, justify="left" if name in ("", "stages, layers of each") else "right", overflow="fold"
        )
    for point in points:
        told = point.predicted
        table.add_row(
            "picked" if point.picked else "",
            f"{told.tokens_s:,.0f}",
            format_time(told.ttft_s),
            format_time(told.tpot_s),
            f"{told.single_tokens_s:,.1f} tokens/s",
            "-" if point.tpot_limit_s is None else format_time(point.tpot_limit_s),
            _shape_text(point.plan),
        )
    return table


def front_to_list(points: Sequence[FrontPoint]) -> list[dict[str, Any]]:
    """Plans leave the cluster out: it is the picked plan's."""
    return [
        {
            "picked": point.picked,
            "tokens_s": point.predicted.tokens_s,
            "ttft_s": point.predicted.ttft_s,
            "tpot_s": point.predicted.tpot_s,
            "tpot_limit_s": point.tpot_limit_s,
            "plan": {key: part for key, part in plan_to_dict(point.plan).items() if key != "cluster"},
        }
        for point in points
    ]


def _shape_text(plan: Plan) -> str:
    """How many stages hold how many layers, of which device: `4 A100 of 9, 8 L4 of 6`."""
    nodes = () if isinstance(plan.cluster, str) else plan.cluster.nodes
    types = {node.name: node.base_device for node in nodes}
    counts: dict[tuple[str, int], int] = {}
    for stage in plan.stages:
        device = types.get(stage.devices[0].rpartition("/")[0], "stage")
        name = f"{device} TP {stage.width}" if stage.width > 1 else device
        held = (name, stage.layers[1] - stage.layers[0])
        counts[held] = counts.get(held, 0) + 1
    parts = [f"{number} {name} of {layers}" for (name, layers), number in counts.items()]
    more = len(parts) - _RANGES_SHOWN
    return ", ".join(parts[:_RANGES_SHOWN]) + (f", {more} more" if more > 0 else "")
