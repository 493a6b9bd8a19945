"""Model shapes, and the arithmetic of their bytes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Family = Literal["llama", "mistral", "qwen2", "qwen3"]
DType = Literal["float32", "bfloat16", "float16"]
DTYPE_BYTES: dict[DType, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary embedding. ``kind`` and the optional figures follow transformers' ``rope_parameters``.

    ``original_max_context`` (tokens) is set for every kind that refers to a length: for ``dynamic`` it is the
    config's ``max_position_embeddings``, from which the base grows.
    """

    theta: float = 10000.0
    kind: Literal["default", "linear", "dynamic", "llama3", "yarn"] = "default"
    factor: float = 1.0
    original_max_context: int | None = None
    low_freq_factor: float | None = None  # llama3
    high_freq_factor: float | None = None  # llama3
    beta_fast: float | None = None  # yarn
    beta_slow: float | None = None  # yarn
    attention_factor: float | None = None  # yarn
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder-only transformer of the Llama kind: everything that decides its tensors and its arithmetic."""

    name: str  # a built-in name, or the checkpoint's directory
    family: Family
    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_context: int  # tokens
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    norm_eps: float = 1e-6
    rope: RopeSpec = field(default_factory=RopeSpec)
    # Window in tokens of each layer (None: the whole context). Empty: no layer has one.
    sliding_windows: tuple[int | None, ...] = ()
    dtype: DType = "bfloat16"  # the checkpoint's own
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None

    def window(self, layer: int) -> int | None:
        return self.sliding_windows[layer] if self.sliding_windows else None

    # ---- parameters (elements); bytes are these times DTYPE_BYTES -----------------------------------------

    @property
    def attention_parameters(self) -> int:
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        weights = self.hidden_size * (q + 2 * kv) + q * self.hidden_size
        biases = (q + 2 * kv if self.qkv_bias else 0) + (self.hidden_size if self.o_bias else 0)
        return weights + biases + (2 * self.head_dim if self.qk_norm else 0)

    @property
    def mlp_parameters(self) -> int:
        biases = (2 * self.intermediate_size + self.hidden_size) if self.mlp_bias else 0
        return 3 * self.hidden_size * self.intermediate_size + biases

    @property
    def layer_parameters(self) -> int:
        return self.attention_parameters + self.mlp_parameters + 2 * self.hidden_size

    @property
    def embedding_parameters(self) -> int:
        return self.vocab_size * self.hidden_size

    @property
    def head_parameters(self) -> int:
        """The output head with its final norm; a tied head adds only the norm to the embedding it shares."""
        return self.hidden_size + (0 if self.tie_embeddings else self.embedding_parameters)

    @property
    def parameters(self) -> int:
        return self.layers * self.layer_parameters + self.embedding_parameters + self.head_parameters

    def kv_bytes_per_token(self, dtype: DType, layers: int | None = None) -> int:
        """Bytes of keys and values of one token over ``layers`` layers (default: all)."""
        n = self.layers if layers is None else layers
        return 2 * n * self.kv_heads * self.head_dim * DTYPE_BYTES[dtype]
