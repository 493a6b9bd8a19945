"""The smallest changes that make a model fit: each is found by asking, size after size, whether anything fits.

A link where there is none; more devices of a kind that is there; another dtype; smaller steps; shorter requests.
What fits with a change also fits with a larger one, so bisection finds the smallest.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from hexgen.cluster import Cluster, Link, Node
from hexgen.memory import plan_dtype, usable_bytes
from hexgen.model import DTYPE_BYTES, DType, ModelSpec
from hexgen.plan import EngineOptions
from hexgen.scheduler.fits import fits
from hexgen.scheduler.link_entries import LinkEntry, dead_entries, entry_text, with_link
from hexgen.scheduler.tables.source import CostTable
from hexgen.scheduler.traffic import Traffic
from hexgen.units import format_bytes

MOST_DEVICES = 1024  # added: beyond, it is another cluster
_GRAIN = 16  # tokens of a step: what the budget is lowered in
_LEAST_BUDGET = 16
_LINKS_TRIED, _LINKS_NAMED = 12, 4
_SOME_LINK = Link(1e9 / 8, 1e-3)  # any will do where the question is what fits


@dataclass(frozen=True, slots=True)
class Change:
    """What to change, by how much, and what is then planned for: with it the model fits, with less it does not."""

    kind: Literal["link", "devices", "dtype", "token_budget", "max_sequences", "request_tokens"]
    amount: int  # devices added, or the new value; 0 for a link and for the dtype
    text: str
    cluster: Cluster
    options: EngineOptions
    traffic: Traffic


@dataclass(frozen=True, slots=True)
class Asked:
    """What does not fit."""

    cluster: Cluster
    model: ModelSpec
    options: EngineOptions
    traffic: Traffic
    cost_table: CostTable | None = None

    def fits(
        self,
        cluster: Cluster | None = None,
        options: EngineOptions | None = None,
        traffic: Traffic | None = None,
    ) -> bool:
        new = options or self.options
        load = dataclasses.replace(
            traffic or self.traffic, token_budget=new.token_budget, max_sequences=new.max_sequences
        )
        return fits(cluster or self.cluster, self.model, new, load, self.cost_table)


def smallest_changes(asked: Asked) -> list[Change]:
    """One of each kind that helps: links, devices, dtype, step, requests. Empty where none does."""
    found = [_link(asked), _devices(asked), _dtype(asked)]
    found += [_option(asked, "token_budget"), _option(asked, "max_sequences"), _requests(asked)]
    return [change for change in found if change is not None]


def with_more(cluster: Cluster, like: Node, count: int) -> Cluster:
    """The cluster with ``count`` more nodes of one device each, in the place of ``like``."""
    names = {node.name for node in cluster.nodes}
    free = (name for i in range(1, count + len(names) + 1) if (name := f"added-{i}") not in names)
    added = [dataclasses.replace(like, name=next(free), count=1, address=None, labels=()) for _ in range(count)]
    return dataclasses.replace(cluster, nodes=(*cluster.nodes, *added))


def _link(asked: Asked) -> Change | None:
    """One missing link that is enough; else all of them together, where those are."""
    dead = list(islice(dead_entries(asked.cluster), _LINKS_TRIED))
    for entries in [[entry] for entry in dead] + ([dead] if len(dead) > 1 else []):
        joined = asked.cluster
        for entry in entries:
            joined = with_link(joined, entry, _SOME_LINK)
        if asked.fits(joined):
            text = f"give {_links_text(entries)} a bandwidth"
            return Change("link", 0, text, joined, asked.options, asked.traffic)
    return None


def _links_text(entries: Sequence[LinkEntry]) -> str:
    """``the link between ice-1 and ice-2``; the default's line is named as it is in the file."""
    if entries[0] == ("default",) and len(entries) == 1:
        return "links: default"
    named = ", ".join(entry_text(entry) for entry in entries[:_LINKS_NAMED])
    more = f" and {len(entries) - _LINKS_NAMED} more" if len(entries) > _LINKS_NAMED else ""
    return f"{'the link' if len(entries) == 1 else 'the links'} {named}{more}"


