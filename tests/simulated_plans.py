"""Drawn workloads, and plans of drawn clusters, for the simulator's tests."""

from __future__ import annotations

from hypothesis import strategies as st
from scheduler_clusters import tiny_model

from hexgen.cluster import Cluster
from hexgen.errors import InfeasibleError
from hexgen.plan import EngineOptions, Plan
from hexgen.scheduler.planner import plan
from hexgen.workload import Lengths, Workload

MODEL = tiny_model(layers=4)
OPTIONS = EngineOptions(token_budget=128, max_sequences=8)
WORKLOADS = st.builds(
    lambda prompt, output, rate: Workload(
        Lengths(prompt, max=prompt * 4), Lengths(output, max=output * 4), rate=rate
    ),
    st.integers(2, 80),
    st.integers(2, 60),
    st.sampled_from([1.0, 20.0, 200.0, "max"]),
)


def planned(cluster: Cluster, options: EngineOptions = OPTIONS) -> Plan | None:
    try:
        return plan(cluster, MODEL, Workload(Lengths(40), Lengths(24)), options=options)
    except InfeasibleError:
        return None
