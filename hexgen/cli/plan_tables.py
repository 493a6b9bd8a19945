"""Plans as tables for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from hexgen.cluster import Cluster
from hexgen.model import ModelSpec
from hexgen.plan import DevicePrediction, Plan, Prediction, Stage
from hexgen.scheduler.compare import Baseline
from hexgen.scheduler.explain.words import COMPARED, compared_rows
from hexgen.scheduler.replan import Replanned
from hexgen.units import format_bytes, format_time

_ROUTES_SHOWN = 40
_UNUSED_SHOWN = 6


def plan_tables(plan: Plan, cluster: Cluster, model: ModelSpec) -> list[RenderableType]:
    """Stages, routes and what is predicted."""
    predicted = plan.predicted
    if predicted is None:
        return []
    held = {device.device: device for device in predicted.devices}
    table = Table(title=f"{plan.model} on {cluster.name}", title_justify="left")
    for name in ("stage", "layers", "devices", "TP", "shares", "weights", "KV", "memory used", "step"):
        table.add_column(name, justify="right" if name in ("TP", "step") else "left", overflow="fold")
    steps = {stage.stage: stage for stage in predicted.stages}
    types = {node.name: node.base_device for node in cluster.nodes}
    for stage in plan.stages:
        members = [held[device] for device in stage.devices]
        step = steps[stage.name]
        table.add_row(
            stage.name,
            f"[{stage.layers[0]}, {stage.layers[1]})",
            _device_text(stage, types),
            str(stage.width),
            "equal" if stage.shares is None else ":".join(f"{share:g}" for share in stage.shares),
            format_bytes(sum(m.weights_bytes for m in members)),
            format_bytes(sum(m.kv_bytes for m in members)),
            _used_text(members),
            format_time(step.decode_step_s),
        )
    lines = [_route_text(plan, i) for i in range(min(len(plan.routes), _ROUTES_SHOWN))]
    if len(plan.routes) > _ROUTES_SHOWN:
        lines.append(f"... and {len(plan.routes) - _ROUTES_SHOWN} more routes")
    unused = [device.id for device in cluster.devices() if device.id not in held]
    if unused:
        named = ", ".join(unused[:_UNUSED_SHOWN]) + (", ..." if len(unused) > _UNUSED_SHOWN else "")
        lines.append(f"{len(unused)} of {len(cluster.devices())} devices unused: {named}")
    return [table, Text("\n".join(lines)), Text(_prediction_text(predicted))]


def compare_table(plan: Plan, others: Sequence[Baseline]) -> Table:
    """The plan beside simpler placements, under the same evaluator."""
    table = Table(title="compared with", title_justify="left")
    for name in COMPARED:
        table.add_column(name, justify="left" if name in ("placement", "why") else "right", overflow="fold")
    for row in compared_rows(plan, others):
        table.add_row(*(Text(cell) for cell in row))
    return table


def replan_text(found: Replanned) -> str:
    """What changes on the way from the old plan."""
    names = {"unbroken": "what survives, as it is", "repaired": "the old plan, repaired", "fresh": "a fresh plan"}
    kept = names.get(found.chosen, found.chosen) if found.keeps_bytes else "nothing of it can stay on this cluster"
    text = (
        f"from the old plan: {kept}; "
        f"devices load {format_bytes(found.loads_bytes)} of weights and keep {format_bytes(found.keeps_bytes)}"
    )
    if found.gone:
        more = f" and {len(found.gone) - _UNUSED_SHOWN} more" if len(found.gone) > _UNUSED_SHOWN else ""
        text += f"; gone: {', '.join(found.gone[:_UNUSED_SHOWN])}{more}"
    predicted = found.plan.predicted
    if predicted is not None and predicted.upper_bound_tokens_s is None:
        text += "\nhow far from the best possible is not known: plan without --from to have it proven"
    return text


def _device_text(stage: Stage, types: dict[str, str]) -> str:
    """``ice-1/0-3 (RTX3090Ti)``: runs of devices of one node."""
    by_node: dict[str, list[int]] = {}
    for device in stage.devices:
        name, number = device.rsplit("/", 1)
        by_node.setdefault(name, []).append(int(number))
    return ", ".join(f"{name}/{_runs(numbers)} ({types[name]})" for name, numbers in by_node.items())


def _runs(numbers: Sequence[int]) -> str:
    runs: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][1] == number - 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)


def _used_text(members: Sequence[DevicePrediction]) -> str:
    used = sum(m.weights_bytes + m.kv_bytes + m.buffers_bytes for m in members)
    total = sum(m.memory_bytes for m in members)
    return f"{format_bytes(used)} of {format_bytes(total)} ({used / total:.0%})"


def _route_text(plan: Plan, number: int) -> str:
    route = plan.routes[number]
    parts: list[str] = []
    for hop in route.path:
        whole = plan.stage(hop.stage).layers == hop.layers
        parts.append(hop.stage if whole else f"{hop.stage}[{hop.layers[0]}, {hop.layers[1]})")
    share = route.weight / sum(r.weight for r in plan.routes)
    return f"route {number}: {' -> '.join(parts)}  ({share:.1%} of the requests)"


def _prediction_text(predicted: Prediction) -> str:
    lines = [
        f"predicted: {predicted.tokens_s:,.1f} tokens/s ({predicted.requests_s:.3g} requests/s), "
        f"TTFT {format_time(predicted.ttft_s)}, TPOT {format_time(predicted.tpot_s)}; "
        f"one request alone {predicted.single_tokens_s:,.1f} tokens/s",
        f"bottleneck: {predicted.bottleneck}",
    ]
    lines += slo_lines(predicted)
    if predicted.max_flow_tokens_s:
        lines.append(max_flow_text(predicted.max_flow_tokens_s, predicted.max_flow_bound_tokens_s))
    if predicted.upper_bound_tokens_s:
        lines.append(bound_text(predicted, predicted.upper_bound_tokens_s))
    if predicted.source:
        lines.append(f"figures: {predicted.source}")
    if predicted.price_usd_h:
        per_million = predicted.price_usd_h / 3600 / predicted.tokens_s * 1e6 if predicted.tokens_s else 0.0
        lines.append(f"price: {predicted.price_usd_h:.2f} USD/h, {per_million:.2f} USD per million output tokens")
    return "\n".join(lines)


def slo_lines(predicted: Prediction) -> list[str]:
    """What 99 % of the requests met in simulation; nothing where none was run."""
    lines: list[str] = []
    if predicted.slo_requests_s is not None:
        lines.append(f"carries {predicted.slo_requests_s:.3g} requests/s with 99 % within the limits (simulated)")
    if predicted.slo_attainment is not None:
        lines.append(f"at the workload's rate {predicted.slo_attainment:.1%} keep the limits (simulated)")
    return lines


def max_flow_text(flow_tokens_s: float, bound_tokens_s: float | None) -> str:
    """The figure that the objective ``maxflow`` maximises: prompts count too, KV room does not."""
    text = f"max-flow: {flow_tokens_s:,.1f} tokens/s, prompt and output together"
    if bound_tokens_s:
        gap = max(0.0, 1 - flow_tokens_s / bound_tokens_s)
        text += f", within {gap:.1%} of the best possible {bound_tokens_s:,.1f} (proven)"
    return text


def bound_text(predicted: Prediction, bound_tokens_s: float) -> str:
    """How far from the best possible, at most; for objectives that do not count tokens/s only the bound itself."""
    proven = f"no plan serves more than {bound_tokens_s:,.1f} tokens/s (proven)"
    if predicted.objective in ("latency", "cost", "maxflow"):
        return f"bound: {proven}"
    gap = max(0.0, 1 - predicted.tokens_s / bound_tokens_s)
    return f"within {gap:.1%} of the best possible: {proven}"
