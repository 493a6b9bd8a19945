"""What is filled in before a worker starts: weights that nobody gave; and whose memory counts."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from hexgen.deploy.ray_launch import prepare
from hexgen.plan import load_plan

CLUSTER = {
    "name": "two",
    "nodes": [
        {"name": "quick", "device": "cpu", "count": 1, "threads": 1, "memory": "200MB"},
        {"name": "slow", "device": "cpu", "count": 1, "threads": 1, "speed": 0.25, "memory": "200MB"},
    ],
    "links": {"default": {"bandwidth": "1GB/s", "latency": "100us"}},
}


def written(folder: Path, *weights: float) -> Path:
    """A plan as a person writes it: the whole model on each of two workers of unlike speed."""
    routes = [{"path": ["a"]}, {"path": ["b"]}]
    for route, weight in zip(routes, weights, strict=False):
        route["weight"] = weight  # type: ignore[assignment]
    stages = {
        "a": {"layers": [0, 8], "devices": ["quick/0"]},
        "b": {"layers": [0, 8], "devices": ["slow/0"]},
    }
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump({"model": "demo", "cluster": CLUSTER, "stages": stages, "routes": routes}))
    return path


def test_routes_without_weights_get_those_of_their_speeds(tmp_path: Path) -> None:
    ready = prepare(written(tmp_path))
    quick, slow = (route.weight for route in ready.plan.routes)
    assert quick + slow == pytest.approx(1, abs=1e-5)
    assert quick > 2 * slow  # a quarter of the speed
    assert ready.plan.predicted is not None
    assert "no weights" in ready.remarks[0]
    assert f"{quick:.2f}, {slow:.2f}" in ready.remarks[0]


@pytest.mark.parametrize("weights", [(1.0, 3.0), (2.0, 2.0)])
def test_weights_that_were_given_are_kept(tmp_path: Path, weights: tuple[float, float]) -> None:
    ready = prepare(written(tmp_path, *weights))
    assert tuple(route.weight for route in ready.plan.routes) == weights
    assert ready.remarks == ()


def test_a_plan_by_published_figures_says_whose_memory_counts(tmp_path: Path) -> None:
    ready = prepare(written(tmp_path))
    assert ready.plan.predicted is not None
    told = dataclasses.replace(ready.plan.predicted, source="somebody's table")
    again = prepare(dataclasses.replace(load_plan(tmp_path / "plan.yaml"), predicted=told))
    assert [route.weight for route in again.plan.routes] == [1.0, 1.0]  # a plan with a prediction is the planner's
    assert "somebody's table" in again.remarks[0]
    assert "tokens a route" in again.remarks[0]
