"""Queries and keys whose norm goes over all heads of a token: Wan's, LTX-Video's and LTX-2's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...kernels import fused
from .heads import Rotary
from .modulation import unseen
from .modules import RMSNorm, own

# With this epsilon a norm multiplies by 2⁻⁵⁰, whatever it reads, and with this weight it gives its input back, exactly.
_NO_NORM, _UNDONE = 2.0**100, 2.0**50


def normalizes(norm: Any, like: Tensor) -> bool:
    """Whether `norm` is the fused RMSNorm of whole rows of the type of `like`, and may be given heads and options."""
    if not unseen(norm, RMSNorm) or norm.eps is None or len(norm.normalized_shape) != 1:
        return False
    return norm.weight is None or norm.weight.dtype == like.dtype


def heads_of(layer: Any, norm: Any, x: Tensor, heads: int, rotary: Rotary | None = None) -> Tensor:
    """norm(layer(x)), its pairs (2i, 2i+1) rotated: [B, L, H, D].

    x [B, L, K]; norm: of `normalizes`. rotary: cosines and sines, [L, D] for all heads or [B or 1, L, H·D].
    """
    y = own(layer, x)
    rows = y[:, :, None]
    whole = rotary is not None and rotary[0].dim() == 3
    if rotary is not None and whole:
        tables = zip(*(table.expand(len(y), -1, -1) for table in rotary), strict=True)
        for row, table in zip(rows.split(1), tables, strict=True):
            norm(row, rotary=table, out=row)
    else:
        norm(rows, out=rows)
    y = y.unflatten(2, (heads, -1))
    return y if rotary is None or whole else rotate(y, rotary)


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """The pairs (2i, 2i+1) of every head rotated, in place. x [B, L, H, D]; rotary: [L, D]."""
    weight = x.new_full(x.shape[-1:], _UNDONE, dtype=torch.float32)
    return fused.norm_rotate(x, weight, _NO_NORM, rotary, out=x)
