"""Tables as people read them: on a terminal, in Markdown between markers, and as JSON."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hexgen.errors import SpecError


@dataclass(frozen=True, slots=True)
class Grid:
    """One table. Cells are text already."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def shown(self) -> Table:
        table = Table(title=self.title, title_justify="left")
        for i, head in enumerate(self.heads):
            table.add_column(head, justify="left" if i == 0 else "right")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        lines = [f"**{self.title}**", "", _line(self.heads), _line(["---"] + ["---:"] * (len(self.heads) - 1))]
        return "\n".join([*lines, *(_line(row) for row in self.rows)])


@dataclass(frozen=True, slots=True)
class Report:
    """What one section found. ``findings``: sentences computed from the figures, goals missed among them."""

    name: str
    grids: tuple[Grid, ...]
    findings: tuple[str, ...]
    figures: Mapping[str, Any]  # everything behind the tables, as JSON
    plots: tuple[Path, ...] = field(default=())

    def show(self, console: Console) -> None:
        for grid in self.grids:
            console.print(grid.shown())
        for finding in self.findings:
            console.print(f"- {finding}", highlight=False, soft_wrap=True)

    def markdown(self, docs: Path, stamp: str) -> str:
        """``stamp``: the command and the date."""
        parts = [stamp, *(grid.markdown() for grid in self.grids)]
        if self.findings:
            parts.append("\n".join(f"- {finding}" for finding in self.findings))
        parts += [f"![{plot.stem}]({plot.relative_to(docs.parent).as_posix()})" for plot in self.plots]
        return "\n\n".join(parts)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def rewrite(path: Path, name: str, text: str) -> None:
    """Replace what stands between ``<!-- name -->`` and ``<!-- /name -->``. Raises ``SpecError``."""
    old = path.read_text(encoding="utf-8")
    pattern = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- /{re.escape(name)} -->)", re.DOTALL)
    if not pattern.search(old):
        raise SpecError(f"has no place for the section {name}", where=str(path), remedy=f"add <!-- {name} -->")
    new = pattern.sub(lambda match: f"{match[1]}{text}\n{match[2]}", old)
    path.write_text(new, encoding="utf-8")


def write_json(path: Path, reports: Sequence[Report], about: Mapping[str, Any]) -> None:
    """One object: what was run, and each section's figures by name. What is not finite is null."""
    told = {"about": dict(about), "sections": {r.name: dict(r.figures) for r in reports}}
    path.write_text(json.dumps(_finite(told), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- cells -----------------------------------------------------------------------------------------------------


def number(value: float | None, digits: int = 0) -> str:
    if value is None or math.isnan(value):
        return "-"
    return "inf" if math.isinf(value) else f"{value:,.{digits}f}"


def ratio(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.2f}"


def share(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.1%}"


def over(a: float | None, b: float | None) -> float | None:
    """``a / b``; None where either is missing or ``b`` is zero."""
    return None if a is None or not b else a / b