def _devices(asked: Asked) -> Change | None:
    """The kind of device of which fewest are needed; of equals, the cheapest."""
    kinds = {(node.device, node.region): node for node in asked.cluster.nodes}
    best: tuple[int, float, Node] | None = None
    for like in kinds.values():
        limit = MOST_DEVICES if best is None else best[0]
        count = _fewest(asked, like, limit)
        if count is not None:
            price = count * (like.price_usd_h or 0.0) / like.count
            if best is None or (count, price) < best[:2]:
                best = (count, price, like)
    if best is None:
        return None
    count, _, like = best
    where = f" in {like.region}" if like.region and len({n.region for n in asked.cluster.nodes}) > 1 else ""
    noun = "device" if count == 1 else "devices"
    text = f"add {count} more {noun} of type {like.device.name} ({format_bytes(like.device.memory_bytes)}){where}"
    return Change("devices", count, text, with_more(asked.cluster, like, count), asked.options, asked.traffic)


def _fewest(asked: Asked, like: Node, limit: int) -> int | None:
    """How many more devices like these are enough; None where ``limit`` are not."""
    least = max(1, math.ceil(_missing_bytes(asked, like) / max(1, usable_bytes(like.device))))

    def enough(count: int) -> bool:
        return asked.fits(with_more(asked.cluster, like, count))

    short, high = least - 1, least
    while high <= limit and not enough(high):
        short, high = high, max(high + 1, math.ceil(high * 1.5))
    if high > limit:
        if short >= limit or not enough(limit):
            return None
        high = limit
    while high - short > 1:
        middle = (short + high) // 2
        short, high = (short, middle) if enough(middle) else (middle, high)
    return high


def _missing_bytes(asked: Asked, like: Node) -> int:
    """Of the weights and one request, what all devices together cannot hold, in the smallest dtype that may be."""
    devices = [node.device for node in asked.cluster.nodes for _ in range(node.count)]
    gpus = [device for device in devices if device.kind != "cpu"]
    dtypes = [plan_dtype(asked.options, asked.model, [*part, like.device]) for part in (devices, gpus)]
    need = min(
        asked.model.parameters * DTYPE_BYTES[dtype]
        + asked.model.kv_bytes_per_token(dtype) * asked.traffic.peak_tokens
        for dtype in dtypes
    )
    return max(0, need - sum(max(0, usable_bytes(device)) for device in devices))


def _dtype(asked: Asked) -> Change | None:
    devices = [node.device for node in asked.cluster.nodes]
    if plan_dtype(asked.options, asked.model, devices) != "float32":
        return None
    for dtype in _HALF:
        options = dataclasses.replace(asked.options, dtype=dtype)
        if asked.fits(options=options):
            text = f"compute in {dtype} (the engine's option dtype)"
            return Change("dtype", 0, text, asked.cluster, options, asked.traffic)
    return None


_HALF: tuple[DType, ...] = ("bfloat16", "float16")


def _option(asked: Asked, name: Literal["token_budget", "max_sequences"]) -> Change | None:
    """The largest value that fits: buffers of activations or of logits were what was too much."""
    grain, least = (_GRAIN, _LEAST_BUDGET) if name == "token_budget" else (1, 1)
    now = asked.options.token_budget if name == "token_budget" else asked.options.max_sequences

    def with_value(value: int) -> EngineOptions:
        if name == "token_budget":
            return dataclasses.replace(asked.options, token_budget=value)
        return dataclasses.replace(asked.options, max_sequences=value)

    value = _largest((now - 1) // grain, least // grain, lambda n: asked.fits(options=with_value(n * grain)))
    if value is None:
        return None
    options = with_value(value * grain)
    return Change(name, value * grain, f"lower {name} to {value * grain}", asked.cluster, options, asked.traffic)


def _requests(asked: Asked) -> Change | None:
    """The longest requests of the same proportions that fit, by prompt and answer together."""
    total = asked.traffic.prompt + asked.traffic.output

    def shorter(tokens: int) -> Traffic:
        scale = tokens / total
        return dataclasses.replace(
            asked.traffic, prompt=max(1.0, asked.traffic.prompt * scale), output=asked.traffic.output * scale
        )

    tokens = _largest(math.ceil(total) - 1, 2, lambda n: asked.fits(traffic=shorter(n)))
    if tokens is None:
        return None
    text = f"plan for requests of at most {tokens} tokens, prompt and answer together"
    return Change("request_tokens", tokens, text, asked.cluster, asked.options, shorter(tokens))


def _largest(most: int, least: int, good: Callable[[int], bool]) -> int | None:
    """The largest good number in ``least..most``, where all below a good one are good; None where none is."""
    if most < least or not good(least):
        return None
    low, high = least, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if good(middle) else (low, middle)
    return low
