"""int8: symmetric codes −127…127, one scale per output row for weights, one per token for activations."""

from __future__ import annotations

import torch
from torch import Tensor

from .formats import WeightFormat, grouped, nonzero


def scales(weight: Tensor, group_size: int, dtype: torch.dtype) -> tuple[Tensor, None]:
    groups = weight.shape[-1] // group_size if group_size else 1
    amax = grouped(weight, groups).abs().amax(-1)
    return nonzero((amax / 127).to(dtype)), None


def round_values(values: Tensor) -> Tensor:
    return values.round().clamp_(-127, 127)


def pack(values: Tensor) -> Tensor:
    return values.to(torch.int8)


def unpack(qweight: Tensor, dtype: torch.dtype) -> Tensor:
    return qweight.to(dtype)


def fake_quantize_activation(h: Tensor) -> Tensor:
    """h: float32 [..., K], one float32 scale per token."""
    scale = nonzero(h.abs().amax(-1, keepdim=True) / 127)
    return (h / scale).round_().clamp_(-127, 127).mul_(scale)


FORMAT = WeightFormat("int8", 8, scales, round_values, pack, unpack)
