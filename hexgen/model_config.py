"""From a Hugging Face ``config.json`` to a ``ModelSpec``: four families, old and new spellings.

Defaults for missing keys are those of transformers' configuration classes, so that a checkpoint means the same
here as there. Whatever would change the arithmetic and is not supported is an error that names the key.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from hexgen.errors import SpecError
from hexgen.model_spec import DType, Family, ModelSpec, RopeSpec

_ARCHITECTURES: dict[str, Family] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
_DTYPES: dict[str, DType] = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16"}
_MOST = 1 << 24  # no dimension of any model is larger; what is would only exhaust memory
_ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": (),
}


@dataclass(frozen=True, slots=True)
class _Defaults:
    """What transformers' class assumes for keys that a config leaves out."""

    kv_heads: int | None  # None: as many as heads
    head_dim: int | None  # None: hidden_size / heads
    max_context: int
    bos: int | None
    eos: int | None
    sliding_window: int | None


_DEFAULTS: dict[Family, _Defaults] = {
    "llama": _Defaults(None, None, 2048, 1, 2, None),
    "mistral": _Defaults(8, None, 131072, 1, 2, 4096),
    "qwen2": _Defaults(32, None, 32768, None, None, 4096),
    "qwen3": _Defaults(32, 128, 32768, None, None, 4096),
}


