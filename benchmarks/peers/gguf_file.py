"""A Llama checkpoint in safetensors as a GGUF file for llama.cpp: the same numbers, in the same dtype.

Runs in llama.cpp's environment (numpy and gguf, no torch). Vectors become float32, as llama.cpp wants them, which
is exact. Without a tokenizer: token ids go in and come out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np

DTYPES = {"F32": gguf.GGMLQuantizationType.F32, "BF16": gguf.GGMLQuantizationType.BF16}
# llama.cpp's names of what a layer holds: gguf's table of tensors of the architecture "llama".
LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def tensors(path: Path) -> Iterator[tuple[str, str, np.ndarray]]:
    """(name, dtype, numbers) of a safetensors file; bfloat16 as its 16 bits."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] not in DTYPES:
                raise ValueError(f"{name}: no dtype {entry['dtype']} here, only {sorted(DTYPES)}")
            begin, end = entry["data_offsets"]
            file.seek(8 + size + begin)
            kind = np.float32 if entry["dtype"] == "F32" else np.uint16
            yield name, entry["dtype"], np.frombuffer(file.read(end - begin), kind).reshape(entry["shape"])


def name_in_gguf(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in WHOLE:
        return f"{WHOLE[stem]}.weight"
    _, _, number, part = stem.split(".", 3)
    if part not in LAYER:
        raise ValueError(f"{name} is not of a plain Llama")
    return f"blk.{number}.{LAYER[part]}.weight"


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows in llama.cpp's order: it rotates neighbours, Hugging Face's Llama the halves of a head."""
    outputs, inputs = weight.shape
    halves = weight.reshape(heads, 2, outputs // heads // 2, inputs)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(outputs, inputs)


def write(model: Path, to: Path) -> None:
    """``ValueError`` where the checkpoint is no Llama without rope scaling in float32 or bfloat16."""
    config = json.loads((model / "config.json").read_text())
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if config.get("model_type") != "llama" or rope.get("rope_type", "default") != "default":
        raise ValueError("only Llama checkpoints without rope scaling are written as GGUF here")
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    dim = config.get("head_dim") or config["hidden_size"] // heads
    writer = gguf.GGUFWriter(str(to), "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(dim)
    writer.add_value_length(dim)
    writer.add_rope_dimension_count(dim)
    writer.add_rope_freq_base(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    for path in sorted(model.glob("*.safetensors")):
        for name, dtype, values in tensors(path):
            if values.ndim == 1:
                wide = values if dtype == "F32" else (values.astype(np.uint32) << 16).view(np.float32)
                writer.add_tensor(name_in_gguf(name), wide)
                continue
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                values = interleaved(values, heads if name.endswith("q_proj.weight") else kv_heads)
            raw = values if dtype == "F32" else values.view(np.uint8)
            writer.add_tensor(name_in_gguf(name), raw, raw_dtype=DTYPES[dtype])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
