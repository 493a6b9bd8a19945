"""A plan as a chart: layers across, devices down, who holds what on which route, and how busy it is.

matplotlib is an extra (``hexgen-engine[plot]``) and is imported only when a chart is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hexgen.cluster import Cluster
from hexgen.errors import SpecError
from hexgen.plan import Plan
from hexgen.scheduler.picture.style import ROUTE_COLOURS
from hexgen.scheduler.picture.view import StageView, View, view_of

SUFFIXES = (".png", ".svg")
_ROW_IN = 0.26  # inches of one row
_DPI = 120
_IDLE_ALPHA = 0.18  # of the part of a bar that stands for idle time
_BAR = 0.78  # of a row
_ROUTES_NAMED = 12
_MOST_ROWS = 400  # a PNG of more would not open


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the chart: a stage on a node (or on several that are alike)."""

    label: str
    layers: tuple[int, int]
    route: int | None  # None: on no route
    busy: float
    text: str


def check_plot(path: str | Path) -> None:
    """Before minutes are spent on a plan. Raises ``SpecError`` for another suffix, and without matplotlib."""
    if Path(path).suffix.lower() not in SUFFIXES:
        raise SpecError(
            "is neither a .png nor a .svg file", where=str(path), remedy="name it plan.png or plan.svg"
        )
    _matplotlib()


def write_plot(path: str | Path, plan: Plan, cluster: Cluster) -> None:
    """Raises ``SpecError`` for another suffix, without matplotlib, or where the file cannot be written."""
    check_plot(path)
    figure = draw(plan, cluster)
    try:
        figure.savefig(path, dpi=_DPI)
    except OSError as error:
        raise SpecError(f"cannot be written: {error.strerror}", where=str(path)) from error


def rows_of(plan: Plan, view: View) -> list[Row]:
    """Top to bottom: route by route in the order of their paths; unused nodes last."""
    predicted = plan.predicted
    busy = {stage.stage: stage.utilisation for stage in predicted.stages} if predicted else {}
    found: list[tuple[tuple[int, int], Row]] = []
    seen: set[tuple[object, object]] = set()
    for node in view.nodes:
        alike = f" ×{len(node.names)}" if len(node.names) > 1 else ""
        for stage in node.stages:
            if (node.key, stage.key) in seen:  # several equal stages on equal nodes: once
                continue
            seen.add((node.key, stage.key))
            label = f"{_runs(stage)}{alike}  {node.node.device.name}"
            route = stage.routes[0] if stage.routes else None
            share = busy.get(stage.name, 0.0)
            row = Row(label, stage.layers, route, share, f"{stage.name}  {share:.0%}")
            found.append(((len(view.routes) if route is None else route, stage.layers[0]), row))
        if node.unused:
            label = f"{node.node.name}{alike}  {node.node.device.name}"
            row = Row(label, (0, 0), None, 0.0, f"unused: {len(node.unused)} of {node.node.count}")
            found.append(((len(view.routes) + 1, 0), row))
    return [row for _, row in sorted(found, key=lambda entry: entry[0])]


def draw(plan: Plan, cluster: Cluster) -> Any:
    """The chart as a matplotlib figure. Raises ``SpecError`` without matplotlib."""
    figure_type = _matplotlib()
    view = view_of(plan, cluster)
    rows = rows_of(plan, view)
    shown = rows[:_MOST_ROWS]
    layers = max((row.layers[1] for row in shown), default=1)
    figure = figure_type(figsize=(12, max(2.6, 1.5 + _ROW_IN * len(shown))), layout="constrained")
    axes = figure.add_subplot()
    _bars(axes, shown)
    axes.set_yticks(range(len(shown)), [_plain(row.label) for row in shown], fontsize=8)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlim(0, layers)
    axes.set_xlabel("layer")
    axes.set_title(_plain(_title(plan, cluster, len(rows) - len(shown))), fontsize=11, loc="left")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    _legend(figure, view)
    return figure


def _bars(axes: Any, rows: Sequence[Row]) -> None:
    for y, row in enumerate(rows):
        start, end = row.layers
        colour = "#8a8f98" if row.route is None else ROUTE_COLOURS[row.route % len(ROUTE_COLOURS)]
        if end > start:
            axes.barh(y, end - start, left=start, height=_BAR, color=colour, alpha=_IDLE_ALPHA)
            below = y + (1 - row.busy) * _BAR / 2  # rows count downwards: the full part stands at the bottom
            axes.barh(below, end - start, left=start, height=_BAR * row.busy, color=colour)
        axes.text(end + 0.4, y, _plain(row.text), va="center", fontsize=7, color="#555555")


def _legend(figure: Any, view: View) -> None:
    from matplotlib.patches import Patch

    handles = [
        Patch(color=ROUTE_COLOURS[i % len(ROUTE_COLOURS)], label=_plain(f"{route.title} ({route.share:.1%})"))
        for i, route in enumerate(view.routes[:_ROUTES_NAMED])
    ]
    figure.legend(handles=handles, fontsize=8, loc="outside lower center", ncols=4, frameon=False)


def _title(plan: Plan, cluster: Cluster, hidden: int) -> str:
    text = f"{plan.model} on {cluster.name}"
    if plan.predicted is not None:
        text += f": {plan.predicted.tokens_s:,.0f} tokens/s"
    text += "; filled: share of the time busy"
    return text + (f"; {hidden} more rows" if hidden else "")


def _runs(stage: StageView) -> str:
    """``ice-1/0-3``."""
    name = stage.devices[0].rsplit("/", 1)[0]
    numbers = [int(device.rsplit("/", 1)[1]) for device in stage.devices]
    whole = numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    if len(numbers) == 1:
        return stage.devices[0]
    return f"{name}/{numbers[0]}-{numbers[-1]}" if whole else f"{name}/{','.join(map(str, numbers))}"


def _plain(text: str) -> str:
    """matplotlib takes what stands between dollar signs for mathematics."""
    return text.replace("$", r"\$")


def _matplotlib() -> Any:
    """The type of figures: without pyplot, so that no screen and no global state is needed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SpecError(
            "a picture needs matplotlib, which is not installed",
            where="--plot",
            remedy="pip install 'hexgen-engine[plot]', or use --html",
        ) from error
    return Figure
