"""Where each device's memory goes, and what keeps the rest from being used."""

from __future__ import annotations

from hexgen.memory import GPU_GATHER_LAYERS, rank_kv_bytes_per_token, rank_weights_bytes, usable_bytes
from hexgen.plan import DevicePrediction
from hexgen.scheduler.explain.facts import MemoryUse
from hexgen.scheduler.explain.state import OpenPlan, busy_share
from hexgen.split import RankSlice, split_stage
from hexgen.units import format_bytes

_ALWAYS_BUSY = 0.97
_WORTH_NAMING = 0.02  # of the memory: less than this stranded needs no reason


def memory_uses(opened: OpenPlan) -> dict[str, MemoryUse]:
    """By device id, for every device that a stage of the plan holds."""
    ranks = _ranks(opened)
    spare_tokens = {device: rank.spare_tokens for device, rank in ranks.items()}
    return {device: _use(opened, device, rank, spare_tokens) for device, rank in ranks.items()}


class _Rank:
    """One device's part of its stage, in bytes."""

    __slots__ = ("held", "kept", "layer", "per_token", "spare_tokens", "stage", "stranded")

    def __init__(self, opened: OpenPlan, held: DevicePrediction, stage: str, part: RankSlice) -> None:
        device = opened.devices[held.device].type
        dtype, model = opened.memory.dtype, opened.model
        token = rank_kv_bytes_per_token(model, dtype, 1, part)
        extra = 0 if device.kind == "cpu" else GPU_GATHER_LAYERS
        places = opened.places[stage]
        tokens = [opened.memory.kv_tokens[number] for number, _ in places]
        hops = [opened.plan.routes[number].path[index] for number, index in places]
        self.stage, self.held = stage, held
        usable = usable_bytes(device)
        used = held.weights_bytes + held.kv_bytes + held.buffers_bytes
        gather = min(sum(tokens) * token * extra, max(0, usable - used))
        self.kept = held.memory_bytes - usable + gather
        self.stranded = held.memory_bytes - used - self.kept
        # One token more on every route that passes.
        self.per_token = sum(token * (hop.layers[1] - hop.layers[0] + extra) for hop in hops)
        self.spare_tokens = self.stranded / self.per_token if self.per_token else float("inf")
        one = rank_weights_bytes(model, dtype, 1, part, False, False)
        none = rank_weights_bytes(model, dtype, 0, part, False, False)
        self.layer = one - none + token * max(tokens, default=0)


def _ranks(opened: OpenPlan) -> dict[str, _Rank]:
    held = {device.device: device for device in opened.memory.devices}
    return {
        device: _Rank(opened, held[device], stage.name, part)
        for stage in opened.plan.stages
        for device, part in zip(stage.devices, split_stage(opened.model, stage.width, stage.shares), strict=True)
    }


def _use(opened: OpenPlan, device: str, rank: _Rank, spare_tokens: dict[str, float]) -> MemoryUse:
    full = _fullest(opened, rank.stage, spare_tokens)
    return MemoryUse(
        weights_bytes=rank.held.weights_bytes,
        kv_bytes=rank.held.kv_bytes,
        buffers_bytes=rank.held.buffers_bytes,
        kept_bytes=rank.kept,
        stranded_bytes=rank.stranded,
        total_bytes=rank.held.memory_bytes,
        layer_bytes=rank.layer,
        limited_by=full,
        why=_why(opened, device, rank, full),
    )


def _fullest(opened: OpenPlan, stage: str, spare_tokens: dict[str, float]) -> str | None:
    """The device without room for another page on the routes through ``stage``; None where there is none."""
    page = opened.plan.engine.page_size
    names = dict.fromkeys(
        hop.stage for number, _ in opened.places[stage] for hop in opened.plan.routes[number].path
    )
    devices = [device for name in names for device in opened.stages[name].devices]
    fullest = min(devices, key=lambda device: spare_tokens[device], default=None)
    return fullest if fullest is not None and spare_tokens[fullest] < page else None


def _why(opened: OpenPlan, device: str, rank: _Rank, full: str | None) -> str:
    if rank.stranded < _WORTH_NAMING * rank.held.memory_bytes:
        return ""
    if not opened.places[rank.stage]:
        return "no route passes its stage"
    if full is None:
        reason = "every request that may run at once has its KV room"
    elif full == device:
        reason = "another stage shares the room of its routes"
    elif full in opened.stages[rank.stage].devices:
        reason = f"{full} of the same group is full, and all hold the same requests"
    else:
        holder = next(name for name, stage in opened.stages.items() if full in stage.devices)
        reason = f"stage {holder} ({full}) has no more KV room, and every stage of a route holds the same requests"
    size = format_bytes(rank.layer)
    if rank.layer > rank.stranded:
        return f"{reason}; another layer with its KV takes {size}"
    busy = ", but the stage is always busy" if busy_share(opened, rank.stage) > _ALWAYS_BUSY else ""
    return f"{reason}; another layer ({size}) would fit{busy}"
