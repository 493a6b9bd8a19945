"""The clusters in cluster_specs: counts, types, links and prices as published; and those that are made up."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from hexgen.cluster import Cluster, Link, load_cluster
from hexgen.errors import SpecError
from hexgen.model import load_model
from hexgen.scheduler.generate import MAX_GENERATED, generate, main

SPECS = Path(__file__).parent.parent / "cluster_specs"

# (type, devices of a node) -> nodes, as the sources have them. HexGen: ICML 2024, section 5.1. Helix: ASPLOS 2025,
# sections 6.3 and 6.5, and its artifact. LLM-PQ: scripts/optimizerScripts/main_exp.sh.
PUBLISHED: dict[str, dict[tuple[str, int], int]] = {
    "hexgen-homogeneous16": {("A100-40G-SXM", 8): 2},
    "hexgen-full58": {
        ("RTX3090Ti", 8): 2, ("RTX3090Ti", 3): 2, ("A5000", 8): 2, ("A6000", 8): 2, ("A40", 4): 1,
    },
    "hexgen-half30": {("RTX3090Ti", 8): 2, ("RTX3090Ti", 3): 2, ("A5000", 8): 1},
    "hexgen-asym-example8": {("A6000", 4): 1, ("A5000", 2): 1, ("A4000", 2): 1},
    "helix-single24": {("A100-40G-SXM", 1): 4, ("L4", 1): 8, ("T4", 1): 12},
    "helix-distributed24": {("A100-40G-SXM", 1): 4, ("L4", 1): 8, ("T4", 1): 12},
    "helix-hetero42": {
        ("A100-40G-SXM", 1): 4, ("V100-16G", 1): 6, ("L4", 1): 8, ("L4", 2): 4, ("T4", 1): 10, ("T4", 2): 6,
        ("T4", 4): 4,
    },
    "helix-a100x4": {("A100-40G-SXM", 1): 4},
    "helix-l4x8": {("L4", 1): 8},
    "helix-t4x12": {("T4", 1): 12},
    "llmpq-1": {("T4", 3): 1, ("V100-32G", 1): 1},
    "llmpq-2": {("P100-12G", 3): 1, ("V100-32G", 1): 1},
    "llmpq-3": {("T4", 4): 1, ("V100-32G", 2): 1},
    "llmpq-4": {("V100-32G", 2): 1, ("A100-40G-SXM", 2): 1},
    "llmpq-5": {("V100-32G", 4): 1, ("A100-40G-SXM", 4): 1},
    "llmpq-6": {("V100-32G", 4): 1, ("A100-80G-SXM", 2): 1},
    "llmpq-7": {("T4", 4): 1},
    "llmpq-8": {("V100-32G", 4): 1},
    "llmpq-9": {("A100-80G-SXM", 4): 1},
}  # fmt: skip


def kinds(cluster: Cluster) -> Counter[tuple[str, int]]:
    return Counter((node.device.name, node.count) for node in cluster.nodes)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_clusters_are_as_published(name: str) -> None:
    cluster = load_cluster(SPECS / f"{name}.yaml")
    assert cluster.name == name
    assert kinds(cluster) == PUBLISHED[name]
    if cluster.model is not None:
        load_model(cluster.model)
    first = (SPECS / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith(
        ("# HexGen (ICML 2024)", "# Helix (ASPLOS 2025)", "# LLM-PQ (2024)", "# The example of")
    )


@pytest.mark.parametrize(
    ("name", "usd_h"),
    [("hexgen-homogeneous16", 65.54), ("hexgen-full58", 65.04), ("hexgen-half30", 29.60)],
)
def test_hexgen_pools_cost_what_was_paid(name: str, usd_h: float) -> None:
    cluster = load_cluster(SPECS / f"{name}.yaml")
    assert sum(node.price_usd_h or 0.0 for node in cluster.nodes) == pytest.approx(usd_h, abs=0.005)


@pytest.mark.parametrize(("number", "usd_h"), [(1, 3.96), (4, 8.4), (6, 25.04), (7, 2.8), (9, 35.2)])
def test_llmpq_prices_are_its_script_s(number: int, usd_h: float) -> None:
    cluster = load_cluster(SPECS / f"llmpq-{number}.yaml")
    assert sum(node.price_usd_h or 0.0 for node in cluster.nodes) == pytest.approx(usd_h)


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name.startswith("helix-")])
def test_helix_links_are_its_artifact_s(name: str) -> None:
    cluster = load_cluster(SPECS / f"{name}.yaml")
    names = [node.name for node in cluster.nodes]
    regions = {node.name: node.region for node in cluster.nodes}
    for a, b in itertools.pairwise(names):
        near = regions[a] == regions[b]
        assert cluster.link(a, b) == (Link(1e9, 1e-3) if near else Link(12.5e6, 50e-3))


def test_helix_regions_are_its_paper_s() -> None:
    cluster = load_cluster(SPECS / "helix-distributed24.yaml")
    regions = Counter((node.region, node.device.name) for node in cluster.nodes)
    assert regions == {
        ("r0", "A100-40G-SXM"): 4, ("r1", "L4"): 2, ("r1", "T4"): 8, ("r2", "L4"): 6, ("r2", "T4"): 4,
    }  # fmt: skip


@pytest.mark.parametrize("devices", [64, 256, 1024, 4096])
def test_made_up_clusters_are_what_the_generator_makes(devices: int) -> None:
    cluster = load_cluster(SPECS / f"scale-{devices}.yaml")
    assert cluster == generate(devices)
    assert len(cluster.devices()) == devices
    regions = devices // 64
    assert kinds(cluster) == {kind: n * regions for kind, n in PUBLISHED["helix-hetero42"].items()}
    assert len({node.region for node in cluster.nodes}) == regions
    assert cluster.link(cluster.nodes[0].name, cluster.nodes[1].name) == Link(1e9, 1e-3)
    if regions > 1:
        assert cluster.link(cluster.nodes[0].name, cluster.nodes[-1].name) == Link(12.5e6, 50e-3)


@pytest.mark.parametrize("devices", [1, 2, 63, 65, 100, 777])
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_any_number_of_devices_exactly(devices: int, seed: int | None) -> None:
    cluster = generate(devices, seed=seed)
    assert len(cluster.devices()) == devices
    assert cluster == generate(devices, seed=seed)


def test_seeds_draw_other_mixes_in_the_same_proportions() -> None:
    drawn = [generate(1024, 4, seed) for seed in (0, 1)]
    assert kinds(drawn[0]) != kinds(drawn[1])
    for cluster in drawn:
        t4s = sum(device.type.name == "T4" for device in cluster.devices())
        assert 0.5 < t4s / 1024 < 0.68  # 38 of 64 on average
        assert Counter(node.region for node in cluster.nodes).keys() == {"r0", "r1", "r2", "r3"}


def test_the_command_writes_what_can_be_loaded(tmp_path: Path) -> None:
    path = tmp_path / "made.yaml"
    command = [
        sys.executable,
        "-m",
        "hexgen.scheduler.generate",
        "--devices",
        "128",
        "--regions",
        "3",
        "--seed",
        "7",
    ]
    subprocess.run([*command, "-o", str(path)], check=True, timeout=60)
    assert load_cluster(path) == generate(128, 3, 7)


@pytest.mark.parametrize(("devices", "regions"), [(0, None), (MAX_GENERATED + 1, None), (4, 5), (4, 0)])
def test_impossible_sizes_are_one_clear_line(
    devices: int, regions: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SpecError):
        generate(devices, regions)
    arguments = ["--devices", str(devices), *([] if regions is None else ["--regions", str(regions)])]
    assert main(arguments) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1
