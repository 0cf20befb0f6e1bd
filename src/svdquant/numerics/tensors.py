"""The record of one quantized linear: what `ptq` makes, `checkpoint` stores and `kernels` multiply."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..config import LayerSpec
from . import int4, int8, nvfp4
from .formats import WeightFormat, effective_scales, grouped
from .hadamard import BLOCK, rotate

FORMATS: dict[str, WeightFormat] = {f.name: f for f in (int4.FORMAT, nvfp4.FORMAT, int8.FORMAT)}


def padded_columns(in_features: int, spec: LayerSpec) -> int:
    """Columns of the stored weight: K rounded up to the group, and to 128 where the layer is rotated."""
    multiple = math.lcm(max(spec.group_size, 1), BLOCK if spec.rotate else 1)
    # Two 4-bit codes share a byte.
    if FORMATS[spec.weights].bits == 4 and multiple % 2:
        multiple *= 2
    return -(-in_features // multiple) * multiple


def groups_of(in_features: int, spec: LayerSpec) -> int:
    return padded_columns(in_features, spec) // spec.group_size if spec.group_size else 1


@dataclass
class SVDQuantTensors:
    """y = Q(x/s)·Ŵᵀ + (x·Dᵀ)·Uᵀ + b.

    qweight: uint8 [N, Kp/2] (int4, nvfp4; low nibble first) or int8 [N, Kp] (int8); Kp as of `padded_columns`.
    wscales: [N, Kp/group] in 16 bits, e4m3 for nvfp4. wcscales: nvfp4's outer scale, [N], or [N, B] where each of B
        equal blocks of columns has its own; else None.
    wzeros: [N, Kp/group] where `spec.zeros`: weight = code·scale + zero with codes 0…15; else None.
    smooth_factor: s [K], the divisor of x; None = ones.
    proj_down: D [rank, K], takes the raw x; proj_up: U [N, rank]; None at rank 0.
    bias: [N] or None; where `spec.unsigned` names columns it already holds −Ŵ·(shift/s) for them, because Ŵ then
        multiplies (x + shift)/s.
    """

    spec: LayerSpec
    in_features: int
    qweight: Tensor
    wscales: Tensor
    wcscales: Tensor | None = None
    smooth_factor: Tensor | None = None
    proj_down: Tensor | None = None
    proj_up: Tensor | None = None
    bias: Tensor | None = None
    wzeros: Tensor | None = None

    def __post_init__(self) -> None:
        # What kernels derive from the tensors, by addresses, never the tensors themselves: no part of the record.
        self.memory: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, memory={})

    @property
    def out_features(self) -> int:
        return self.qweight.shape[0]

    @property
    def floating_dtype(self) -> torch.dtype:
        """The type of the branch, else of smoothing, scales or bias; never an 8-bit one."""
        tensors = (self.proj_up, self.smooth_factor, self.wscales, self.wcscales, self.bias)
        return next((t.dtype for t in tensors if t is not None and t.itemsize > 1), torch.bfloat16)

    def named(self) -> dict[str, Tensor]:
        """The tensors that are stored, by their names in a checkpoint."""
        pairs = ((f.name, getattr(self, f.name)) for f in fields(self))
        return {name: value for name, value in pairs if isinstance(value, Tensor)}

    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.named().values())

    def to(self, device: torch.device | str) -> SVDQuantTensors:
        return replace(self, **{name: t.to(device) for name, t in self.named().items()})

    def residual(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Ŵ [N, Kp] dequantized, in smoothed (and rotated) coordinates."""
        return dequantize_weight(self.qweight, self.wscales, self.wcscales, self.spec.weights, dtype, self.wzeros)

    def dense(self) -> tuple[Tensor, Tensor | None]:
        """The linear that these tensors mean when activations are not quantized: float32 weight [N, K] and bias."""
        weight = self.residual()
        if self.spec.rotate:
            weight = rotate(weight)
        weight = weight[:, : self.in_features]
        if self.smooth_factor is not None:
            weight = weight / self.smooth_factor.float()
        bias = None if self.bias is None else self.bias.float()
        for start, stop in self.spec.unsigned:
            shift = int4.GELU_SHIFT * weight[:, start:stop].sum(1)
            bias = shift if bias is None else bias + shift
        if self.proj_down is not None and self.proj_up is not None:
            weight = weight + self.proj_up.float() @ self.proj_down.float()
        return weight, bias


def dequantize_weight(
    qweight: Tensor,
    wscales: Tensor,
    wcscales: Tensor | None,
    weights: str,
    dtype: torch.dtype,
    wzeros: Tensor | None = None,
) -> Tensor:
    """Stored weight to [N, Kp] in `dtype`; values and scales are multiplied (and zeros added) in that type."""
    values = FORMATS[weights].unpack(qweight, dtype) if wzeros is None else int4.unpack_unsigned(qweight, dtype)
    scales = effective_scales(wscales, wcscales).to(dtype)
    groups = grouped(values, scales.shape[-1])
    if wzeros is not None:
        return torch.addcmul(wzeros.to(dtype)[..., None], groups, scales[..., None]).flatten(-2)
    return (groups * scales[..., None]).flatten(-2)


def quantize_weight(
    weight: Tensor, weights: str, group_size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Round-to-nearest of a float32 [N, Kp]; returns (values float32 [N, Kp], wscales, wcscales)."""
    fmt = FORMATS[weights]
    wscales, wcscales = fmt.scales(weight, group_size, dtype)
    effective = effective_scales(wscales, wcscales)
    values = fmt.round(grouped(weight, effective.shape[-1]) / effective[..., None]).flatten(-2)
    return values, wscales, wcscales
