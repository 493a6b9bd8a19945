"""Real requests over two real routes: spread as weighted, at every moment; metrics say what the router does."""

from __future__ import annotations

import dataclasses
import urllib.request
from collections.abc import Iterator

import pytest
from engine_client import cpu_cluster, make_plan
from served import BUNDLED, Served, served

from hexgen.deploy.in_process import InProcessDeployment
from hexgen.plan import Route
from hexgen.request import SamplingParams

WEIGHTS = (0.75, 0.25)


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    cluster = cpu_cluster(2)
    whole = (0, 8)
    made = make_plan(
        cluster,
        str(BUNDLED),
        [(whole, 1), (whole, 1)],
        [[(0, whole)], [(1, whole)]],
        page_size=16,
        kv_tokens=4096,
        token_budget=256,
        prefix_cache=False,
    )
    routes = tuple(Route(r.path, w, r.kv_tokens) for r, w in zip(made.routes, WEIGHTS, strict=True))
    plan = dataclasses.replace(made, routes=routes)
    deployment = InProcessDeployment(plan, cluster, BUNDLED)
    deployment.plan = plan  # type: ignore[attr-defined]
    try:
        with served(deployment) as running:
            yield running
    finally:
        deployment.stop()


def ask(server: Served, count: int, together: int) -> list[int]:
    """``count`` requests, so many of them at once; the route of each in the order in which they were sent."""
    routes: list[int] = []

    async def one_batch(size: int) -> None:
        streams = [
            await server.coordinator.submit([5, 6, 7, i + 1], SamplingParams(max_tokens=4, ignore_eos=True))
            for i in range(size)
        ]
        for stream in streams:
            async for _ in stream:
                pass
            assert stream.route is not None
            routes.append(stream.route)

    for start in range(0, count, together):
        server.loop.run(one_batch(min(together, count - start)))
        server.wait_idle()
    return routes


def test_requests_are_spread_as_the_plan_weighs(server: Served) -> None:
    """One at a time, both routes idle: never a whole request from the share, from the first on."""
    routes = ask(server, 24, 1)
    for n in range(1, 25):
        assert abs(routes[:n].count(0) - WEIGHTS[0] * n) < 1, routes
    assert routes.count(0) == 18


def test_requests_at_once_are_spread_too(server: Served) -> None:
    """Pages in use shift the share a little; the batches are small beside the pages that there are."""
    routes = ask(server, 48, 8)
    assert abs(routes.count(0) - 36) <= 2
    for start in range(0, 48, 8):
        assert 5 <= routes[start : start + 8].count(0) <= 7


def test_metrics_show_weights_and_speeds(server: Served) -> None:
    text = urllib.request.urlopen(f"{server.http}/metrics", timeout=10).read().decode()
    for route, weight in enumerate(WEIGHTS):
        assert f'hexgen_route_weight{{route="{route}"}} {weight}' in text
        assert f'hexgen_route_speed{{route="{route}"}} 1.0' in text
    assert "hexgen_route_full_tokens_per_second{route=" not in text  # no route was ever full
