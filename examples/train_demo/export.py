"""Writes a Hugging Face directory: what transformers, and hexgen, load a model from."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from train_demo.corpus import ASSISTANT, END, END_OF_TEXT, SPECIAL_TOKENS
from train_demo.model import Shape

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '" + ASSISTANT + "' }}{% endif %}"
)


def export(folder: Path, shape: Shape, weights: dict[str, Tensor], tokenizer: Tokenizer) -> None:
    """Write weights (bfloat16), configuration and tokenizer; each file is replaced at once."""
    folder.mkdir(parents=True, exist_ok=True)
    stop, end = tokenizer.token_to_id(END_OF_TEXT), tokenizer.token_to_id(END)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": shape.max_positions,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "use_cache": True,
        "bos_token_id": stop,
        "eos_token_id": stop,
        "pad_token_id": stop,
        "torch_dtype": "bfloat16",
    }
    generation = {
        "bos_token_id": stop,
        "eos_token_id": [stop, end],
        "pad_token_id": stop,
        "do_sample": False,
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "additional_special_tokens": SPECIAL_TOKENS[1:],
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": shape.max_positions,
        "chat_template": CHAT_TEMPLATE,
    }
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", generation)
    _write_json(folder / "tokenizer_config.json", tokenizer_config)
    _replace(folder / "tokenizer.json", lambda path: tokenizer.save(str(path)))
    halved = {name: w.detach().to(torch.bfloat16).contiguous() for name, w in weights.items()}
    _replace(
        folder / "model.safetensors",
        lambda path: save_file(halved, path, metadata={"format": "pt"}),
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    _replace(path, lambda new: new.write_text(json.dumps(content, indent=2) + "\n"))


def _replace(path: Path, write: Any) -> None:
    new = path.with_name(path.name + ".new")
    write(new)
    new.chmod(0o644)
    os.replace(new, path)
