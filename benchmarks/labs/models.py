"""The models that are served, and clusters with as much more memory as a model is larger."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from hexgen.cluster import Cluster
from hexgen.model import DTYPE_BYTES, ModelSpec, load_model

# A Llama of 100.7 million parameters.
RANDOM_100M: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "intermediate_size": 2048,
    "vocab_size": 10240,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
SEED = 1


def reference(name: str, folder: Path) -> str:
    """What commands call the model: ``demo`` as it is, ``random100m`` written below ``folder``."""
    return str(write_random(folder / name)) if name == "random100m" else name


def write_random(folder: Path) -> Path:
    """A checkpoint of random weights, the same ones each time."""
    if (folder / "model.safetensors").exists():
        return folder
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(RANDOM_100M))
    random = torch.Generator().manual_seed(SEED)
    hidden, mlp, vocabulary = (RANDOM_100M[key] for key in ("hidden_size", "intermediate_size", "vocab_size"))

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=random) * 0.02).bfloat16()

    tensors = {
        "model.embed_tokens.weight": normal(vocabulary, hidden),
        "lm_head.weight": normal(vocabulary, hidden),
    }
    tensors["model.norm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    for number in range(RANDOM_100M["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        for name in ("q", "k", "v", "o"):
            tensors[f"{layer}.self_attn.{name}_proj.weight"] = normal(hidden, hidden)
        for name in ("gate", "up"):
            tensors[f"{layer}.mlp.{name}_proj.weight"] = normal(mlp, hidden)
        tensors[f"{layer}.mlp.down_proj.weight"] = normal(hidden, mlp)
        for name in ("input", "post_attention"):
            tensors[f"{layer}.{name}_layernorm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors")
    return folder


def weights_bytes(model: ModelSpec) -> int:
    """As CPU workers hold them, in float32."""
    embedding = model.vocab_size * model.hidden_size * (1 if model.tie_embeddings else 2)
    return (model.layers * model.layer_parameters + embedding) * DTYPE_BYTES["float32"]


def scaled(cluster: Cluster, model: ModelSpec) -> Cluster:
    """The cluster with memory in proportion to the weights; it was made for the bundled model."""
    ratio = weights_bytes(model) / weights_bytes(load_model("demo"))
    nodes = [
        dataclasses.replace(
            node,
            memory_bytes=_scaled(node.memory_bytes, ratio),
            device=dataclasses.replace(node.device, memory_bytes=_scaled(node.device.memory_bytes, ratio) or 0),
        )
        for node in cluster.nodes
    ]
    return dataclasses.replace(cluster, nodes=tuple(nodes))


def _scaled(memory_bytes: int | None, ratio: float) -> int | None:
    return None if memory_bytes is None else round(memory_bytes * ratio / 1e6) * 1_000_000
