"""Within a budget: against every set of nodes that it pays for."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_clusters import WORKLOAD, cluster_of, device_type, tiny_model

from hexgen.cluster import Cluster, Node
from hexgen.errors import InfeasibleError
from hexgen.plan import EngineOptions
from hexgen.scheduler.planner import plan

OPTIONS = EngineOptions(token_budget=64, max_sequences=8)
MODEL = tiny_model()
ROOMY, QUICK, SMALL = device_type("cuda", 8, 1.0), device_type("cuda", 4, 2.0), device_type("cuda", 2.5, 0.5)


def price_of(nodes: tuple[Node, ...]) -> float:
    return sum(node.price_usd_h or 0.0 for node in nodes)


def best_affordable(cluster: Cluster, budget: float) -> float:
    """The most that any set of nodes within the budget serves, each planned as a cluster of its own; 0: none."""
    best = 0.0
    for number in range(1, len(cluster.nodes) + 1):
        for nodes in itertools.combinations(cluster.nodes, number):
            if price_of(nodes) > budget:
                continue
            alone = dataclasses.replace(cluster, nodes=nodes, budget_usd_h=None)
            try:
                made = plan(alone, MODEL, WORKLOAD, options=OPTIONS)
            except InfeasibleError:
                continue
            assert made.predicted is not None
            best = max(best, made.predicted.tokens_s)
    return best


@settings(max_examples=15, deadline=None)
@given(
    nodes=st.lists(st.tuples(st.sampled_from([ROOMY, QUICK, SMALL]), st.integers(1, 2)), min_size=2, max_size=4),
    prices=st.lists(st.sampled_from([1.0, 2.0, 3.5, 8.0]), min_size=4, max_size=4),
    budget=st.sampled_from([2.0, 4.5, 8.0]),
)
def test_what_a_budget_buys(nodes: list[tuple[object, int]], prices: list[float], budget: float) -> None:
    cluster = cluster_of(*nodes, prices=tuple(prices[: len(nodes)]), budget=budget)  # type: ignore[arg-type]
    best = best_affordable(cluster, budget)
    if best == 0.0:
        with pytest.raises(InfeasibleError):
            plan(cluster, MODEL, WORKLOAD, options=OPTIONS)
        return
    found = plan(cluster, MODEL, WORKLOAD, options=OPTIONS).predicted
    assert found is not None
    assert found.price_usd_h is not None
    assert found.price_usd_h <= budget * (1 + 1e-9)
    assert found.upper_bound_tokens_s is not None
    assert found.upper_bound_tokens_s >= best * (1 - 1e-9)
    assert found.tokens_s >= 0.9 * best  # greedy, from many starts
