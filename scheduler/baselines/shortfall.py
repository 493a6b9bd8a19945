"""Why a plan serves no more, in one sentence computed from its prediction.

Every device's memory bandwidth is what decode lives on. What of it is lost, and to what: to devices that hold
nothing; to devices that wait (for a slower stage, for links); and, of the time that devices do work, to steps too
small for what each costs anyway: it reads all weights, however few sequences the room for keys and values lets in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hexgen.cluster import Device
from hexgen.plan import Plan, Prediction
from hexgen.scheduler.evaluate import stranded_bytes
from hexgen.scheduler.figures import figures_of
from hexgen.scheduler.task import Task
from hexgen.units import format_bytes

_WORTH_SAYING = 0.05  # of the cluster's bandwidth
_SAID = 2  # causes, the largest first
_BUSY = 0.95  # a stage that works so much of the time is what the others wait for
_TYPES = 3  # named at most


@dataclass(frozen=True, slots=True)
class Loss:
    """A share of the cluster's memory bandwidth, and what it is lost to."""

    share: float
    text: str


def shortfall(task: Task, plan: Plan) -> str:
    """The largest causes first; empty where the plan has no prediction."""
    told = sorted(losses(task, plan), key=lambda loss: -loss.share)
    said = [loss.text for loss in told if loss.share >= _WORTH_SAYING][:_SAID] or [loss.text for loss in told[:1]]
    return "; ".join(said)


def losses(task: Task, plan: Plan) -> tuple[Loss, ...]:
    """What the cluster's bandwidth is lost to; at most all of it together."""
    predicted = plan.predicted
    if predicted is None:
        return ()
    devices = {device.id: device for device in task.cluster.devices()}
    weight = {name: _bandwidth(device) for name, device in devices.items()}
    total = sum(weight.values())
    used = {device for stage in plan.stages for device in stage.devices}
    found: list[Loss] = []
    unused = [name for name in devices if name not in used]
    if unused:
        text = f"uses {len(used)} of {len(devices)} devices: {_kinds(devices, unused)} stay idle"
        found.append(Loss(sum(weight[name] for name in unused) / total, text))
    busy = {s.stage: s.utilisation for s in predicted.stages}
    waits = {d: 1 - busy[stage.name] for stage in plan.stages for d in stage.devices}
    lost = sum(weight[d] * wait for d, wait in waits.items()) / total
    if lost > 0:
        found.append(Loss(lost, _waiting(task, plan, predicted, devices, weight, waits)))
    worked = sum(weight[d] * (1 - wait) for d, wait in waits.items()) / total
    found.append(Loss(max(0.0, worked - _reached(predicted)), _small_steps(plan, predicted)))
    return tuple(found)


def _bandwidth(device: Device) -> float:
    return device.type.bandwidth_bytes_s * figures_of(device.type).bandwidth_share


def _reached(predicted: Prediction) -> float:
    bound = predicted.upper_bound_tokens_s
    return min(1.0, predicted.tokens_s / bound) if bound else 0.0


def _kinds(devices: Mapping[str, Device], names: Sequence[str]) -> str:
    counts = Counter(devices[name].type.name for name in names).most_common()
    text = ", ".join(f"{count} {name}" for name, count in counts[:_TYPES])
    return text + (", ..." if len(counts) > _TYPES else "")


def _waiting(
    task: Task,
    plan: Plan,
    predicted: Prediction,
    devices: Mapping[str, Device],
    weight: Mapping[str, float],
    waits: Mapping[str, float],
) -> str:
    """Which type loses most by waiting, and for what: the busiest stage, or no stage at all."""
    members: dict[str, list[str]] = {}
    for d in waits:
        members.setdefault(devices[d].type.name, []).append(d)
    worst = max(members, key=lambda name: (sum(weight[d] * waits[d] for d in members[name]), name))
    mean = sum(waits[d] for d in members[worst]) / len(members[worst])
    text = f"the {len(members[worst])} {worst} wait {mean:.0%} of the time"
    top = max(predicted.stages, key=lambda stage: stage.utilisation)
    if top.utilisation < _BUSY:
        return f"{text}: no stage is ever busier than {top.utilisation:.0%}, {_beside_stages(predicted)}"
    stage = plan.stage(top.stage)
    layers = stage.layers[1] - stage.layers[0]
    held = f"{layers} of {task.model.layers} layers on {_kinds(devices, stage.devices)}"
    return f"{text} for stage {stage.name} ({held})"


def _stages(count: int) -> str:
    return "1 stage" if count == 1 else f"{count} stages"


def _beside_stages(predicted: Prediction) -> str:
    """What binds a plan in which every stage has time left."""
    text = predicted.bottleneck.split(";")[0].split(": ", 1)[-1]
    if text.startswith("stage "):
        few = round(predicted.requests_s * predicted.latency_s) < len(predicted.stages)
        return "too few requests fit at once" if few else "since routes that share stages wait for each other"
    return f"since {text} binds"


def _small_steps(plan: Plan, predicted: Prediction) -> str:
    """Sequences at once by Little's law, and the memory that could have held more of them."""
    running = max(1, round(predicted.requests_s * predicted.latency_s))
    each = max(1, round(running / len(plan.stages)))
    routes = "1 route takes" if len(plan.routes) == 1 else f"{len(plan.routes)} routes take"
    full = running >= 0.9 * plan.engine.max_sequences * len(plan.routes)
    text = f"{running} requests at once, the most that {routes}" if full else f"KV room for {running} requests"
    text += f": steps of about {each} on {_stages(len(plan.stages))}, each reading all weights"
    stranded = sum(stranded_bytes(device) for device in predicted.devices)
    memory = sum(device.memory_bytes for device in predicted.devices)
    if memory and stranded > 0.2 * memory:
        text += f"; {format_bytes(stranded)} of {format_bytes(memory)} are stranded"
    return text
