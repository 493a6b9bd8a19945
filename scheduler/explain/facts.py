"""What an explanation says, as data: tables, JSON and pages are views of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ChangeKind = Literal["add node", "drop node", "drop device", "link", "memory"]


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Where a device's memory goes, in bytes; the parts sum to ``total_bytes``.

    ``kept_bytes``: left alone on purpose (CUDA context, fragmentation, the copy that attention gathers).
    ``stranded_bytes``: could be planned with, and is not; ``why`` says what keeps it, "" where next to nothing is.
    ``limited_by``: the device whose room is the smallest on the route, None where no memory is.
    """

    weights_bytes: int
    kv_bytes: int
    buffers_bytes: int
    kept_bytes: int
    stranded_bytes: int
    total_bytes: int
    layer_bytes: int  # one more layer, with the KV room that the others have
    limited_by: str | None
    why: str


@dataclass(frozen=True, slots=True)
class TimeUse:
    """Shares of the time, while the cluster serves all it can; the first six sum to 1.

    They are what a small slowdown of each part would cost (elasticities of the stage's step), so they add up.
    A CPU worker with a part of a core runs its software as much slower: there software counts as memory.
    ``prefill`` and ``decode`` divide the busy part otherwise. ``measured``: the figures come from a table that
    does not say what a step consists of; all of it is then in ``compute``.
    """

    compute: float
    memory: float
    link: float
    software: float
    group: float  # slower devices of its own tensor-parallel group
    idle: float
    prefill: float
    decode: float
    limit: str  # the largest of the six, in words
    waits_for: str  # what the idle time is spent on, "" where there is hardly any
    measured: bool = False

    @property
    def busy(self) -> float:
        return 1 - self.idle


@dataclass(frozen=True, slots=True)
class DeviceUse:
    device: str
    type: str
    stage: str
    routes: tuple[int, ...]
    layers: tuple[int, int]
    memory: MemoryUse
    time: TimeUse


@dataclass(frozen=True, slots=True)
class LinkUse:
    """One way between two nodes (or within one, between two stages), all edges of the plan over it together."""

    sender: str  # node
    receiver: str
    bandwidth_bytes_s: float
    latency_s: float
    bytes_s: float
    load: float  # share of the time that the busiest edge over it is busy
    edges: tuple[tuple[str, str], ...]  # stages


@dataclass(frozen=True, slots=True)
class Bottleneck:
    """What bounds the route that carries most. ``kind``: ``stage``, ``link``, ``round trip``."""

    route: int
    kind: str
    stages: tuple[str, ...]  # one for a stage, two for a link, all of them for a round trip
    nodes: tuple[str, ...]
    kv_bound: bool  # more KV room would let more requests run at once
    requests: int  # at once
    text: str


@dataclass(frozen=True, slots=True)
class EvenSplit:
    """The same stages in the same order, but divided evenly. ``value`` None: there is none, ``reason`` why."""

    name: str
    value: float | None  # in ``Explanation.metric``
    lost: float | None  # share of the plan's value
    reason: str = ""


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Equal nodes that the plan leaves unused, and what it would cost to force them in.

    ``forced_gain``: relative (usually negative), with the groups that the plan has; None where they cannot be
    forced in. ``reason``: why not, or what else forbids it (the budget).
    """

    nodes: tuple[str, ...]
    devices: tuple[str, ...]
    type: str
    forced_value: float | None
    forced_gain: float | None
    price_usd_h: float | None  # of these nodes, where the whole of each is unused
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Change:
    """One change to the cluster and what the plan for it would serve, in ``Explanation.metric``."""

    kind: ChangeKind
    text: str
    nodes: tuple[str, ...]  # that it is about
    value: float | None  # None: nothing fits any more
    gain: float | None  # relative to ``WhatIf.value``
    price_usd_h: float | None = None  # what it adds (negative: saves); None where it has no price
    alike: int = 1  # nodes (or links) that are the same

    @property
    def gain_per_usd_h(self) -> float | None:
        if self.gain is None or not self.price_usd_h or self.price_usd_h < 0:
            return None
        return self.gain / self.price_usd_h


@dataclass(frozen=True, slots=True)
class WhatIf:
    """Changes, the largest gain first. ``untried``: what the time did not suffice for."""

    value: float  # of the cluster as it is, by the same quick search
    changes: tuple[Change, ...]
    untried: tuple[str, ...] = ()
    missed: float = 0.0  # by how much that quick search beat the explained plan (relative); 0 where it did not


@dataclass(frozen=True, slots=True)
class Explanation:
    """``metric`` names what every ``value`` counts: tokens/s, tokens/s of one request alone, tokens a dollar."""

    objective: str
    metric: str
    value: float
    devices: tuple[DeviceUse, ...]
    links: tuple[LinkUse, ...]
    bottleneck: Bottleneck
    even: tuple[EvenSplit, ...]
    left_out: tuple[LeftOut, ...]
    what_if: WhatIf | None = None
