"""Shapes from config.json: the same model as transformers reads, in every family and spelling."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from hexgen.errors import CheckpointError, SpecError
from hexgen.memory import rank_weights_bytes
from hexgen.model import BUILTIN_CONFIGS, ModelSpec, RopeSpec, find_checkpoint, load_model, model_from_config
from hexgen.split import split_stage

BASE: dict[str, Any] = {
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "intermediate_size": 200,
    "vocab_size": 500,
    "max_position_embeddings": 256,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama-biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama-head-dim": {"model_type": "llama", "head_dim": 32},
    "llama-no-kv-heads": {"model_type": "llama", "num_key_value_heads": None},
    "mistral": {"model_type": "mistral"},
    "mistral-full": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2"},
    "qwen2-window": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 64,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "qwen3-default-head": {"model_type": "qwen3"},
    "qwen3-bias-types": {
        "model_type": "qwen3",
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 32,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "tie_word_embeddings": True,
    },
}


def oracle(config: dict[str, Any]) -> Any:
    kind = config.get("model_type") or {"L": "llama", "M": "mistral"}[config["architectures"][0][0]]
    return transformers.AutoConfig.for_model(kind, **{k: v for k, v in config.items() if k != "model_type"})


def meta_parameters(config: Any) -> int:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    return sum(p.numel() for p in model.parameters())


def check_same(spec: ModelSpec, reference: Any) -> None:
    assert spec.layers == reference.num_hidden_layers
    assert spec.heads == reference.num_attention_heads
    assert spec.kv_heads == reference.num_key_value_heads
    assert spec.head_dim == (
        getattr(reference, "head_dim", None) or reference.hidden_size // reference.num_attention_heads
    )
    assert spec.norm_eps == reference.rms_norm_eps
    assert spec.rope.theta == reference.rope_parameters["rope_theta"]
    assert spec.rope.kind == reference.rope_parameters["rope_type"]
    if spec.family == "mistral":
        windows = [reference.sliding_window] * spec.layers
    elif spec.family == "llama":
        windows = [None] * spec.layers
    else:
        windows = [
            reference.sliding_window if kind == "sliding_attention" else None for kind in reference.layer_types
        ]
    assert [spec.window(layer) for layer in range(spec.layers)] == windows
    eos = reference.eos_token_id
    expected = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
    assert spec.eos_token_ids == tuple(i for i in expected if i < spec.vocab_size)


@pytest.mark.parametrize("name", VARIANTS)
def test_families_equal_transformers(name: str) -> None:
    config = BASE | VARIANTS[name]
    spec = model_from_config(config, name, name)
    reference = oracle(config)
    check_same(spec, reference)
    parameters = meta_parameters(reference)
    assert spec.parameters == parameters
    whole = split_stage(spec, 1)[0]
    assert rank_weights_bytes(spec, "float32", spec.layers, whole, True, True) == 4 * parameters


@pytest.mark.parametrize("name", ["llama-1-30b", "llama-2-70b", "llama-3.1-8b", "qwen2.5-32b", "mistral-7b"])
def test_builtin_parameters_equal_transformers(name: str) -> None:
    config = dict(BUILTIN_CONFIGS[name])
    spec = load_model(name)
    reference = oracle(config)
    check_same(spec, reference)
    assert spec.parameters == meta_parameters(reference)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama-2-7b", 6.738),
        ("llama-2-13b", 13.016),
        ("llama-2-70b", 68.977),
        ("llama-3.1-70b", 70.554),
        ("qwen2.5-7b", 7.616),
        ("qwen2.5-72b", 72.706),
        ("mistral-7b", 7.248),
    ],
)
def test_builtin_sizes_are_the_published_ones(name: str, billions: float) -> None:
    assert load_model(name).parameters / 1e9 == pytest.approx(billions, abs=5e-4)


ROPES: dict[str, dict[str, Any]] = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16.0, "truncate": False},
}


@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("type_key", ["type", "rope_type"])
def test_old_and_new_rope_spellings_mean_the_same(kind: str, type_key: str) -> None:
    old = BASE | {"model_type": "llama", "rope_theta": 5e5, "torch_dtype": "bfloat16"}
    old["rope_scaling"] = {type_key: kind, **ROPES[kind]}
    new = BASE | {"model_type": "llama", "dtype": "bfloat16"}
    new["rope_parameters"] = {"rope_type": kind, "rope_theta": 5e5, **ROPES[kind]}
    spec = model_from_config(old, "m", "old")
    assert spec == model_from_config(new, "m", "new")
    assert spec.rope.kind == kind
    assert spec.rope.theta == 5e5
    assert spec.rope.factor == ROPES[kind]["factor"]
    assert spec.dtype == "bfloat16"
    reference = oracle(new).rope_parameters
    assert reference["rope_type"] == kind
    if kind in ("llama3", "yarn"):
        assert spec.rope.original_max_context == reference["original_max_position_embeddings"]


def test_usable_context_follows_the_scaling() -> None:
    def context(rope: dict[str, Any] | None) -> int:
        return model_from_config(BASE | {"model_type": "llama", "rope_scaling": rope}, "m", "m").max_context

    assert context(None) == 256
    assert context({"type": "linear", "factor": 2.0}) == 512
    assert context({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}) == 1024
    assert context({"rope_type": "llama3", **ROPES["llama3"]}) == 256


def test_a_directory_with_its_generation_config(tmp_path: Path) -> None:
    config = BASE | {"architectures": ["Qwen2ForCausalLM"], "eos_token_id": 7}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_model(tmp_path).eos_token_ids == (7,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 7, 9]}))
    spec = load_model(tmp_path)
    assert spec.eos_token_ids == (9, 7)
    assert spec.name == str(tmp_path.resolve())
    assert find_checkpoint(tmp_path) == tmp_path.resolve()
    assert load_model(tmp_path.name, base_dir=tmp_path.parent) == spec


def test_the_dtype_comes_from_the_weights_where_the_config_is_silent(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(BASE | {"model_type": "llama"}))
    assert load_model(tmp_path).dtype == "float32"
    save_file({"a": torch.zeros(2, dtype=torch.float16)}, tmp_path / "model.safetensors")
    assert load_model(tmp_path).dtype == "float16"
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(CheckpointError, match="truncated"):
        load_model(tmp_path)


def test_a_hub_id_is_found_in_the_local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(SpecError, match="nor a model in the local Hugging Face cache"):
        load_model("someone/small-model")
    repository = tmp_path / "models--someone--small-model"
    snapshot = repository / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc123")
    (snapshot / "config.json").write_text(json.dumps(BASE | {"model_type": "llama"}))
    assert find_checkpoint("someone/small-model") == snapshot
    assert load_model("someone/small-model").hidden_size == 96


def test_names() -> None:
    assert load_model("demo").layers == 8
    assert find_checkpoint("llama-2-7b") is None
    with pytest.raises(SpecError, match=r"did you mean llama-2-7b"):
        load_model("lama-2-7b", where="cluster.yaml: model")
    for strange in ("", "no/such", "a\0b", "x" * 5000, "../" * 10, "nobody/nothing-of-that-name"):
        with pytest.raises(SpecError):
            load_model(strange)


BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"architectures": ["GPT2LMHeadModel"]}, "architectures: 'GPT2LMHeadModel' is not supported"),
    ({"model_type": "gpt2"}, "model_type: 'gpt2'"),
    ({"model_type": None}, "architectures: is missing"),
    ({"hidden_size": None}, "hidden_size: is missing"),
    ({"hidden_size": "96"}, "hidden_size: must be a whole number"),
    ({"hidden_size": 10**12}, "hidden_size: must be"),
    ({"num_hidden_layers": 0}, "num_hidden_layers"),
    ({"num_hidden_layers": True}, "num_hidden_layers"),
    ({"num_key_value_heads": 4}, "num_key_value_heads: 4 does not divide 6"),
    ({"num_attention_heads": 7, "num_key_value_heads": 7}, "not a multiple"),
    ({"head_dim": 15}, "head_dim: 15 is odd"),
    ({"hidden_act": "gelu"}, "hidden_act: 'gelu'"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope_scaling.rope_type: 'longrope'"),
    ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor: is missing"),
    ({"rope_scaling": {"type": "linear", "factor": "2"}}, "rope_scaling.factor: must be a number"),
    ({"rope_scaling": [1]}, "rope_scaling: must be an object"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "differ between layers"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"rms_norm_eps": -1.0}, "rms_norm_eps"),
    ({"rms_norm_eps": float("inf")}, "rms_norm_eps"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ({"torch_dtype": "float8_e4m3fn"}, "torch_dtype: 'float8_e4m3fn'"),
    ({"eos_token_id": "</s>"}, "eos_token_id"),
    ({"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["full_attention"]}, "layer_types"),
]


@pytest.mark.parametrize(("change", "message"), BROKEN)
def test_what_is_wrong_is_named_with_file_and_key(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as caught:
        model_from_config(BASE | {"model_type": "llama"} | change, "m", "dir/config.json")
    assert str(caught.value).startswith("dir/config.json: ")
    assert message in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "[" * 100_000, '{"a": NaN'])
def test_broken_files(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(SpecError, match=r"config\.json"):
        load_model(tmp_path)


def test_null_token_ids_and_default_rope() -> None:
    spec = model_from_config(
        BASE | {"model_type": "llama", "eos_token_id": None, "bos_token_id": None, "rope_scaling": None}, "m", "m"
    )
    assert spec.eos_token_ids == ()
    assert spec.bos_token_id is None
    assert spec.rope == RopeSpec(theta=10000.0)
