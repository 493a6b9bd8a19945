"""One transformer layer of a rank: its weights, how they are read from a checkpoint, and its forward pass by
torch's operations or the CUDA kernels. (``cpu_kernels.py`` has the forward pass of CPUs.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from hexgen.model import ModelSpec
from hexgen.split import RankSlice
from hexgen.worker.attention import HeadLayout
from hexgen.worker.attention_choice import choose_operations
from hexgen.worker.batch_inputs import BatchInputs
from hexgen.worker.communicator import Communicator
from hexgen.worker.kv import KVLayer
from hexgen.worker.weight_layouts import Layout


@dataclass(frozen=True, slots=True)
class Part:
    """A slice of one checkpoint tensor: rows or columns ``[start, end)`` of dimension ``dim``, or all of it."""

    name: str
    shape: tuple[int, ...]  # of the whole tensor
    dim: int | None = None
    start: int | None = None
    end: int | None = None


Read = Callable[[Part], torch.Tensor]


def layer_parts(model: ModelSpec, rank: RankSlice, layer: int) -> dict[str, Part]:
    """What a rank reads of one layer, by role."""
    prefix, dim, hidden = f"model.layers.{layer}.", model.head_dim, model.hidden_size
    attention, mlp = prefix + "self_attn.", prefix + "mlp."
    q_rows = (rank.query_heads[0] * dim, rank.query_heads[1] * dim)
    kv_rows = (rank.kv_heads[0] * dim, rank.kv_heads[1] * dim)
    columns = rank.columns
    q, kv, wide = model.heads * dim, model.kv_heads * dim, model.intermediate_size
    parts = {
        "input_norm": Part(prefix + "input_layernorm.weight", (hidden,)),
        "q": Part(attention + "q_proj.weight", (q, hidden), 0, *q_rows),
        "k": Part(attention + "k_proj.weight", (kv, hidden), 0, *kv_rows),
        "v": Part(attention + "v_proj.weight", (kv, hidden), 0, *kv_rows),
        "o": Part(attention + "o_proj.weight", (hidden, q), 1, *q_rows),
        "post_norm": Part(prefix + "post_attention_layernorm.weight", (hidden,)),
        "gate": Part(mlp + "gate_proj.weight", (wide, hidden), 0, *columns),
        "up": Part(mlp + "up_proj.weight", (wide, hidden), 0, *columns),
        "down": Part(mlp + "down_proj.weight", (hidden, wide), 1, *columns),
    }
    if model.qkv_bias:
        parts["q_bias"] = Part(attention + "q_proj.bias", (q,), 0, *q_rows)
        parts["k_bias"] = Part(attention + "k_proj.bias", (kv,), 0, *kv_rows)
        parts["v_bias"] = Part(attention + "v_proj.bias", (kv,), 0, *kv_rows)
    if model.o_bias:
        parts["o_bias"] = Part(attention + "o_proj.bias", (hidden,))
    if model.qk_norm:
        parts["q_norm"] = Part(attention + "q_norm.weight", (dim,))
        parts["k_norm"] = Part(attention + "k_norm.weight", (dim,))
    if model.mlp_bias:
        parts["gate_bias"] = Part(mlp + "gate_proj.bias", (wide,), 0, *columns)
        parts["up_bias"] = Part(mlp + "up_proj.bias", (wide,), 0, *columns)
        parts["down_bias"] = Part(mlp + "down_proj.bias", (hidden,))
    return parts


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """A rank's share of one layer, on its device, in its dtype. Shapes of matrices are those of ``Transposed``."""

    input_norm: torch.Tensor  # [hidden]
    qkv: torch.Tensor  # [hidden, (query heads + 2 kv heads) * head_dim]
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None  # [head_dim]
    k_norm: torch.Tensor | None  # [head_dim]
    o: torch.Tensor  # [query heads * head_dim, hidden]
    o_bias: torch.Tensor | None  # [hidden], added by rank 0
    post_norm: torch.Tensor  # [hidden]
    gate_up: torch.Tensor  # [hidden, 2 * columns]
    gate_up_bias: torch.Tensor | None
    down: torch.Tensor  # [columns, hidden]
    down_bias: torch.Tensor | None  # [hidden], added by rank 0

    @staticmethod
    def load(model: ModelSpec, rank: RankSlice, layer: int, read: Read, layout: Layout) -> LayerWeights:
        parts = layer_parts(model, rank, layer)

        def one(role: str) -> torch.Tensor | None:
            return read(parts[role]) if role in parts else None

        def bias(*roles: str) -> torch.Tensor | None:
            return torch.cat([read(parts[role]) for role in roles]) if roles[0] in parts else None

        def fused(*roles: str) -> torch.Tensor:
            return layout.matrix(*(read(parts[role]) for role in roles))

        return LayerWeights(
            input_norm=read(parts["input_norm"]),
            qkv=fused("q", "k", "v"),
            qkv_bias=bias("q_bias", "k_bias", "v_bias"),
            q_norm=one("q_norm"),
            k_norm=one("k_norm"),
            o=fused("o"),
            o_bias=one("o_bias"),
            post_norm=read(parts["post_norm"]),
            gate_up=layout.gate_up(read(parts["gate"]), read(parts["up"])),
            gate_up_bias=bias("gate_bias", "up_bias"),
            down=fused("down"),
            down_bias=one("down_bias"),
        )

    def tensors(self) -> list[torch.Tensor]:
        values = (getattr(self, name) for name in self.__slots__)
        return [value for value in values if value is not None]


