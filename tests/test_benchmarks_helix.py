"""Helix's published figures in benchmarks/data, and how plans are handed to its simulator (which is not here)."""

from __future__ import annotations

import configparser
import sys
from pathlib import Path

import pytest
import yaml

from hexgen.cluster import load_cluster
from hexgen.errors import SpecError
from hexgen.model import load_model
from hexgen.plan import parse_plan, resolve_cluster
from hexgen.scheduler.tables.files import load_table
from hexgen.scheduler.tables.measured import MeasuredTable

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from helix_layout import SINK, SOURCE, cluster_ini, from_placement, from_plan, placements  # noqa: E402

DATA = ROOT / "benchmarks" / "data"
PUBLISHED = [(e["cluster"], e["model"], e["method"]) for e in placements()]
PROFILES = {"llama-2-70b": "helix_profiles_llama2_70b.json", "llama-1-30b": "helix_profiles_llama1_30b.json"}


@pytest.mark.parametrize(("name", "model", "method"), PUBLISHED)
def test_every_published_placement_serves_the_whole_model(name: str, model: str, method: str) -> None:
    layers = load_model(model).layers
    layout = from_placement(name, model, method, load_cluster(ROOT / "cluster_specs" / f"{name}.yaml"), layers)
    room = {
        entry.device + (f"x{entry.width}" if entry.width > 1 else ""): entry.kv_token_layers
        for entry in profile(model).entries
    }
    ends = {machine.name: machine for machine in layout.machines}
    reached = {SOURCE}
    for _ in range(len(layout.machines) + 1):
        reached |= {wire.to for wire in layout.wires if wire.start in reached}
    assert SINK in reached
    for machine in layout.machines:
        assert machine.end - machine.first <= len(room[machine.kind])
    for wire in layout.wires:
        at = 0 if wire.start == SOURCE else ends[wire.start].end
        if wire.to == SINK:
            assert at == layers
        else:
            assert ends[wire.to].first <= at < ends[wire.to].end


def profile(model: str) -> MeasuredTable:
    table = load_table(DATA / PROFILES[model])
    assert isinstance(table, MeasuredTable)
    return table


def test_profiles_are_measured_tables_of_the_model() -> None:
    for model, file in PROFILES.items():
        table = load_table(DATA / file)
        spec = load_model(model)
        table.check(spec, load_cluster(ROOT / "cluster_specs" / "helix-single24.yaml").nodes)
    a100, l4, t4 = profile("llama-2-70b").entries[:3]
    assert (a100.device, l4.device, t4.device) == ("A100", "L4", "T4")
    # Of their files: 750 prompt tokens 5, 27 and 48 ms a layer, 20 sequences 1.5, 7.7 and 9.0 ms; KV of 4 layers.
    assert [e.prefill.at(750, 0) for e in (a100, l4, t4)] == pytest.approx([0.005, 0.027, 0.048])
    assert [e.decode.at(20, 0) for e in (a100, l4, t4)] == pytest.approx([0.0015, 0.0077, 0.009])
    assert [e.kv_token_layers[3] for e in (a100, l4, t4)] == [6719808, 3004416, 1124224]


PLAN = """
model: llama-2-70b
cluster:
  name: two
  nodes:
    - {name: a-$i, repeat: 3, device: A100, count: 1}
    - {name: l, device: L4, count: 2, link: pcie4}
  links: {default: {bandwidth: 1GB/s, latency: 1ms}, nodes: [{between: [a-1, l], bandwidth: 2GB/s, latency: 3ms}]}
stages:
  s0: {layers: [0, 40], devices: [a-1/0]}
  s1: {layers: [30, 80], devices: [l/0, l/1]}
  s2: {layers: [40, 80], devices: [a-2/0]}
  spare: {layers: [0, 80], devices: [a-3/0]}
routes:
  - {weight: 3, path: [s0, {stage: s1, layers: [40, 80]}]}
  - {weight: 1, path: [s0, s2]}
"""


def test_a_plan_becomes_machines_links_and_shares() -> None:
    plan = parse_plan(yaml.safe_load(PLAN))
    layout = from_plan(plan, resolve_cluster(plan), 80, "mine")
    assert [(m.name, m.kind, m.first, m.end) for m in layout.machines] == [
        ("s0", "A100", 0, 40),
        ("s1", "L4x2", 30, 80),
        ("s2", "A100", 40, 80),
    ]
    assert layout.kinds == {"A100": 3, "L4x2": 1}  # of the cluster, whatever the plan uses
    shares = {(wire.start, wire.to): wire.weight for wire in layout.wires}
    onwards = {("s0", "s1"): 0.75, ("s1", SINK): 0.75, ("s0", "s2"): 0.25, ("s2", SINK): 0.25}
    assert shares == {(SOURCE, "s0"): 1.0, **onwards}
    read = configparser.ConfigParser()
    read.read_string(cluster_ini(layout, lambda kind, held: held * 1000))
    assert read["compute_node_3"]["kv_cache_capacity"] == "50000"
    assert read["compute_node_3"]["machine_type"] == "'L4x2'"
    link = read["link_compute_node_2_compute_node_3"]
    assert (link["in"], float(link["bandwidth"]), float(link["latency"])) == ("compute_node_2", 2e9, 3e-3)


def test_what_helix_cannot_express_is_said() -> None:
    early = parse_plan(yaml.safe_load(PLAN.replace("layers: [40, 80]}", "layers: [40, 79]}")))
    with pytest.raises(SpecError, match="left after layer 79"):
        from_plan(early, resolve_cluster(early), 80, "early")
    wide = parse_plan(yaml.safe_load(PLAN.replace("[a-2/0]", "[a-2/0, a-3/0]")))
    with pytest.raises(SpecError, match="spans the nodes"):
        from_plan(wide, resolve_cluster(wide), 80, "wide")
    cluster = load_cluster(ROOT / "cluster_specs" / "helix-single24.yaml")
    with pytest.raises(SpecError, match="it has helix"):
        from_placement("helix-single24", "llama-2-70b", "best", cluster, 80)
