"""nvfp4: e2m1 values (0, ½, 1, 1½, 2, 3, 4, 6 and their negatives), an e4m3 scale per 16 inputs, one outer scale.

The outer scale (`wcscales`, stored per output row, equal within one weight) brings the group scales into e4m3's range:
max over the groups of (max|w|/6) maps to 448. Activations have the e4m3 scale only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .formats import WeightFormat, grouped, nonzero
from .int4 import unpack_nibbles

E4M3 = torch.float8_e4m3fn
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = _MAGNITUDES + tuple(-m for m in _MAGNITUDES)


def scales(weight: Tensor, group_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    wanted = grouped(weight, weight.shape[-1] // group_size).abs().amax(-1) / 6
    # float16 cannot hold the outer scale of very small weights; a larger one leaves the group scales room enough.
    smallest_outer = 2.0**-20 if dtype == torch.float16 and bool(wanted.any()) else 0.0
    outer = nonzero((wanted.amax() / 448).clamp(min=smallest_outer).to(dtype))
    inner = (wanted / outer.float()).clamp_(max=448).to(E4M3)
    smallest = torch.tensor(2.0**-9, device=weight.device).to(E4M3)
    # A group too small for e4m3 keeps its smallest scale: dividing by zero later must not happen.
    inner = torch.where(inner.float() == 0, smallest.float(), inner.float()).to(E4M3)
    return inner, outer.expand(weight.shape[0]).clone()


def round_values(values: Tensor) -> Tensor:
    """Nearest e2m1 value, ties to the even code, saturating at ±6."""
    a = values.abs()
    # Below 2 the grid has step ½, below 4 step 1, above 2: multiply, round half to even, divide.
    step = torch.where(a < 1.75, 0.5, torch.where(a < 3.5, 1.0, 2.0))
    return ((a / step).round_() * step).clamp_(max=6).copysign_(values)


def _codes(values: Tensor) -> Tensor:
    a = values.abs()
    magnitude = torch.where(a < 2, a * 2, torch.where(a < 4, a + 2, a / 2 + 4))
    return magnitude.to(torch.uint8) | ((values < 0).to(torch.uint8) << 3)


def pack(values: Tensor) -> Tensor:
    """[N, K] e2m1 values to uint8 [N, K/2]: sign in bit 3, low nibble first."""
    codes = _codes(values)
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(qweight: Tensor, dtype: torch.dtype) -> Tensor:
    return unpack_nibbles(qweight, _VALUES, dtype)


def fake_quantize_activation(h: Tensor, group_size: int = 16) -> Tensor:
    """h: float32 [..., K]. Groups whose scale underflows e4m3 become zero, as in hardware.

    Codes are those of the exact scale, as in the published kernels; they are multiplied by the scale in e4m3.
    """
    g = grouped(h, h.shape[-1] // group_size)
    exact = (g.abs().amax(-1, keepdim=True) / 6).clamp_(max=448)
    return (round_values(g / nonzero(exact)) * exact.to(E4M3).float()).flatten(-2)


FORMAT = WeightFormat("nvfp4", 4, scales, round_values, pack, unpack)
