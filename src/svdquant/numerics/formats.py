"""What a weight number format must offer, and the table of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class WeightFormat:
    """One number format of stored weights; all functions work on float32 of shape [N, K], K a multiple of the group.

    scales(weight, group_size, dtype) -> (wscales [N, K/group], wcscales [N] or None): group scales as stored, and the
        outer scale per output row that nvfp4 needs. Never zero.
    round(values) -> float32 [same shape]: the nearest representable value of a weight divided by its scale.
    pack(values) -> stored bytes; unpack(qweight, dtype) -> values [N, K] in a floating dtype.
    """

    name: str
    bits: int
    scales: Callable[[Tensor, int, torch.dtype], tuple[Tensor, Tensor | None]]
    round: Callable[[Tensor], Tensor]
    pack: Callable[[Tensor], Tensor]
    unpack: Callable[[Tensor, torch.dtype], Tensor]


def effective_scales(wscales: Tensor, wcscales: Tensor | None) -> Tensor:
    """Group scale times outer scale ([N], or [N, B] of B equal blocks of columns), float32 [N, groups]."""
    scales = wscales.float()
    if wcscales is None:
        return scales
    outer = wcscales.float().reshape(scales.shape[0], -1)
    return (grouped(scales, outer.shape[1]) * outer[..., None]).flatten(-2)


def grouped(x: Tensor, groups: int) -> Tensor:
    """[..., K] seen as [..., groups, K / groups]."""
    return x.unflatten(-1, (groups, -1))


def pad_columns(x: Tensor, multiple: int) -> Tensor:
    """Zero columns appended until the last dimension is a multiple."""
    missing = -x.shape[-1] % multiple if multiple > 1 else 0
    return torch.nn.functional.pad(x, (0, missing)) if missing else x


def nonzero(scale: Tensor) -> Tensor:
    """An all-zero group gets scale 1, so that nothing divides by zero."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖ in float64."""
    expected = expected.double()
    return float((actual.double() - expected).norm() / expected.norm().clamp_min(1e-300))
