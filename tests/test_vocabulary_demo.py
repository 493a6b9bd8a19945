"""The demonstration's cluster: equal parts do not fit, unequal ones do."""

import itertools
from pathlib import Path

import pytest

from hexgen.cluster import load_cluster
from hexgen.errors import InfeasibleError
from hexgen.memory import plan_memory
from hexgen.model import load_model
from hexgen.plan import Hop, Plan, Route, Stage

CLUSTER = load_cluster(Path(__file__).parent.parent / "cluster_specs" / "demo.yaml")
MODEL = load_model("demo")
DEVICES = [device.id for device in CLUSTER.devices()]


def pipeline(*parts: tuple[tuple[str, ...], int]) -> Plan:
    """Stages of these devices, with so many layers each."""
    ends = list(itertools.accumulate(layers for _, layers in parts))
    stages = tuple(
        Stage(f"s{i}", (end - layers, end), devices)
        for i, ((devices, layers), end) in enumerate(zip(parts, ends, strict=True))
    )
    return Plan("demo", "demo.yaml", stages, (Route(tuple(Hop(s.name, s.layers) for s in stages)),))


@pytest.mark.parametrize(("width", "depth"), [(1, 1), (2, 1), (3, 1), (4, 1), (1, 2), (2, 2), (1, 4)])
def test_no_equal_parts_fit(width: int, depth: int) -> None:
    for order in itertools.permutations(DEVICES, width * depth):
        groups = [order[i * width : (i + 1) * width] for i in range(depth)]
        with pytest.raises(InfeasibleError):
            plan_memory(pipeline(*((group, MODEL.layers // depth) for group in groups)), CLUSTER, MODEL)


def test_the_unequal_plan_fits_with_room_for_keys_and_values() -> None:
    memory = plan_memory(pipeline((("big/0", "big/1"), 4), (("small/0",), 1), (("mid/0",), 3)), CLUSTER, MODEL)
    assert memory.dtype == "float32"
    assert memory.kv_tokens[0] >= 512
