"""The packing program over known columns: its relaxation with dual prices, and its whole-numbered solution.

    maximise  sum value[c] x[c]
    subject to
        sum over c of uses[c, t] x[c]  <=  sum over patterns p of class(t) of cuts[p, t] y[p]   for each type t
        sum over patterns of class k of y[p]  <=  nodes of class k   for each class k

`x[c]` counts pipelines, `y[p]` nodes that are cut into groups in way p. Solved by HiGHS through PuLP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hexgen.errors import HexgenError
from hexgen.scheduler.columns.classes import Classes
from hexgen.scheduler.programs import pulp_or_none, solved

_GAP = 2e-3  # of the whole-numbered program: below what the cost model can tell apart
_TREE_NODES = 1500


class SolverError(HexgenError):
    """The linear solver is not installed, or gave no answer."""


@dataclass(frozen=True, slots=True)
class Column:
    """One pipeline: groups of each type it uses, and tokens/s (or what the goal counts)."""

    uses: tuple[tuple[int, int], ...]  # (type, how many)
    value: float


@dataclass(frozen=True, slots=True)
class Relaxed:
    """The relaxation's value, and the prices of one group of each type and of one whole node of each class."""

    value: float
    prices: tuple[float, ...]
    node_prices: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Chosen:
    """Columns (index, how often), and how each class's nodes are cut (class, pattern, how many)."""

    columns: tuple[tuple[int, int], ...]
    cuts: tuple[tuple[int, int, int], ...]
    value: float


def relax(classes: Classes, columns: Sequence[Column], nodes: Sequence[int]) -> Relaxed:
    """The linear relaxation, with ``nodes`` of each class. Raises `SolverError`."""
    program = _program(classes, columns, nodes, "Continuous")
    _solve(program.problem, None)
    # HiGHS minimises the negated objective: the sign of a dual says only that.
    duals = {name: abs(row.pi or 0.0) * program.scale for name, row in program.problem.constraints.items()}
    return Relaxed(
        sum((v.value() or 0.0) * c.value for v, c in zip(program.x, columns, strict=True)),
        tuple(duals[f"type_{t}"] for t in range(len(classes.types))),
        tuple(duals[f"class_{k}"] for k in range(len(classes.nodes))),
    )


def choose(
    classes: Classes, columns: Sequence[Column], nodes: Sequence[int], seconds: float | None = None
) -> Chosen:
    """The best packing of these columns in whole numbers. Raises `SolverError`."""
    program = _program(classes, columns, nodes, "Integer")
    _solve(program.problem, seconds)
    picked = tuple((i, number) for i, v in enumerate(program.x) if (number := round(v.value() or 0.0)) > 0)
    cuts = tuple((k, p, number) for (k, p), v in program.y.items() if (number := round(v.value() or 0.0)) > 0)
    return Chosen(picked, cuts, sum(columns[i].value * number for i, number in picked))


@dataclass(frozen=True, slots=True)
class _Program:
    problem: Any  # PuLP's, which has no types
    x: list[Any]
    y: dict[tuple[int, int], Any]
    scale: float  # of the objective: solvers like numbers near one


def _program(classes: Classes, columns: Sequence[Column], nodes: Sequence[int], category: str) -> _Program:
    pulp = pulp_or_none()
    if pulp is None:
        raise SolverError("PuLP is not installed", remedy="pip install pulp highspy")
    problem = pulp.LpProblem("packing", pulp.LpMaximize)
    x = [pulp.LpVariable(f"x_{i}", 0, None, category) for i in range(len(columns))]
    y = {
        (k, p): pulp.LpVariable(f"y_{k}_{p}", 0, None, category)
        for k, node in enumerate(classes.nodes)
        for p in range(len(node.patterns))
        if nodes[k] > 0
    }
    scale = max((column.value for column in columns), default=1.0)
    problem += pulp.LpAffineExpression([(v, c.value / scale) for v, c in zip(x, columns, strict=True)])
    terms: list[list[tuple[Any, float]]] = [[] for _ in classes.types]
    for variable, column in zip(x, columns, strict=True):
        for kind, number in column.uses:
            terms[kind].append((variable, float(number)))
    for (k, p), variable in y.items():
        node = classes.nodes[k]
        for width, number in zip(node.widths, node.patterns[p], strict=True):
            if number:
                terms[classes.index[k, width]].append((variable, -float(number)))
    for t, row in enumerate(terms):
        problem += pulp.LpAffineExpression(row) <= 0, f"type_{t}"
    for k in range(len(classes.nodes)):
        cuts = [(variable, 1.0) for (kind, _), variable in y.items() if kind == k]
        problem += pulp.LpAffineExpression(cuts) <= nodes[k], f"class_{k}"
    return _Program(problem, x, y, scale)


def _solve(problem: Any, seconds: float | None) -> None:
    """Nodes of the search tree, not seconds, bound the work, so that the same input gives the same answer."""
    if not solved(problem, gapRel=_GAP, threads=1, timeLimit=seconds, mip_max_nodes=_TREE_NODES):
        raise SolverError("the solver HiGHS gave no answer", remedy="pip install highspy")
