"""Modulation that blocks compute themselves: numbers of their own plus the timestep's, per sample or per token."""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from diffusers.models import normalization
from torch import Tensor

from ...kernels import fused
from .modules import takes_options


def sums(table: Tensor, temb: Tensor) -> list[Tensor]:
    """float32 [B, 1 or L, K] each, of a table [P, K] and embeddings [B, 1 or L, P, K] of the timestep."""
    return [row.float() + part for row, part in zip(table, temb.unbind(2), strict=True)]


def unseen(norm: Any, cls: type) -> bool:
    """Whether `norm` reaches the forward of `cls` with all its arguments, and nobody looks at them or at the result."""
    return takes_options(norm, cls) and not (norm._forward_hooks or norm._forward_pre_hooks)


class FP32LayerNorm(normalization.FP32LayerNorm):
    """In one pass; modulates, norm(x)·(1 + scale) + shift, where a fused block asks for it.

    x [B, L, K]; scale, shift [B, 1 or L, K].
    """

    @wraps(normalization.FP32LayerNorm.forward)
    def forward(self, inputs: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        if scale is None or shift is None:
            if not self.takes(inputs) or not fused.usable(inputs):
                return super().forward(inputs)
            scale = shift = inputs.new_zeros(1, 1, inputs.shape[-1], dtype=torch.float32)
        rows, scale, shift = _rows(inputs, scale, shift)
        return fused.norm_modulate(rows, scale, shift, self.eps, self.weight, self.bias).view(inputs.shape)

    def takes(self, x: Tensor) -> bool:
        """Whether x may be given with options."""
        return x.dim() == 3 and self.normalized_shape == x.shape[-1:]


def modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x·(1 + scale) + shift. x [B, L, K]; scale, shift [B, 1 or L, K]."""
    rows, scale, shift = _rows(x, scale, shift)
    return fused.gate_add(shift.to(x.dtype)[:, None].expand(rows.shape), 1 + scale, rows).view(x.shape)


def gate_add(residual: Tensor, gate: Tensor, x: Tensor, into_residual: bool = False) -> Tensor:
    """residual + gate·x, over residual on request. residual, x [B, L, K]; gate [B, 1 or L, K]."""
    rows, gate = _rows(x, gate)
    before = residual.reshape(rows.shape)
    return fused.gate_add(before, gate, rows, out=before if into_residual else None).view(x.shape)


def _rows(x: Tensor, *modulation: Tensor) -> tuple[Tensor, ...]:
    """x [B, L, K] and modulation [B, K]; where each token has its own, x [B·L, 1, K] and modulation [B·L, K]."""
    batch, tokens, k = x.shape
    if all(m.shape[1] == 1 for m in modulation):
        return x, *(m[:, 0] for m in modulation)
    return x.reshape(-1, 1, k), *(m.expand(batch, tokens, k).reshape(-1, k) for m in modulation)


FUSED = (FP32LayerNorm,)
