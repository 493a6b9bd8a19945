"""The tests' oracle: tiny random Hugging Face checkpoints of every family, and what transformers makes of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

# Small in every dimension, and nothing divides anything else: 6 heads, 3 KV heads, 44 columns, 101 ids.
_TINY: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 44,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "vocab_size": 101,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    # Large weights: next-token distributions are peaked, so that the best token does not hang on rounding.
    "initializer_range": 0.3,
}
_CLASSES: dict[str, Any] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}


def _rope(kind: str, **rest: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **rest}}


# name -> (family, what differs from _TINY). One of each thing that a family or a rope kind can be.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-mha": ("llama", {"num_key_value_heads": 6}),
    "llama-mqa": ("llama", {"num_key_value_heads": 1}),
    "llama-bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-wide": ("llama", {"num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 8}),
    "llama-linear": ("llama", _rope("linear", factor=4.0)),
    "llama-dynamic": ("llama", {"max_position_embeddings": 32, **_rope("dynamic", factor=4.0)}),
    "llama-llama3": (
        "llama",
        _rope(
            "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
        ),
    ),
    "llama-yarn": ("llama", _rope("yarn", factor=4.0, original_max_position_embeddings=32)),
    "mistral": ("mistral", {"sliding_window": 9}),
    "mistral-full": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3-tied": ("qwen3", {"head_dim": 8, "tie_word_embeddings": True}),
}


def make_checkpoint(
    directory: Path,
    variant: str = "llama",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    old_spelling: bool = False,
    **overrides: Any,
) -> Path:
    """Write a tiny random model of ``variant`` (with more config fields overridden) to ``directory``, return it.

    ``old_spelling`` rewrites config.json as transformers 4 wrote it: rope_theta, rope_scaling, torch_dtype.
    """
    family, differs = VARIANTS[variant]
    config = _CLASSES[family](**{**_TINY, **differs, **overrides})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # biases start at zero and norms at one, which would hide mistakes
                spread = 0.3 * torch.randn(parameter.shape)
                parameter.copy_(spread if name.endswith("bias") else 1.0 + spread)
    model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    if old_spelling:
        _spell_as_before(directory / "config.json")
    return directory


def _spell_as_before(path: Path) -> None:
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    config["torch_dtype"] = config.pop("dtype", "float32")
    path.write_text(json.dumps(config))


def load_reference(directory: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """transformers' own model of the checkpoint, a fresh one: dynamic rope keeps state between calls."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    return model.eval()


def greedy(directory: Path, prompt: Sequence[int], max_tokens: int, *, ignore_eos: bool = True) -> list[int]:
    """The tokens that ``transformers.generate`` appends to ``prompt``, in float32."""
    model = load_reference(directory)
    model.generation_config.eos_token_id = None if ignore_eos else model.generation_config.eos_token_id
    model.generation_config.pad_token_id = 0
    with torch.inference_mode():
        ids = torch.tensor([list(prompt)])
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False
        )
    return [int(token) for token in output[0, len(prompt) :]]


def logits(directory: Path, tokens: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """``[tokens, vocab]`` float32, from one pass over the whole text."""
    with torch.inference_mode():
        result: torch.Tensor = load_reference(directory, dtype)(torch.tensor([list(tokens)])).logits[0].float()
    return result
