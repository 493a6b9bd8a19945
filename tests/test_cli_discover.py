"""``hexgen discover``: from what machines report to a cluster file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from hexgen.cluster import load_cluster, parse_cluster
from hexgen.deploy.discover import Machine, build
from hexgen.errors import DeploymentError

GB = 10**9


def machine(cores: int = 8, *gpus: tuple[str, int]) -> Machine:
    return Machine("host", cores, 64 * GB, gpus)


def test_gpu_nodes_by_what_the_driver_calls_them() -> None:
    found = build("c", [("a", "10.0.0.1", machine(8, ("NVIDIA A100-SXM4-80GB", 85 * GB)))]).cluster
    (node,) = found.nodes
    assert (node.name, node.address, node.count, node.device.kind) == ("a", "10.0.0.1", 1, "cuda")
    assert node.device.memory_bytes == pytest.approx(80 * GB, rel=0.1)


def test_a_card_with_less_memory_than_the_catalogue_says() -> None:
    (node,) = build("c", [("a", None, machine(8, ("Tesla T4", 15 * GB)))]).cluster.nodes
    assert node.device.memory_bytes == pytest.approx(15 * GB, rel=0.001)


def test_nodes_without_gpus_are_left_out_beside_those_with() -> None:
    found = build("c", [("head", None, machine()), ("a", None, machine(8, ("Tesla T4", 16 * GB)))])
    assert [node.name for node in found.cluster.nodes] == ["a"]
    assert found.remarks == ("head has no GPU and is left out",)


def test_nodes_that_offer_nothing_are_left_out() -> None:
    found = build("c", [("head", None, machine(0)), ("a", None, machine(4))])
    assert [(node.name, node.threads) for node in found.cluster.nodes] == [("a", 4)]


def test_equal_and_odd_host_names_become_names() -> None:
    found = build("c", [("box", None, machine()), ("box", None, machine()), ("my box!", None, machine())])
    assert [node.name for node in found.cluster.nodes] == ["box", "box-2", "my-box"]


def test_unlike_gpus_in_one_machine_are_remarked_on() -> None:
    found = build("c", [("a", None, machine(8, ("Tesla T4", 16 * GB), ("NVIDIA L4", 24 * GB)))])
    assert found.cluster.nodes[0].device.name == "T4"
    assert "unlike GPUs" in found.remarks[0]


def test_a_card_that_nobody_knows() -> None:
    with pytest.raises(DeploymentError, match="no GPU 'Riva 128'"):
        build("c", [("a", None, machine(8, ("Riva 128", 4_000_000)))])


def test_no_devices_at_all() -> None:
    with pytest.raises(DeploymentError, match="no devices"):
        build("c", [])


def test_the_command_writes_a_file_that_can_be_read(
    hexgen_command: Callable[..., CompletedProcess[str]], tmp_path: Path
) -> None:
    path = tmp_path / "cluster.yaml"
    done = hexgen_command("discover", "--no-measure", "-o", path)
    assert (done.returncode, done.stdout) == (0, "")
    assert load_cluster(path).devices()
    shown = hexgen_command("discover", "--no-measure")
    assert shown.returncode == 0
    import yaml

    assert parse_cluster(yaml.safe_load(shown.stdout)).name == "this-machine"
