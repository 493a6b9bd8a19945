"""How much of everything a run takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
SPECS = ROOT / "cluster_specs"


@dataclass(frozen=True, slots=True)
class Settings:
    """``quick`` runs show that everything works; their figures mean little."""

    quick: bool = False
    seconds: float = 60.0  # for our plan
    baseline_seconds: float = 10.0  # for each baseline that searches
    seeds: int = 2  # of simulations; figures are means over them
    lives: float = 8.0  # of a request, that a saturated simulation lasts
    jobs: int = 1  # processes

    @classmethod
    def of_quick(cls, jobs: int = 1) -> Settings:
        return cls(quick=True, seconds=2.0, baseline_seconds=1.0, seeds=1, lives=4.0, jobs=jobs)
