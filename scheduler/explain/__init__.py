"""What a plan does with each device, what bounds it, what would help: data first, views of it elsewhere."""

from hexgen.scheduler.explain.explain import explain
from hexgen.scheduler.explain.facts import (
    Bottleneck,
    Change,
    DeviceUse,
    EvenSplit,
    Explanation,
    LeftOut,
    LinkUse,
    MemoryUse,
    TimeUse,
    WhatIf,
)

__all__ = [
    "Bottleneck",
    "Change",
    "DeviceUse",
    "EvenSplit",
    "Explanation",
    "LeftOut",
    "LinkUse",
    "MemoryUse",
    "TimeUse",
    "WhatIf",
    "explain",
]
