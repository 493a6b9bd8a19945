"""Helix's placement as a mixed-integer program (Mei et al., ASPLOS'25, section 4.4), solved by HiGHS through PuLP.

For machine i: ``s_i`` its first layer, ``b_ik`` whether it holds k layers, so it ends at ``s_i + sum k b_ik``;
for a link: its flow ``f_ij`` and whether it is open, ``d_ij``, which needs ``s_j <= end_i < end_j`` (a machine may
use a part of its layers). Flow is kept at every machine, bounded by its throughput with k layers and by the links;
the flow out of the source is maximised. As in the paper: slow links are left out, a heuristic's placement starts
the search, and no solution exceeds the sum of all machines' layer-tokens/s over the layers, which ends it early.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from hexgen.scheduler.baselines.placement import Machines, Range, max_flow

_LINKS = 12  # that a machine keeps towards others; the paper prunes by the same degree
_SAME = 1e-6
_ROUNDING = 1e-12  # equality is common: a chain whose machines all carry the same flow


@dataclass(frozen=True, slots=True)
class Placement:
    """What was found within the time."""

    ranges: tuple[Range, ...]
    tokens_s: float  # its maximum flow
    bound_tokens_s: float  # no placement over the links that were kept lets more through
    proven: bool
    failed: str = ""  # the solver's complaint, where the placement is only the one given to start from


def compute_bound(machines: Machines) -> float:
    """Tokens/s R if links cost nothing: of n layers a machine does at most n min(rate(n), R), and all do L R.

    The paper ends its search early by the same sum, without the minimum (section 4.5).
    """
    classes: dict[tuple[float, ...], int] = {}
    for i in range(len(machines.groups)):
        most = machines.most_layers(i, False, False)
        rates = tuple(machines.tokens_s(i, n) for n in range(1, most + 1))
        classes[rates] = classes.get(rates, 0) + 1

    def done(tokens_s: float) -> float:
        each = ((count, enumerate(rates, start=1)) for rates, count in classes.items())
        return sum(count * max((n * min(r, tokens_s) for n, r in pairs), default=0.0) for count, pairs in each)

    low, high = 0.0, done(float("inf")) / machines.layers
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if done(middle) >= machines.layers * middle * (1 - _ROUNDING) else (low, middle)
    return high


def best_ranges(machines: Machines, start: Sequence[Range], seconds: float | None) -> Placement:
    """The placement with the largest flow that is found in ``seconds`` (None: until it is proven), from ``start``.

    Without a solver, or where it fails, ``start`` itself.
    """
    value = max_flow(machines, start).tokens_s
    bound = compute_bound(machines)
    if value >= bound * (1 - _SAME):
        return Placement(tuple(start), value, bound, proven=True)
    try:
        import pulp
    except ImportError:
        return Placement(tuple(start), value, bound, False, "PuLP is not installed")
    try:
        return _solved(pulp, machines, tuple(start), seconds)
    except pulp.PulpError as error:
        return Placement(tuple(start), value, bound, False, f"the solver failed: {error}")


def _solved(pulp: Any, machines: Machines, start: tuple[Range, ...], seconds: float | None) -> Placement:
    began = time.monotonic()
    program = _Program(pulp, machines)
    program.start_from(start)
    left = None if seconds is None else max(0.1, seconds - (time.monotonic() - began))
    bound, optimal = program.solve(left)
    found = program.ranges()
    value, before = max_flow(machines, found).tokens_s, max_flow(machines, start).tokens_s
    if value < before:  # no solution, or one that leaves flow behind
        found, value = start, before
    bound = max(value, min(bound, compute_bound(machines)))
    return Placement(found, value, bound, proven=optimal or value >= bound * (1 - _SAME))


class _Program:
    """The program over one set of machines: variables by name of what they are."""

    def __init__(self, pulp: Any, machines: Machines) -> None:
        self.pulp, self.machines = pulp, machines
        count, layers = len(machines.groups), machines.layers
        self.most = [min(layers, max(machines.most_layers(i, e, s) for e, s in _PLACES)) for i in range(count)]
        self.users = [i for i in range(count) if self.most[i] > 0]
        self.links = {i: self._kept(i) for i in self.users}
        self.problem = pulp.LpProblem("helix", pulp.LpMaximize)
        self.first = {i: pulp.LpVariable(f"s_{i}", 0, layers - 1, "Integer") for i in self.users}
        self.holds = {
            (i, k): pulp.LpVariable(f"b_{i}_{k}", cat="Binary")
            for i in self.users
            for k in range(1, self.most[i] + 1)
        }
        self.open: dict[tuple[int, int], Any] = {}
        self.flow: dict[tuple[int, int], Any] = {}
        self.slower: list[tuple[int, Any]] = []  # what else bounds the flow through a machine
        self.end = {
            i: self.first[i] + pulp.lpSum(k * self.holds[i, k] for k in range(1, self.most[i] + 1))
            for i in self.users
        }
        for i in self.users:
            self._machine(i)
        for i in self.users:
            into = [self.flow[a, b] for a, b in self.flow if b == i]
            out = [self.flow[a, b] for a, b in self.flow if a == i]
            rate = pulp.lpSum(machines.tokens_s(i, k) * self.holds[i, k] for k in range(1, self.most[i] + 1))
            self.problem += pulp.lpSum(into) == pulp.lpSum(out)
            self.problem += pulp.lpSum(into) <= rate
            for other, slower in self.slower:
                if other == i:
                    self.problem += pulp.lpSum(into) <= slower
        total = pulp.lpSum(self.flow[a, b] for a, b in self.flow if a == _SOURCE)
        self.problem += total
        self.problem += total <= compute_bound(machines)

    def _kept(self, i: int) -> list[int]:
        others = [j for j in self.users if j != i]
        others.sort(key=lambda j: (-self.machines.link_tokens_s(i, j), (j - i) % len(self.most)))
        return others[:_LINKS] if len(others) > 2 * _LINKS else others

    def _link(self, i: int, j: int, capacity: float) -> Any:
        """A link's flow and switch; gives the switch."""
        name = f"{i}_{j}".replace("-", "m")
        switch = self.open[i, j] = self.pulp.LpVariable(f"d_{name}", cat="Binary")
        self.flow[i, j] = self.pulp.LpVariable(f"f_{name}", 0, capacity)
        self.problem += self.flow[i, j] <= capacity * switch
        return switch

    def _machine(self, i: int) -> None:
        pulp, machines, layers = self.pulp, self.machines, self.machines.layers
        problem, first, end = self.problem, self.first, self.end
        counts = range(1, self.most[i] + 1)
        problem += pulp.lpSum(self.holds[i, k] for k in counts) == 1
        problem += end[i] <= layers
        peak = max(machines.tokens_s(i, k) for k in counts)
        source, sink = self._link(_SOURCE, i, peak), self._link(i, _SINK, peak)
        problem += first[i] <= layers * (1 - source)
        problem += layers * sink <= end[i]
        # Embedding and head take room and time from layers: fewer fit at the ends, and slower.
        for switches, ends in (
            ((source,), (True, False)),
            ((sink,), (False, True)),
            ((source, sink), (True, True)),
        ):
            closed = len(switches) - pulp.lpSum(switches)
            for k in range(machines.most_layers(i, *ends) + 1, self.most[i] + 1):
                problem += self.holds[i, k] <= closed
            slower = pulp.lpSum(machines.tokens_s(i, k, *ends) * self.holds[i, k] for k in counts)
            self.slower.append((i, slower + peak * closed))
        for j in self.links[i]:
            switch = self._link(i, j, min(peak, machines.link_tokens_s(i, j)))
            problem += first[j] <= end[i] + layers * (1 - switch)
            problem += end[i] + 1 <= end[j] + (layers + 1) * (1 - switch)

    # ---- solving -----------------------------------------------------------------------------------------------

    def start_from(self, ranges: Sequence[Range]) -> None:
        """A placement as the first solution: its intervals, and its maximum flow over the links that are kept."""
        for i in self.users:
            start, end = ranges[i] if ranges[i][0] < ranges[i][1] else (0, 1)
            self.first[i].setInitialValue(start)
            for k in range(1, self.most[i] + 1):
                self.holds[i, k].setInitialValue(int(k == end - start))
        for link in self.flow:
            self.flow[link].setInitialValue(0)
            self.open[link].setInitialValue(0)
        carried: dict[tuple[int, int], float] = {}
        for amount, path in max_flow(self.machines, ranges).paths:
            steps = [_SOURCE, *path, _SINK]
            links = list(pairwise(steps))
            if all(link in self.flow for link in links):
                for link in links:
                    carried[link] = carried.get(link, 0.0) + amount
        for link, amount in carried.items():
            self.flow[link].setInitialValue(min(amount, self.flow[link].upBound))
            self.open[link].setInitialValue(1)

    def solve(self, seconds: float | None) -> tuple[float, bool]:
        """Runs HiGHS; the bound it proved on the flow, and whether its solution reaches that."""
        solver = _warm_highs(self.pulp)(msg=False, timeLimit=seconds)
        if not solver.available():
            raise self.pulp.PulpSolverError("HiGHS is not installed")
        self.problem.solve(solver)
        info = self.problem.solverModel.getInfo()
        optimal = self.problem.sol_status == self.pulp.constants.LpSolutionOptimal
        bound = -float(info.mip_dual_bound)  # HiGHS minimises the negative
        return bound, optimal

    def ranges(self) -> tuple[Range, ...]:
        found: list[Range] = [(0, 0)] * len(self.most)
        for i in self.users:
            start = self.first[i].varValue
            held = [k for k in range(1, self.most[i] + 1) if (self.holds[i, k].varValue or 0) > 0.5]
            if start is not None and held:
                found[i] = self._tidied(i, round(start), round(start) + held[0])
        return tuple(found)

    def _tidied(self, i: int, start: int, end: int) -> Range:
        """Without the first or last layer of the model where the machine does not serve it: it then need not
        hold the embedding or the head."""
        if start == 0 and not (self.open[_SOURCE, i].varValue or 0) > 0.5:
            start += 1
        if end == self.machines.layers and not (self.open[i, _SINK].varValue or 0) > 0.5:
            end -= 1
        return (start, end) if start < end else (0, 0)


_SOURCE, _SINK = -1, -2
_PLACES = ((False, False), (True, False), (False, True))


def _warm_highs(pulp: Any) -> Any:
    """PuLP's HiGHS, given the initial values as a first solution (PuLP itself does not pass them on)."""

    class WarmHighs(pulp.HiGHS):  # type: ignore[misc]
        def callSolver(self, lp: Any) -> None:  # noqa: N802
            known = [v for v in lp.variables() if v.varValue is not None]
            lp.solverModel.setSolution(len(known), [v.index for v in known], [float(v.varValue) for v in known])
            lp.solverModel.run()

    return WarmHighs
