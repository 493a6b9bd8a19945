"""Plans running on three real Ray nodes: exact, accounted for, watched, and gone when they end."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import oracle
import pytest
from conftest import RayCluster, outside_ray
from engine_client import EngineClient

from hexgen.cluster import Cluster, parse_cluster
from hexgen.deploy.ray_connect import connect_ray
from hexgen.deploy.ray_deployment import RayDeployment, StageProgress
from hexgen.deploy.ray_launch import deploy, prepare
from hexgen.errors import CheckpointError, DeploymentError, EngineError
from hexgen.memory import plan_memory
from hexgen.model import load_model
from hexgen.plan import EngineOptions, Hop, Plan, Route, Stage
from hexgen.request import SamplingParams

Command = Callable[..., subprocess.CompletedProcess[str]]
PROMPTS = [[1], [5, 6, 7], list(range(3, 40))]
TOKENS = 8
CLUSTER = {
    "name": "three",
    "nodes": [
        {"name": "big", "device": "cpu", "count": 3, "threads": 1, "memory": "1GB"},
        {"name": "mid", "device": "cpu", "count": 1, "threads": 1, "memory": "1GB"},
        {"name": "small", "device": "cpu", "count": 1, "threads": 1, "memory": "1GB"},
    ],
}


def three_nodes() -> Cluster:
    return parse_cluster(CLUSTER)


def make_plan(model: Path) -> Plan:
    """Two-wide, one and one device, unequal layers; a second route uses a part of the first stage."""
    stages = (
        Stage("s0", (0, 2), ("big/0", "big/1"), (2.0, 1.0)),
        Stage("s1", (2, 3), ("mid/0",)),
        Stage("s2", (3, 4), ("small/0",)),
    )
    path = tuple(Hop(stage.name, stage.layers) for stage in stages)
    options = EngineOptions(page_size=4, token_budget=32, max_sequences=8)
    return Plan(str(model), three_nodes(), stages, (Route(path, 1.0, 512),), options)


@pytest.fixture(scope="module")
def connected(ray_cluster: RayCluster) -> Iterator[RayCluster]:
    """This process joins once; deployments use its connection."""
    connection = connect_ray(ray_cluster.address)
    yield ray_cluster
    connection.close()


@pytest.fixture(scope="module")
def progress() -> list[list[StageProgress]]:
    return []


@pytest.fixture(scope="module")
def running(
    connected: RayCluster, tiny_llama: Path, progress: list[list[StageProgress]]
) -> Iterator[RayDeployment]:
    ready = prepare(make_plan(tiny_llama))
    with deploy(ready, on_progress=lambda stages: progress.append(list(stages))) as deployment:
        yield deployment


def placement_groups() -> list[str]:
    from ray.util import placement_group_table

    return [group["state"] for group in placement_group_table().values() if group["state"] != "REMOVED"]


def wait_until(condition: object, timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def test_tokens_equal_transformers(running: RayDeployment, tiny_llama: Path) -> None:
    (endpoint,) = running.endpoints()
    with EngineClient(endpoint, running.secret) as client:
        found = client.generate(PROMPTS, SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True))
    assert found == [oracle.greedy(tiny_llama, prompt, TOKENS) for prompt in PROMPTS]


def test_every_device_is_on_its_node(running: RayDeployment) -> None:
    import ray

    nodes = {node["NodeID"]: node["Labels"].get("hexgen.node") for node in ray.nodes()}
    where = {device: nodes[found.ray_node] for device, found in running.facts.items()}
    assert where == {"big/0": "big", "big/1": "big", "mid/0": "mid", "small/0": "small"}
    assert len({found.pid for found in running.facts.values()}) == 4


def test_memory_is_what_the_plan_says(running: RayDeployment, tiny_llama: Path) -> None:
    planned = {
        d.device: d for d in plan_memory(make_plan(tiny_llama), three_nodes(), load_model(tiny_llama)).devices
    }
    reports = running.reports()
    assert set(reports) == set(planned)
    for device, report in reports.items():
        expected = planned[device]
        total = expected.weights_bytes + expected.kv_bytes + expected.buffers_bytes
        assert report.tensor_bytes == pytest.approx(total, rel=0.1)


def test_ranks_read_their_own_slices_only(running: RayDeployment, tiny_llama: Path) -> None:
    model = load_model(tiny_llama)
    size = sum(path.stat().st_size for path in tiny_llama.glob("*.safetensors"))
    ends = 4 * model.embedding_parameters
    layer = 4 * model.layer_parameters
    read = {device: report.bytes_read for device, report in running.reports().items()}
    assert read["mid/0"] <= layer  # one of four layers, neither embedding nor head
    assert read["small/0"] <= layer + ends + 4 * model.hidden_size
    assert read["big/0"] + read["big/1"] <= 2 * layer + ends + 3 * 4 * model.hidden_size * 2
    assert sum(read.values()) <= size


def test_progress_ends_complete(running: RayDeployment, progress: list[list[StageProgress]]) -> None:
    last = {stage.stage: stage for stage in progress[-1]}
    assert set(last) == {"s0", "s1", "s2"}
    assert all(stage.done_bytes == stage.total_bytes > 0 for stage in last.values())
    for before, after in itertools.pairwise(progress):
        assert all(a.done_bytes >= b.done_bytes for b, a in zip(before, after, strict=True))


def test_a_killed_worker_is_reported_and_everything_ends(connected: RayCluster, tiny_llama: Path) -> None:
    groups = len(placement_groups())
    with deploy(prepare(one_stage(tiny_llama, "big/2"))) as deployment:
        pid = deployment.facts["big/2"].pid
        assert deployment.failure() is None
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: deployment.failure() is not None)
        failure = deployment.failure()
        assert isinstance(failure, EngineError)
        assert failure.where == "device big/2"
        assert "process died" in failure.message
        assert len(placement_groups()) == groups + 1
    wait_until(lambda: len(placement_groups()) == groups)
    deployment.stop()  # once more is harmless


def one_stage(model: Path, device: str) -> Plan:
    return Plan(
        str(model),
        three_nodes(),
        (Stage("s0", (0, 4), (device,)),),
        (Route((Hop("s0", (0, 4)),), 1.0, 256),),
        EngineOptions(page_size=4, token_budget=32, max_sequences=4),
    )


def test_a_checkpoint_that_a_rank_cannot_read_ends_the_start(
    connected: RayCluster, tiny_llama: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_llama, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    groups = len(placement_groups())
    with pytest.raises(CheckpointError, match=r"model\.safetensors"), deploy(prepare(one_stage(broken, "big/2"))):
        pass
    wait_until(lambda: len(placement_groups()) == groups)


def test_devices_that_the_cluster_lacks_are_named(connected: RayCluster, tiny_llama: Path) -> None:
    cluster = parse_cluster({"name": "gpus", "nodes": [{"name": "g", "device": "T4", "count": 1}]})
    plan = Plan(str(tiny_llama), cluster, (Stage("s0", (0, 4), ("g/0",)),), (Route((Hop("s0", (0, 4)),)),))
    with pytest.raises(DeploymentError, match=r"node g: the plan needs 1 GPU and 1 CPU"), deploy(prepare(plan)):
        pass


def test_a_plan_over_more_cores_than_there_are(connected: RayCluster, tiny_llama: Path) -> None:
    cluster = parse_cluster({"name": "c", "nodes": [{"name": "wide", "device": "cpu", "count": 1, "threads": 64}]})
    plan = Plan(str(tiny_llama), cluster, (Stage("s0", (0, 4), ("wide/0",)),), (Route((Hop("s0", (0, 4)),)),))
    with pytest.raises(DeploymentError, match="node wide: the plan needs 64 CPU"), deploy(prepare(plan)):
        pass


def test_another_cluster_than_the_connected_one_is_refused(connected: RayCluster) -> None:
    with pytest.raises(DeploymentError, match="connected to another Ray cluster"):
        connect_ray("10.0.0.1:6379")


def test_discovery_finds_the_nodes(connected: RayCluster) -> None:
    from hexgen.deploy.discover import discover

    found = discover(connected.address).cluster
    assert {node.name: node.threads for node in found.nodes} == {"big": 3, "mid": 1, "small": 1}


@pytest.mark.parametrize(
    ("address", "reason"),
    [("127.0.0.1:1", "refused"), ("nonsense", "HOST:PORT"), ("127.0.0.1:99999", "HOST:PORT")],
)
def test_clusters_that_are_not_there(address: str, reason: str) -> None:
    code = (
        "from hexgen.deploy.ray_connect import connect_ray\nfrom hexgen.errors import DeploymentError\n"
        f"try:\n    connect_ray({address!r})\nexcept DeploymentError as error:\n    print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=outside_ray()
    )
    assert done.stderr == ""
    assert reason in done.stdout
    assert address in done.stdout


@pytest.mark.slow
def test_a_cluster_with_another_token_is_not_joined(ray_cluster: RayCluster, hexgen_command: Command) -> None:
    environment = ray_cluster.environment | {"RAY_AUTH_TOKEN": "0" * 64}
    done = hexgen_command("discover", "--ray-address", ray_cluster.address, **environment)
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1
    assert "another token" in done.stderr
