"""Lines on a light background, as SVG that differs only where figures do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes

# Okabe and Ito's palette: told apart also by the colour-blind.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")


@dataclass(frozen=True, slots=True)
class Line:
    label: str
    x: Sequence[float]
    y: Sequence[float]
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    title: str
    x: str
    y: str
    lines: Sequence[Line]
    log_x: bool = False
    log_y: bool = False
    level: float | None = None  # a horizontal line: a goal


def draw(path: Path, panels: Sequence[Panel], across: int = 2) -> Path:
    """The panels side by side, ``across`` in a row, in one file."""
    across = min(across, len(panels))
    down = -(-len(panels) // across)
    with pyplot.rc_context({"svg.hashsalt": "hexgen", "svg.fonttype": "path", "font.size": 9}):
        figure, axes = pyplot.subplots(
            down, across, figsize=(5.2 * across, 3.4 * down), squeeze=False, facecolor="white"
        )
        flat = [axis for row in axes for axis in row]
        for axis, panel in zip(flat, panels, strict=False):
            _fill(axis, panel)
        for axis in flat[len(panels) :]:
            axis.set_visible(False)
        figure.tight_layout()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", metadata={"Date": None})
        pyplot.close(figure)
    return path


def _fill(axis: Axes, panel: Panel) -> None:
    for i, line in enumerate(panel.lines):
        axis.plot(
            line.x,
            line.y,
            "--" if line.dashed else "-",
            marker="o",
            markersize=3,
            linewidth=1.5,
            color=COLOURS[i % len(COLOURS)],
            label=line.label,
        )
    if panel.level is not None:
        axis.axhline(panel.level, color="#bbbbbb", linewidth=1, zorder=0)
    axis.set_title(panel.title, fontsize=9)
    axis.set_xlabel(panel.x)
    axis.set_ylabel(panel.y)
    if panel.log_x:
        axis.set_xscale("log")
    if panel.log_y:
        axis.set_yscale("log")
    axis.grid(True, color="#eeeeee", zorder=0)
    axis.legend(fontsize=7, frameon=False)
