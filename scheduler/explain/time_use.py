"""What each device does all the time: how much of a step is arithmetic, memory, links, software, or waiting.

A stage's step is a positively homogeneous function of the times of its parts (rooflines, sums, maxima): twice as
slow in everything is twice as long. By Euler's theorem its elasticities, what one per cent less speed of one part
costs, then add up to one, and are what the parts contribute. They are taken through the cost model's own door (a
changed device, a changed link), so that any source of figures is explained alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from hexgen.cluster import DeviceType, Link
from hexgen.scheduler.cost import GroupShape
from hexgen.scheduler.explain.facts import TimeUse
from hexgen.scheduler.explain.state import OpenPlan, busy_share
from hexgen.scheduler.pipeline import Part
from hexgen.scheduler.traffic import Mix
from hexgen.split import split_stage

_SLOWER = 1e-4  # relative: small enough that the slowest part stays the slowest
_HARDLY = 0.01  # share of the time that needs no reason


@dataclass(frozen=True, slots=True)
class _Shares:
    """Of one mean step of a stage, for one of its devices; they sum to 1 with what is left as software."""

    compute: float
    memory: float
    link: float
    software: float
    group: float
    measured: bool


def time_uses(opened: OpenPlan) -> dict[str, TimeUse]:
    """By device id, for every device that a stage of the plan holds."""
    known: dict[object, tuple[_Shares, ...]] = {}
    found: dict[str, TimeUse] = {}
    for stage in opened.plan.stages:
        places = opened.places[stage.name]
        if not places:
            idle = TimeUse(0, 0, 0, 0, 0, 1, 0, 0, "nothing: no route passes it", "")
            found.update(dict.fromkeys(stage.devices, idle))
            continue
        # Shared stages: as the route that gives it most to do sees it.
        number, index = max(places, key=lambda place: opened.rates[place[0]])
        part, mix = opened.routes[number].parts[index], opened.routes[number].full.mix
        key = (part.profile.shape, part.layers, part.embeds, part.samples, mix)
        if key not in known:
            known[key] = _shares(opened, part, mix)
        load, busy = opened.loads[stage.name], busy_share(opened, stage.name)
        decode = load.decode / (load.prefill + load.decode)
        waits = "" if 1 - busy < _HARDLY else _waits_for(opened, stage.name, number)
        for device, shares in zip(stage.devices, known[key], strict=True):
            found[device] = _use(shares, busy, decode, waits)
    return found


def _use(shares: _Shares, busy: float, decode: float, waits: str) -> TimeUse:
    parts = {
        "compute": shares.compute * busy,
        "memory bandwidth": shares.memory * busy,
        "links in its group": shares.link * busy,
        "software": shares.software * busy,
        "slower ones in its group": shares.group * busy,
        "waiting for others": 1 - busy,
    }
    limit = max(parts, key=lambda name: parts[name])
    if shares.measured and limit == "compute":
        limit = "its measured speed"
    compute, memory, link, software, group, idle = parts.values()
    return TimeUse(
        compute, memory, link, software, group, idle, busy * (1 - decode), busy * decode, limit, waits,
        shares.measured,
    )  # fmt: skip


def _shares(opened: OpenPlan, part: Part, mix: Mix) -> tuple[_Shares, ...]:
    shape = part.profile.shape
    if opened.measured:
        return (_Shares(1, 0, 0, 0, 0, True),) * shape.width

    def seconds(changed: GroupShape) -> float:
        profile = opened.cost.profile(changed)
        return mix.mean_s(lambda load: profile.step_s(part.layers, load, part.embeds, part.samples))

    base = seconds(shape)

    def costs(changed: GroupShape) -> float:
        return max(0.0, (seconds(changed) / base - 1) / _SLOWER)

    if base <= 0:
        return (_Shares(0, 0, 0, 1, 0, False),) * shape.width
    compute = costs(_with(shape, _fewer_flops))
    memory = costs(_with(shape, _less_bandwidth))
    link = costs(replace(shape, link=_slower_link(shape.link))) if shape.width > 1 else 0.0
    # At a tie between two parts both are needed to get faster: neither may count twice.
    scale = 1 / max(1.0, compute + memory + link)
    software = 1 - scale * (compute + memory + link)
    slices = split_stage(opened.model, shape.width, shape.shares)
    own: dict[object, tuple[float, float]] = {}
    result: list[_Shares] = []
    for rank, device in enumerate(shape.devices):
        key = (device, slices[rank])
        if key not in own:
            own[key] = (
                scale * min(compute, costs(_with(shape, _fewer_flops, rank))),
                scale * min(memory, costs(_with(shape, _less_bandwidth, rank))),
            )
        mine, read = own[key]
        group = scale * (compute + memory) - mine - read
        result.append(_Shares(mine, read, scale * link, software, group, False))
    return tuple(result)


def _with(shape: GroupShape, change: Callable[[DeviceType], DeviceType], rank: int | None = None) -> GroupShape:
    """The group with one device changed, or (None) every one."""
    return replace(
        shape,
        devices=tuple(change(d) if rank is None or i == rank else d for i, d in enumerate(shape.devices)),
    )


def _fewer_flops(device: DeviceType) -> DeviceType:
    slower = 1 + _SLOWER
    return replace(
        device,
        fp16_flops=device.fp16_flops / slower,
        bf16_flops=device.bf16_flops / slower,
        fp32_flops=device.fp32_flops / slower,
    )


def _less_bandwidth(device: DeviceType) -> DeviceType:
    return replace(device, bandwidth_bytes_s=device.bandwidth_bytes_s / (1 + _SLOWER))


def _slower_link(link: Link) -> Link:
    return Link(link.bandwidth_bytes_s / (1 + _SLOWER), link.latency_s * (1 + _SLOWER))


def _waits_for(opened: OpenPlan, stage: str, number: int) -> str:
    """What a stage that is not always busy waits for, on the route that gives it most to do."""
    route = opened.plan.routes[number]
    state = opened.routes[number].full
    slack = opened.rates[number] < state.requests_s * (1 - _HARDLY)
    if slack:
        return "other routes"
    if state.limit == "link":
        return f"the link from {route.path[state.index].stage} to {route.path[state.index + 1].stage}"
    slowest = route.path[state.index].stage
    if state.limit == "stage" and slowest != stage and max(state.busy_s) >= state.cycle_s * (1 - _HARDLY):
        return f"stage {slowest}"
    return "more requests at once"
