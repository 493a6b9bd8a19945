"""Muon for the layers' matrices, AdamW for the embedding and the norms."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """The nearest (semi-)orthogonal matrix of each, roughly, by Newton-Schulz iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon:
    """Momentum, then an orthogonalized step; matrices of one shape are handled in one batch."""

    def __init__(self, parameters: list[nn.Parameter], momentum: float, decay: float) -> None:
        self.momentum, self.decay = momentum, decay
        by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
        for parameter in parameters:
            by_shape[parameter.shape].append(parameter)
        self.groups = list(by_shape.values())
        self.buffers = [torch.zeros(len(g), *g[0].shape) for g in self.groups]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for group, buffer in zip(self.groups, self.buffers, strict=True):
            gradient = torch.stack([p.grad for p in group if p.grad is not None])
            buffer.lerp_(gradient, 1 - self.momentum)
            update = orthogonalize(gradient.lerp(buffer, self.momentum))
            rows, columns = buffer.shape[-2:]
            scale = rate * max(1.0, rows / columns) ** 0.5
            for parameter, change in zip(group, update, strict=True):
                parameter.mul_(1 - rate * self.decay).sub_(change, alpha=scale)


class Optimizer:
    """Both optimisers under one schedule: warm up, hold, then decay linearly to zero."""

    def __init__(
        self,
        model: nn.Module,
        matrix_rate: float = 0.015,
        other_rate: float = 0.01,
        decay: float = 0.1,
        warmup: float = 0.02,
        hold: float = 0.3,
    ) -> None:
        named = list(model.named_parameters())
        is_matrix = {n: p.ndim == 2 and "embed" not in n for n, p in named}
        self.muon = Muon([p for n, p in named if is_matrix[n]], momentum=0.95, decay=decay)
        others = [p for n, p in named if not is_matrix[n]]
        self.adam = torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0)
        self.matrix_rate, self.other_rate = matrix_rate, other_rate
        self.warmup, self.hold = warmup, hold

    def scale(self, progress: float) -> float:
        """The learning rate's factor when this share of the training is done."""
        if progress < self.warmup:
            return max(progress / self.warmup, 0.05)
        return min(1.0, max(1 - progress, 0.0) / (1 - self.hold))

    def step(self, progress: float) -> None:
        scale = self.scale(progress)
        self.muon.step(self.matrix_rate * scale)
        for group in self.adam.param_groups:
            group["lr"] = self.other_rate * scale
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        for matrices in self.muon.groups:
            for parameter in matrices:
                parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        return {"muon": self.muon.buffers, "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.muon.buffers = state["muon"]
        self.adam.load_state_dict(state["adam"])
