"""Set packing of pipelines by column generation: the exact engine, and the bound that proves a plan.

A column is one pipeline: how many groups of each type it uses, and what it serves. The master program packs
columns into the cluster (`master`), its dual prices say what a device is worth, and pricing (`pricing`) finds the
pipeline that is worth most for its devices, or proves that none is worth more than it costs: that is the bound.
"""

from __future__ import annotations

from hexgen.scheduler.columns.engine import Effort, Packed, pack
from hexgen.scheduler.columns.master import SolverError
from hexgen.scheduler.columns.merged import merged

__all__ = ["Effort", "Packed", "SolverError", "merged", "pack"]
