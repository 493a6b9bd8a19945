"""How the matrices of linear layers lie in memory: as the products of the device and dtype want them.

A checkpoint has ``[outputs, inputs]``. Every layout holds exactly those elements, once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


class Layout(Protocol):
    def matrix(self, *weights: torch.Tensor) -> torch.Tensor:
        """Matrices ``[outputs, inputs]`` of one input, as one for a single product."""

    def gate_up(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """The two matrices whose results are multiplied, of one shape."""


class Transposed:
    """``[inputs, outputs]``: what CUDA's products and, with few rows of float32, MKL's are fastest on."""

    def matrix(self, *weights: torch.Tensor) -> torch.Tensor:
        return torch.cat([weight.t() for weight in weights], dim=1).contiguous()

    def gate_up(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return self.matrix(gate, up)

    def rows(self, matrix: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """``[ids, inputs]``: rows of what ``matrix`` was given; embeddings are read so from a tied head."""
        return matrix.index_select(1, ids).t().contiguous()


class AsStored(Transposed):
    """``[inputs, outputs]`` as a view of the checkpoint's own order. torch multiplies half-precision numbers
    on CPUs many times faster so (measured: 1.9 ms against 53 ms for 1 x 512 x 16384 in bfloat16 with AVX2).
    """

    def matrix(self, *weights: torch.Tensor) -> torch.Tensor:
        return torch.cat(weights).contiguous().t()

    def rows(self, matrix: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return matrix.t().index_select(0, ids)


@dataclass(frozen=True, slots=True)
class Packed:
    """What ``kernels/cpu/product.h`` reads: panels of ``2 * lanes`` outputs, ``[panels, inputs, 2 * lanes]``,
    then the rest as plain rows; one flat tensor. In panels of bfloat16, outputs j and j + lanes lie side by side.
    """

    lanes: int

    @property
    def panel(self) -> int:
        return 2 * self.lanes

    def matrix(self, *weights: torch.Tensor) -> torch.Tensor:
        weight = torch.cat(weights) if len(weights) > 1 else weights[0]
        outputs, inputs = weight.shape
        whole = outputs // self.panel * self.panel
        packed = torch.empty(weight.numel(), dtype=weight.dtype)
        panels = packed[: whole * inputs].view(-1, inputs, self.panel)
        blocks = weight[:whole].view(-1, self.panel, inputs)
        panels.copy_(blocks.index_select(1, self._order(weight.dtype)).transpose(1, 2))
        packed[whole * inputs :].view(-1, inputs).copy_(weight[whole:])
        return packed

    def gate_up(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return torch.cat((self.matrix(gate), self.matrix(up)))

    def _order(self, dtype: torch.dtype) -> torch.Tensor:
        """Outputs of a panel in the order in which they lie."""
        outputs = torch.arange(self.panel)
        return outputs if dtype == torch.float32 else outputs.view(2, self.lanes).t().reshape(-1)
