"""Rotary position embedding: the frequencies of every kind, and the cosines and sines of a step's tokens.

Figures follow transformers' ``modeling_rope_utils`` exactly (same formulas, same float32 steps), so that greedy
tokens agree: RoPE (Su et al., arXiv:2104.09864, section 3.2), linear position interpolation (Chen et al.,
arXiv:2306.15595), dynamic NTK scaling (bloc97, emozilla), YaRN (Peng et al., arXiv:2309.00071, sections 3.2-3.4),
and the scheme of Llama 3.1.
"""

from __future__ import annotations

import math

import torch

from hexgen.model import ModelSpec, RopeSpec


def inverse_frequencies(model: ModelSpec) -> tuple[torch.Tensor, float]:
    """``[head_dim / 2]`` float32 inverse frequencies, and the factor on cosines and sines (1.0 except for yarn).

    For ``dynamic`` these are the frequencies up to the original context; see ``RotaryEmbedding``.
    """
    rope, dim = model.rope, model.head_dim
    if rope.kind == "yarn":
        return _yarn(model)
    plain = 1.0 / (rope.theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim))
    if rope.kind == "linear":
        return plain / rope.factor, 1.0
    if rope.kind == "llama3":
        return _llama3(plain, rope, rope.original_max_context or model.max_context), 1.0
    return plain, 1.0


def _llama3(plain: torch.Tensor, rope: RopeSpec, old_context: int) -> torch.Tensor:
    """Long wavelengths divided by the factor, short ones kept, those between interpolated (Llama 3.1)."""
    low, high = rope.low_freq_factor or 1.0, rope.high_freq_factor or 4.0
    wavelength = 2 * math.pi / plain
    scaled = torch.where(wavelength > old_context / low, plain / rope.factor, plain)
    smooth = (old_context / wavelength - low) / (high - low)
    smoothed = (1 - smooth) * scaled / rope.factor + smooth * scaled
    between = ~(wavelength < old_context / high) & ~(wavelength > old_context / low)
    return torch.where(between, smoothed, scaled)


def _yarn(model: ModelSpec) -> tuple[torch.Tensor, float]:
    """NTK-by-parts: extrapolate fast dimensions, interpolate slow ones, ramp between (YaRN, section 3.2)."""
    rope, dim = model.rope, model.head_dim
    old_context = rope.original_max_context or model.max_context
    attention_factor = rope.attention_factor
    if attention_factor is None:
        if rope.mscale and rope.mscale_all_dim:
            attention_factor = _mscale(rope.factor, rope.mscale) / _mscale(rope.factor, rope.mscale_all_dim)
        else:
            attention_factor = _mscale(rope.factor, 1.0)

    def correction_dim(rotations: float) -> float:
        return (dim * math.log(old_context / (rotations * 2 * math.pi))) / (2 * math.log(rope.theta))

    low, high = correction_dim(rope.beta_fast or 32), correction_dim(rope.beta_slow or 1)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # as the reference does, against a division by zero
    ramp = torch.clamp((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    frequencies = rope.theta ** (torch.arange(0, dim, 2).float() / dim)
    extrapolated, interpolated = 1.0 / frequencies, 1.0 / (rope.factor * frequencies)
    keep = 1 - ramp
    return interpolated * (1 - keep) + extrapolated * keep, float(attention_factor)


def _mscale(scale: float, mscale: float) -> float:
    return 1.0 if scale <= 1 else 0.1 * mscale * math.log(scale) + 1.0


class RotaryEmbedding:
    """Cosines and sines for the tokens of a step, computed in float32 and cast to the model's dtype."""

    def __init__(self, model: ModelSpec, dtype: torch.dtype, device: torch.device) -> None:
        self._model = model
        self.dtype = dtype
        frequencies, self.factor = inverse_frequencies(model)
        self._frequencies = frequencies.to(device)
        self.dynamic = model.rope.kind == "dynamic"
        self._exponents = (torch.arange(0, model.head_dim, 2, dtype=torch.int64).float() / model.head_dim).to(
            device
        )

    def tables(self, positions: torch.Tensor, lengths: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and signed sines ``[tokens, 1, head_dim]``: rotated = x * cos + swap_halves(x) * sin.

        ``positions`` and ``lengths`` are ``[tokens]`` int64. ``lengths`` matters to dynamic scaling alone: the
        length of the sequence when the token was first computed decides the frequencies of its key for good.
        """
        angles = positions.float()[:, None] * self.frequencies(lengths)
        cos, sin = angles.cos(), angles.sin()
        if self.factor != 1.0:
            cos, sin = cos * self.factor, sin * self.factor
        cos2 = torch.cat((cos, cos), dim=-1).to(self.dtype)
        sin2 = torch.cat((-sin, sin), dim=-1).to(self.dtype)
        return cos2.unsqueeze(1), sin2.unsqueeze(1)

    def frequencies(self, lengths: torch.Tensor | None) -> torch.Tensor:
        """Float32 ``[head_dim / 2]``, or for dynamic scaling ``[tokens, head_dim / 2]``."""
        return self._dynamic(lengths) if self.dynamic and lengths is not None else self._frequencies

    def _dynamic(self, lengths: torch.Tensor) -> torch.Tensor:
        """``[tokens, head_dim / 2]``: the base grows with the length once that passes the original context."""
        rope, dim = self._model.rope, self._model.head_dim
        original = rope.original_max_context or self._model.max_context
        length = lengths.clamp(min=original).float()
        base = rope.theta * ((rope.factor * length / original) - (rope.factor - 1)) ** (dim / (dim - 2))
        grown = 1.0 / (base[:, None] ** self._exponents)
        return torch.where((lengths > original)[:, None], grown, self._frequencies)