class RMSNorm:
    """x / sqrt(mean(x^2) + eps) * weight in float32, cast before the weight (Zhang & Sennrich, arXiv:1910.07467).

    torch's own ``rms_norm`` is a chain of some six operations on CPUs; a fused 2-norm makes it five cheaper ones.
    """

    def __init__(self, size: int, eps: float, device: torch.device) -> None:
        self._inverse_size = 1.0 / size
        self._eps = torch.tensor(eps, dtype=torch.float32, device=device)

    def scale(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., size]`` -> float32 ``[..., 1]``: what a row is multiplied by."""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        return torch.addcmul(self._eps, norm, norm, value=self._inverse_size).rsqrt_()

    def __call__(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if x.dtype == torch.float32:
            return (x * self.scale(x)).mul_(weight)
        return (x.float() * self.scale(x)).to(x.dtype).mul_(weight)


@dataclass(frozen=True, slots=True)
class StepContext:
    """What every layer of one forward pass shares."""

    batch: BatchInputs
    cos: torch.Tensor  # [tokens, 1, head_dim]
    sin: torch.Tensor  # [tokens, 1, head_dim], signed for swapped halves


class LayerRunner:
    """The forward pass of one layer on one rank, all that is the same for all layers worked out beforehand."""

    def __init__(
        self,
        model: ModelSpec,
        rank: RankSlice,
        communicator: Communicator,
        device: torch.device,
        dtype: torch.dtype,
        page_size: int,
    ) -> None:
        dim = model.head_dim
        self._heads = HeadLayout.make(rank.query_heads, rank.kv_heads, model.heads // model.kv_heads, dim, device)
        self._communicator = communicator
        # Partial sums of all ranks are added up; the residual (and a bias) must come in once.
        self._adds_residual = communicator.rank == 0
        self._rotated = rank.n_query_heads + rank.n_kv_heads
        self._all_heads = self._rotated + rank.n_kv_heads
        self._columns = rank.n_columns
        columns = torch.arange(self._rotated * dim, device=device).view(-1, 2, dim // 2)
        self._swap_halves = columns.flip(1).reshape(-1)
        self._norm = RMSNorm(model.hidden_size, model.norm_eps, device)
        self._head_norm = RMSNorm(dim, model.norm_eps, device)
        operations = choose_operations(device, dtype, dim, page_size, self._heads, model.norm_eps)
        self.attention = operations.attention
        self._attend = operations.attention.attend
        self._kernels = operations.kernels

    def normalised(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """RMS norm of rows of the model's width."""
        return self._norm(hidden, weight) if self._kernels is None else self._kernels.rms_norm(hidden, weight)

    def run(
        self, hidden: torch.Tensor, weights: LayerWeights, step: StepContext, layer: KVLayer, window: int | None
    ) -> None:
        """``hidden`` ``[tokens, hidden]`` is replaced in place by the layer's output."""
        x = self.normalised(hidden, weights.input_norm)
        # No names for what attention uses: it must be gone when the MLP's own activations peak.
        mixed = self._attention(_linear(x, weights.qkv, weights.qkv_bias), weights, step, layer, window)
        self._add_reduced(hidden, mixed, weights.o, weights.o_bias)
        del mixed
        x = self.normalised(hidden, weights.post_norm)
        gate_up = _linear(x, weights.gate_up, weights.gate_up_bias)
        if self._kernels is not None:
            active = self._kernels.silu_mul(gate_up)
        else:
            active = F.silu(gate_up[:, : self._columns]).mul_(gate_up[:, self._columns :])
        self._add_reduced(hidden, active, weights.down, weights.down_bias)

    def _attention(
        self, qkv: torch.Tensor, weights: LayerWeights, step: StepContext, layer: KVLayer, window: int | None
    ) -> torch.Tensor:
        tokens, dim, n_q = qkv.shape[0], self._heads.head_dim, self._heads.query_heads
        by_head = qkv.view(tokens, self._all_heads, dim)
        if self._kernels is not None:
            norms = weights.q_norm, weights.k_norm
            self._kernels.rope_kv_write(qkv, step.cos, step.sin, norms, layer, step.batch, n_q)
            return self._attend(by_head[:, :n_q], None, layer, step.batch, window, self._heads)
        qk = by_head[:, : self._rotated]
        if weights.q_norm is not None and weights.k_norm is not None:
            scaled = (qk.float() * self._head_norm.scale(qk)).to(qk.dtype)
            torch.mul(scaled[:, :n_q], weights.q_norm, out=qk[:, :n_q])
            torch.mul(scaled[:, n_q:], weights.k_norm, out=qk[:, n_q:])
        swapped = qkv.index_select(1, self._swap_halves).view(tokens, self._rotated, dim)
        qk.mul_(step.cos).addcmul_(swapped, step.sin)
        kv = by_head[:, n_q:].view(tokens, 2, self._heads.kv_heads, dim)
        return self._attend(qk[:, :n_q], kv, layer, step.batch, window, self._heads)

    def _add_reduced(
        self, hidden: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        """hidden += sum over the ranks of ``x @ weight`` (+ bias), in place, by one all-reduce."""
        if self._adds_residual:
            hidden.addmm_(x, weight)
            if bias is not None:
                hidden.add_(bias)
        else:
            torch.mm(x, weight, out=hidden)
        self._communicator.all_reduce(hidden)


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.mm(x, weight) if bias is None else torch.addmm(bias, x, weight)
