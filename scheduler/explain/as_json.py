"""An explanation as plain values: every field by its name, and what follows from them where scripts want it."""

from __future__ import annotations

import dataclasses
from typing import Any

from hexgen.scheduler.explain.facts import Explanation


def explanation_to_dict(explanation: Explanation) -> dict[str, Any]:
    """Ready for JSON. Bytes, seconds and shares (0 to 1) as the names of the fields say."""
    value = dataclasses.asdict(explanation)
    for plain, use in zip(value["devices"], explanation.devices, strict=True):
        plain["time"]["busy"] = use.time.busy
    if explanation.what_if is not None:
        for plain, change in zip(value["what_if"]["changes"], explanation.what_if.changes, strict=True):
            plain["gain_per_usd_h"] = change.gain_per_usd_h
    return value
