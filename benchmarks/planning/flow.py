"""Max-flow under Helix's published table, and what placements made for it serve (Helix, ASPLOS'25)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from helix_layout import placements

from hexgen.plan import Plan
from hexgen.scheduler.baselines.contract import best_plan
from hexgen.scheduler.baselines.placement import Range, machines_of, max_flow, plans_of
from hexgen.scheduler.tables import CostTable, load_table
from hexgen.scheduler.task import Task, make_task
from planning.cases import Case, published
from planning.ours import plan_case, prediction, serve
from planning.report import Grid, Report, number, over, ratio
from planning.settings import ROOT, Settings

# Figures of Helix's artifact for its single-24 cluster and LLaMA-70B (github.com/xogusrns123/Helix-ASPLOS25).
TABLE = ROOT / "tests" / "data" / "helix_single24_70b.json"
PUBLISHED_FLOW = {"helix": 1289.6, "petals": 952.1, "swarm": 757.9}
FLOW_GOAL, SERVED_GOAL = 2000.0, 1.15


@dataclass(frozen=True, slots=True)
class FlowWay:
    name: str
    max_flow_tokens_s: float  # prompt and output
    predicted_tokens_s: float  # output
    simulated_tokens_s: float
    p50_s: float  # TPOT, simulated
    routes: int


def published_ranges(method: str) -> Mapping[str, Range]:
    """Node -> layers, of Helix's single-24 cluster with the larger model."""
    for entry in placements():
        if (entry["cluster"], entry["model"], entry["method"]) == ("helix-single24", "llama-2-70b", method):
            return {node: (int(span[0]), int(span[1])) for node, span in entry["layers"].items()}
    raise KeyError(method)


def placed(task: Task, method: str) -> tuple[float, Plan | None]:
    """A published placement's max-flow under our links, and the best plan of its flow's paths as routes."""
    ranges = published_ranges(method)
    machines = next(iter(machines_of(task, 1.0)))
    by_machine = [ranges.get(group.devices[0].rsplit("/", 1)[0], (0, 0)) for group in machines.groups]
    flow = max_flow(machines, by_machine).tokens_s
    drafts = plans_of(task, machines, by_machine)
    return flow, best_plan(task, "throughput", method, "nothing flows", drafts).plan


def run(settings: Settings) -> Report:
    asked = published("helix-single24")
    table = load_table(TABLE)
    task = make_task(asked.cluster, asked.model, asked.workload, "throughput", None, 0, "auto", None, table)
    flow = plan_case(asked, "maxflow", settings.seconds, cost=table).plan
    told = prediction(flow)
    ways = [_way("ours, max-flow", told.max_flow_tokens_s or math.nan, flow, asked, table, settings)]
    served_plan = plan_case(asked, "throughput", settings.seconds, cost=table).plan
    ways.append(_way("ours, throughput", math.nan, served_plan, asked, table, settings))
    for method in PUBLISHED_FLOW:
        carried, made = placed(task, method)
        if made is not None:
            ways.append(_way(f"{method}, published placement", carried, made, asked, table, settings))
    grid = Grid(
        "helix-single24, llama-2-70b, Helix's published table",
        ("placement", "max-flow", "published", "output tokens/s predicted", "simulated", "TPOT p50, s", "routes"),
        tuple(
            (
                way.name,
                number(way.max_flow_tokens_s, 1),
                number(PUBLISHED_FLOW.get(way.name.split(",")[0]), 1),
                number(way.predicted_tokens_s, 1),
                number(way.simulated_tokens_s, 1),
                number(way.p50_s, 2),
                str(way.routes),
            )
            for way in ways
        ),
    )
    figures = {"bound_tokens_s": told.max_flow_bound_tokens_s, "ways": [asdict(way) for way in ways]}
    return Report("maxflow", (grid,), tuple(_findings(ways, told.max_flow_bound_tokens_s)), figures)


def _way(name: str, carried: float, made: Plan, asked: Case, table: CostTable, settings: Settings) -> FlowWay:
    found = serve(made, asked, settings, table)
    told = prediction(made)
    return FlowWay(name, carried, told.tokens_s, found.tokens_s, found.tpot_p50_s, len(made.routes))


def _findings(ways: list[FlowWay], bound: float | None) -> list[str]:
    flow, served_way = ways[0], ways[1]
    met = "met" if flow.max_flow_tokens_s >= FLOW_GOAL else "missed"
    told = [
        f"Goal, max-flow of at least {FLOW_GOAL:,.0f} tokens/s: {met} ({flow.max_flow_tokens_s:,.1f}; no "
        f"placement exceeds {number(bound, 1)})."
    ]
    helix = next((way for way in ways if way.name.startswith("helix")), None)
    if helix is not None:
        for how in ("predicted_tokens_s", "simulated_tokens_s"):
            value = over(getattr(served_way, how), getattr(helix, how))
            met = "met" if value is not None and value >= SERVED_GOAL else "missed"
            what = how.split("_")[0]
            told.append(
                f"Goal, at least {SERVED_GOAL:g} times the output of Helix's published placement ({what}, our "
                f"simulator): {met} ({ratio(value)})."
            )
    return told
