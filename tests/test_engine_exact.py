"""The whole engine, ranks as threads over real sockets: greedy tokens equal transformers', whatever the plan."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import oracle
import pytest
import torch
from engine_client import GREEDY, EngineClient, cpu_cluster, make_plan

from hexgen.deploy.in_process import InProcessDeployment
from hexgen.request import SamplingParams

VOCAB = 101
# From one token to longer than the token budget of a step (32), with a shared beginning among some.
_rng = random.Random(7)
_SHARED = [_rng.randrange(3, VOCAB) for _ in range(13)]
PROMPTS = [[_rng.randrange(3, VOCAB) for _ in range(n)] for n in (1, 2, 5, 33, 70, 16, 4)] + [
    _SHARED + [_rng.randrange(3, VOCAB) for _ in range(n)] for n in (1, 6, 30)
]

Reference = Callable[[str], tuple[Path, list[list[int]]]]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """By variant: the checkpoint, and what transformers continues PROMPTS with. Made once."""
    made: dict[str, tuple[Path, list[list[int]]]] = {}

    def get(variant: str) -> tuple[Path, list[list[int]]]:
        if variant not in made:
            path = oracle.make_checkpoint(tmp_path_factory.mktemp("checkpoint") / variant, variant)
            made[variant] = path, [oracle.greedy(path, p, GREEDY.max_tokens) for p in PROMPTS]
        return made[variant]

    return get


@contextmanager
def deployed(path: Path, *args: object, **engine: object) -> Iterator[InProcessDeployment]:
    cluster = cpu_cluster(8)
    deployment = InProcessDeployment(make_plan(cluster, str(path), *args, **engine), cluster, path)  # type: ignore[arg-type]
    try:
        yield deployment
        assert deployment.failure() is None
    finally:
        deployment.stop()


@contextmanager
def serving(path: Path, *args: object, **engine: object) -> Iterator[EngineClient]:
    """A client of the first route."""
    with (
        deployed(path, *args, **engine) as deployment,
        EngineClient(deployment.endpoints()[0], deployment.secret) as client,
    ):
        yield client


PLANS = {
    "single": [((0, 4), 1)],
    "tp2": [((0, 4), 2)],
    "tp3": [((0, 4), 3)],
    "tp5": [((0, 4), 5)],
    "tp2-unequal": [((0, 4), [5, 1])],
    "tp3-unequal": [((0, 4), [1, 3, 2])],
    "stages-1-2": [((0, 1), 1), ((1, 4), 2)],
    "stages-3-1": [((0, 3), [2, 1, 1]), ((3, 4), 1)],
    "stages-2-1-3": [((0, 2), 2), ((2, 3), 1), ((3, 4), 3)],
}
FAMILY_PLANS = ("stages-1-2", pytest.param("tp2-unequal", marks=pytest.mark.slow))
FAMILIES = tuple(v for v in oracle.VARIANTS if v != "llama")


@pytest.mark.parametrize("plan", PLANS)
def test_every_plan_gives_the_reference_tokens(reference: Reference, plan: str) -> None:
    path, expected = reference("llama")
    with serving(path, PLANS[plan]) as client:
        assert client.generate(PROMPTS) == expected
        assert client.generate(PROMPTS, stagger=5) == expected  # now with cached prefixes, arriving one by one
        stats = client.wait_idle()
        assert stats.free_pages == stats.total_pages
        assert stats.cached_tokens > 0
        assert stats.preemptions == 0


@pytest.mark.parametrize("plan", FAMILY_PLANS)
@pytest.mark.parametrize("variant", FAMILIES)
def test_every_family_gives_the_reference_tokens(reference: Reference, variant: str, plan: str) -> None:
    path, expected = reference(variant)
    with serving(path, PLANS[plan]) as client:
        assert client.generate(PROMPTS, stagger=2) == expected


# s0 [0,2) begins both routes, s1 [2,4) is shared; the second route takes layer 1..2 from s2 and uses part of s0.
SHARED = {
    "shared-first": (
        [((0, 2), 1), ((2, 4), 2), ((2, 4), 1)],
        [[(0, (0, 2)), (1, (2, 4))], [(0, (0, 2)), (2, (2, 4))]],
    ),
    "shared-last": (
        [((0, 2), 1), ((0, 2), 2), ((2, 4), [2, 1])],
        [[(0, (0, 2)), (2, (2, 4))], [(1, (0, 2)), (2, (2, 4))]],
    ),
    "partial-layers": (
        [((0, 3), 2), ((1, 4), 1), ((3, 4), 1)],
        [[(0, (0, 1)), (1, (1, 4))], [(0, (0, 3)), (2, (3, 4))]],
    ),
    "shared-middle": (
        [((0, 1), 1), ((0, 1), 1), ((1, 3), 2), ((3, 4), 1), ((3, 4), 1)],
        [[(0, (0, 1)), (2, (1, 3)), (3, (3, 4))], [(1, (0, 1)), (2, (1, 3)), (4, (3, 4))]],
    ),
    "head-and-tail": (  # s0 is the only stage of one route, and the first of the other, which s1 samples
        [((0, 4), 1), ((2, 4), 1)],
        [[(0, (0, 4))], [(0, (0, 2)), (1, (2, 4))]],
    ),
}


@pytest.mark.parametrize("plan", SHARED)
def test_routes_that_share_stages(reference: Reference, plan: str) -> None:
    path, expected = reference("llama")
    stages, routes = SHARED[plan]
    with deployed(path, stages, routes) as deployment:
        clients = [EngineClient(e, deployment.secret) for e in deployment.endpoints()]
        numbers = [[c.submit(p) for p in PROMPTS] for c in clients]  # both routes at once
        for client, mine in zip(clients, numbers, strict=True):
            client.wait(*mine)
            assert [client.outputs[n] for n in mine] == expected
        for client in clients:
            stats = client.wait_idle()
            assert stats.free_pages == stats.total_pages
            client.close()


@pytest.mark.parametrize("plan", ["single", "stages-2-1-3"])
def test_thirty_two_sequences_at_once(reference: Reference, plan: str) -> None:
    path, expected = reference("llama")
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(32)]
    with serving(path, PLANS[plan], token_budget=64, kv_tokens=4096) as client:
        got = client.generate(prompts)
    assert got == [expected[i % len(PROMPTS)] for i in range(32)]


@pytest.mark.parametrize("plan", ["single", "stages-1-2"])
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_preemption_changes_nothing(reference: Reference, plan: str, prefix_cache: bool) -> None:
    path, expected = reference("llama")
    # The longest sequence alone takes 20 of the 24 pages.
    sampling = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
    short = [0, 1, 2, 5, 6, 7]  # these grow past the room together
    with serving(path, PLANS[plan], kv_tokens=96, prefix_cache=prefix_cache) as client:
        got = client.generate([PROMPTS[i] for i in short] * 2, sampling)
        assert [tokens[: GREEDY.max_tokens] for tokens in got] == [expected[i] for i in short] * 2
        assert got[:6] == got[6:]
        assert client.generate(PROMPTS) == expected
        stats = client.wait_idle()
    assert stats.preemptions > 0
    assert stats.free_pages == stats.total_pages