class _Config:
    """Checked access to one JSON object; every complaint names the file and the key."""

    def __init__(self, values: Mapping[str, Any], where: str, prefix: str = "") -> None:
        self.values = values
        self.where = where
        self.prefix = prefix

    def fail(self, key: str, message: str, remedy: str | None = None) -> NoReturn:
        raise SpecError(message, where=f"{self.where}: {self.prefix}{key}", remedy=remedy)

    def integer(self, key: str, default: int | None = None, most: int = _MOST) -> int:
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            self.fail(key, "is missing", "is this the config of a language model?")
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            self.fail(key, f"must be a whole number between 1 and {most}, not {value!r}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.optional_number(key)
        if value is None:
            value = default
        if value is None:
            self.fail(key, "is missing")
        return value

    def optional_number(self, key: str) -> float | None:
        value = self.values.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.fail(key, f"must be a number, not {value!r}")
        if not math.isfinite(value) or value <= 0:
            self.fail(key, f"must be a positive number, not {value!r}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            self.fail(key, f"must be true or false, not {value!r}")
        return value


def model_from_config(config: Mapping[str, Any], name: str, where: str) -> ModelSpec:
    """The shape that ``config`` (a parsed ``config.json``) describes; ``where`` names its file in errors."""
    c = _Config(config, where)
    family = _family(c)
    defaults = _DEFAULTS[family]
    _refuse_unsupported(c)
    layers = c.integer("num_hidden_layers", most=10_000)
    hidden = c.integer("hidden_size")
    heads = c.integer("num_attention_heads", most=65_536)
    # A null is what older files wrote for "as many as heads"; a missing key is the class's own default.
    kv_default = heads if "num_key_value_heads" in config or defaults.kv_heads is None else defaults.kv_heads
    kv_heads = c.integer("num_key_value_heads", kv_default, most=65_536)
    if heads % kv_heads:
        c.fail("num_key_value_heads", f"{kv_heads} does not divide {heads} attention heads")
    head_dim = _head_dim(c, hidden, heads, defaults.head_dim)
    attention_bias = c.flag("attention_bias", False) if family in ("llama", "qwen3") else False
    context = c.integer("max_position_embeddings", defaults.max_context)
    rope = _rope(c, context)
    vocab = c.integer("vocab_size")
    return ModelSpec(
        name=name,
        family=family,
        layers=layers,
        hidden_size=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=c.integer("intermediate_size"),
        vocab_size=vocab,
        max_context=_usable_context(context, rope),
        tie_embeddings=c.flag("tie_word_embeddings", False),
        qkv_bias=family == "qwen2" or attention_bias,
        o_bias=attention_bias,
        mlp_bias=c.flag("mlp_bias", False) if family == "llama" else False,
        qk_norm=family == "qwen3",
        norm_eps=c.number("rms_norm_eps", 1e-6),
        rope=rope,
        sliding_windows=_windows(c, family, layers, defaults),
        dtype=_dtype(c),
        eos_token_ids=_token_ids(c, "eos_token_id", defaults.eos, vocab),
        bos_token_id=next(iter(_token_ids(c, "bos_token_id", defaults.bos, vocab)), None),
    )


def _family(c: _Config) -> Family:
    supported = "supported: " + ", ".join(_ARCHITECTURES)
    architectures = c.values.get("architectures")
    if isinstance(architectures, list) and architectures:
        known = [_ARCHITECTURES[a] for a in architectures if isinstance(a, str) and a in _ARCHITECTURES]
        if not known:
            c.fail("architectures", f"{architectures[0]!r} is not supported", supported)
        return known[0]
    model_type = c.values.get("model_type")
    for family in _ARCHITECTURES.values():
        if model_type == family:
            return family
    if model_type is None:
        c.fail("architectures", "is missing, and so is model_type", supported)
    close = difflib.get_close_matches(str(model_type), list(_ARCHITECTURES.values()), n=1)
    c.fail("model_type", f"{model_type!r} is not supported", f"{supported}" if not close else f"like {close[0]}?")


def _refuse_unsupported(c: _Config) -> None:
    if c.values.get("quantization_config") is not None:
        c.fail("quantization_config", "quantized checkpoints are not supported", "use the unquantized one")
    activation = c.values.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        c.fail("hidden_act", f"{activation!r} is not supported", "only silu is")
    if c.values.get("partial_rotary_factor") not in (None, 1, 1.0):
        c.fail("partial_rotary_factor", "rotating a part of each head is not supported")


def _head_dim(c: _Config, hidden: int, heads: int, default: int | None) -> int:
    if default is None or c.values.get("head_dim", default) is None:
        if c.values.get("head_dim") is None and hidden % heads:
            c.fail("hidden_size", f"{hidden} is not a multiple of {heads} attention heads", "or give head_dim")
        default = max(1, hidden // heads)
    head_dim = c.integer("head_dim", default, most=65_536)
    if head_dim % 2:
        c.fail("head_dim", f"{head_dim} is odd, and rotary embedding works on pairs")
    return head_dim


def _rope(c: _Config, context: int) -> RopeSpec:
    """``rope_scaling`` beside ``rope_theta`` (old), or ``rope_parameters`` with all of it (new)."""
    key = "rope_scaling" if c.values.get("rope_scaling") else "rope_parameters"
    values = c.values.get(key) or {}
    if not isinstance(values, Mapping):
        c.fail(key, f"must be an object, not {values!r}")
    if any(isinstance(v, Mapping) for v in values.values()):
        c.fail(key, "rotary parameters that differ between layers are not supported")
    rope = _Config(values, c.where, f"{key}.")
    theta = rope.optional_number("rope_theta") or c.number("rope_theta", 10000.0)
    kind = values.get("rope_type") or values.get("type") or "default"
    if kind not in _ROPE_KEYS:
        rope.fail("rope_type", f"{kind!r} is not supported", "supported: " + ", ".join(_ROPE_KEYS))
    for needed in _ROPE_KEYS[kind]:
        rope.number(needed)
    if values.get("partial_rotary_factor") not in (None, 1, 1.0):
        rope.fail("partial_rotary_factor", "rotating a part of each head is not supported")
    if kind == "default":
        return RopeSpec(theta=theta)
    if kind == "linear":
        return RopeSpec(theta=theta, kind="linear", factor=rope.number("factor"))
    if kind == "dynamic":
        # The formula's reference length is max_position_embeddings itself (transformers ignores any other).
        return RopeSpec(theta, "dynamic", rope.number("factor"), original_max_context=context)
    # transformers gives a top-level original_max_position_embeddings priority over the nested one.
    at = c if c.values.get("original_max_position_embeddings") is not None else rope
    original = at.integer("original_max_position_embeddings", context)
    if kind == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if low >= high:
            rope.fail("low_freq_factor", f"{low} must be below high_freq_factor ({high})")
        return RopeSpec(theta, "llama3", rope.number("factor"), original, low, high)
    return RopeSpec(
        theta=theta,
        kind="yarn",
        factor=rope.number("factor", context / original),
        original_max_context=original,
        beta_fast=rope.optional_number("beta_fast"),
        beta_slow=rope.optional_number("beta_slow"),
        attention_factor=rope.optional_number("attention_factor"),
        mscale=rope.optional_number("mscale"),
        mscale_all_dim=rope.optional_number("mscale_all_dim"),
        truncate=rope.flag("truncate", True),
    )


def _usable_context(context: int, rope: RopeSpec) -> int:
    """Tokens the model may see: scaled kinds stretch the length it was trained at by their factor."""
    if rope.kind in ("linear", "dynamic"):
        return max(context, int(context * rope.factor))
    if rope.kind == "yarn" and rope.original_max_context is not None:
        return max(context, int(rope.original_max_context * rope.factor))
    return context


def _windows(c: _Config, family: Family, layers: int, defaults: _Defaults) -> tuple[int | None, ...]:
    if family == "llama":
        return ()
    if c.values.get("sliding_window", 0) is None:
        return ()
    if family == "mistral":
        return (c.integer("sliding_window", defaults.sliding_window),) * layers
    if not c.flag("use_sliding_window", False):
        return ()
    window = c.integer("sliding_window", defaults.sliding_window)
    types = c.values.get("layer_types")
    if types is None:
        first = c.values.get("max_window_layers", 28)
        if isinstance(first, bool) or not isinstance(first, int) or first < 0:
            c.fail("max_window_layers", f"must be a whole number, not {first!r}")
        windows = tuple(window if i >= first else None for i in range(layers))
    else:
        if not isinstance(types, list) or len(types) != layers:
            c.fail("layer_types", f"must name one type for each of {layers} layers")
        for kind in types:
            if kind not in ("full_attention", "sliding_attention"):
                c.fail("layer_types", f"{kind!r} is not supported", "full_attention and sliding_attention are")
        windows = tuple(window if kind == "sliding_attention" else None for kind in types)
    return windows if any(windows) else ()


def _dtype(c: _Config) -> DType:
    key = "dtype" if c.values.get("dtype") is not None else "torch_dtype"
    value = c.values.get(key)
    if value is None:
        return "float32"  # what torch makes where nobody says otherwise
    dtype = _DTYPES.get(str(value).removeprefix("torch."))
    if dtype is None:
        c.fail(key, f"{value!r} is not supported", "supported: " + ", ".join(_DTYPES))
    return dtype


def _token_ids(c: _Config, key: str, default: int | None, vocab: int) -> tuple[int, ...]:
    """One id, a list of them, or null. Ids outside the vocabulary (some files write -1) can never be sampled."""
    value = c.values.get(key, default)
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if len(ids) > 1024 or any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
        c.fail(key, f"must be a token id or a list of them, not {str(value)[:80]}")
    return tuple(dict.fromkeys(i for i in ids if 0 <= i < vocab))
