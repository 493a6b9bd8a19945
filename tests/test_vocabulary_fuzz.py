"""Files with something wrong anywhere in them: a ``SpecError``, never another exception."""

import copy
import json
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from vocabulary_strategies import MODEL

from hexgen.cluster import parse_cluster
from hexgen.errors import HexgenError
from hexgen.model import BUILTIN_CONFIGS, model_from_config
from hexgen.plan import parse_plan
from hexgen.validate import check_plan
from hexgen.yamlfile import read_yaml

SPECS = Path(__file__).parent.parent / "cluster_specs"
CLUSTER = read_yaml(SPECS / "mixed.yaml") | {
    "devices": {"mine": {"memory": "24GB", "bandwidth": "936GB/s", "fp16": "142TFLOPS", "capability": "8.6"}},
}
PLAN: dict[str, Any] = {
    "version": 1,
    "model": "tiny",
    "cluster": {"nodes": [{"name": "a", "device": "cpu", "count": 4, "memory": "1GB"}]},
    "stages": {
        "s0": {"layers": [0, 4], "devices": ["a/0", "a/1"], "shares": [2, 1]},
        "s1": {"layers": [4, 8], "devices": ["a/2"]},
    },
    "routes": [{"weight": 1.0, "path": ["s0", {"stage": "s1", "layers": [4, 8]}], "kv_tokens": 4096}],
    "engine": {"dtype": "float32", "page_size": 16, "token_budget": 64, "max_sequences": 4, "max_context": 256},
    "predicted": {
        "objective": "throughput", "tokens_s": 1.0, "requests_s": 1.0, "ttft_s": 1.0, "tpot_s": 1.0,
        "latency_s": 1.0, "single_tokens_s": 1.0, "bottleneck": "s0",
        "devices": [{"device": "a/0", "weights_bytes": 1, "kv_bytes": 1, "buffers_bytes": 1, "memory_bytes": 4}],
        "stages": [{"stage": "s0", "prefill_step_s": 1.0, "decode_step_s": 1.0, "utilisation": 0.5}],
    },
}  # fmt: skip
CONFIG = json.loads(json.dumps(dict(BUILTIN_CONFIGS["llama-3.1-8b"])))

strange = (
    st.sampled_from([
        None, True, 0, -1, 1, 10**30, 2.5, float("nan"), float("inf"), "", "x", "s0", "s1", "a/0", "a/99",
        "1GB", "-1GB", "1Gbps", "5us", "$i",
        "a\n", "\x00", "é" * 5000, [], {}, [[]], [0, 0], [8, 4], {"a": {"b": []}}, b"x",
    ])
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
)  # fmt: skip


@st.composite
def damaged(draw: st.DrawFn, valid: dict[str, Any]) -> dict[str, Any]:
    """A copy with one to three values replaced, keys renamed or entries repeated."""
    value = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 3))):
        at: Any = value
        while True:
            keys = list(at) if isinstance(at, dict) else list(range(len(at)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            child = at[key]
            if isinstance(child, dict | list) and child and draw(st.integers(0, 3)):
                at = child
                continue
            match draw(st.integers(0, 4)):
                case 0 if isinstance(at, dict):
                    at[draw(st.sampled_from(["", "x", 7, None, "name", "layers"]))] = at.pop(key)
                case 1:
                    at.pop(key)
                case 2 if isinstance(at, list):
                    at.append(copy.deepcopy(child))
                case _:
                    at[key] = copy.deepcopy(draw(strange))
            break
    return value


@settings(deadline=None, max_examples=100)
@given(damaged(CLUSTER))
def test_clusters(value: dict[str, Any]) -> None:
    try:
        parse_cluster(value, "c.yaml").devices()
    except HexgenError as error:
        assert str(error).startswith("c.yaml") and "\n" not in str(error)  # noqa: PT017, PT018


@settings(deadline=None, max_examples=100)
@given(damaged(PLAN))
def test_plans(value: dict[str, Any]) -> None:
    try:
        plan = parse_plan(value, "p.yaml")
        if not isinstance(plan.cluster, str):
            check_plan(plan, plan.cluster, MODEL, "p.yaml")
    except HexgenError as error:
        assert "\n" not in str(error)  # noqa: PT017


@settings(deadline=None, max_examples=100)
@given(damaged(CONFIG))
def test_model_configs(value: dict[str, Any]) -> None:
    try:
        assert model_from_config(value, "m", "config.json").parameters > 0
    except HexgenError as error:
        assert str(error).startswith("config.json: ")  # noqa: PT017
