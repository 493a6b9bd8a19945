"""Random prompt and output lengths, drawn from the distribution that the planner counts with."""

from __future__ import annotations

import numpy as np

from hexgen.scheduler.lengths import fit
from hexgen.scheduler.simulation.requests import Ints
from hexgen.workload import Lengths


def draw(lengths: Lengths, count: int, random: np.random.Generator, where: str = "lengths") -> Ints:
    """``count`` lengths in tokens, each at least 1 and at most ``lengths.max``."""
    found = fit(lengths, where)
    if found is None:
        return np.full(count, max(1, round(lengths.mean)), dtype=np.int64)
    inside = found.inside
    drawn = np.array([found.quantile(share, inside) for share in random.random(count).tolist()])
    rounded: Ints = np.maximum(1, np.rint(drawn)).astype(np.int64)
    return rounded
