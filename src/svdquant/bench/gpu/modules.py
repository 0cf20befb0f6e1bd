"""Linears of others' formats in plain torch, for where their libraries are not installed: FP8 row-wise, and NF4."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_FP8 = torch.float8_e4m3fn
_LARGEST = 448.0
# Dettmers et al. 2023, appendix E: quantiles of a normal distribution.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_NF4_GROUP = 64


def quantize_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """(e4m3 codes, float32 scales [M, 1]) of the rows of x [M, K]."""
    scale = x.abs().amax(1, keepdim=True).float().clamp_min(1e-12) / _LARGEST
    return (x.float() / scale).clamp(-_LARGEST, _LARGEST).to(_FP8), scale


def multiply_fp8(x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: Any) -> Tensor:
    """(x·x_scale)·(weight·scale)ᵀ + bias for weight [N, K], scale [1, N]; a CPU multiplies in float32."""
    if x.device.type == "cpu":
        y = F.linear(x.float() * x_scale, weight.float() * scale.T)
        return (y if bias is None else y + bias.float()).to(dtype)
    return torch._scaled_mm(
        x, weight.T, scale_a=x_scale, scale_b=scale, bias=bias, out_dtype=dtype, use_fast_accum=True
    )


class FP8Linear(nn.Module):
    """Row-wise scales of the weight, dynamic ones of each token: what torchao's row-wise FP8 does."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        codes, scale = quantize_fp8(weight)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale.T.contiguous())
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        codes, scale = quantize_fp8(rows)
        y = multiply_fp8(codes, scale, self.codes, self.scale, self.bias, x.dtype)
        return y.view(*x.shape[:-1], -1)


class NF4Linear(nn.Module):
    """Dequantized to 16 bits for every product, as bitsandbytes does it for many rows. Meant to be compiled."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        n, k = weight.shape
        table = torch.tensor(_NF4, device=weight.device)
        groups = weight.float().view(n, -1, _NF4_GROUP)
        absmax = groups.abs().amax(-1, keepdim=True).clamp_min(1e-12)
        codes = torch.bucketize(groups / absmax, (table[1:] + table[:-1]) / 2).to(torch.uint8).view(n, k)
        self.register_buffer("codes", codes[:, 0::2] | (codes[:, 1::2] << 4))
        self.register_buffer("absmax", absmax.squeeze(-1))
        self.register_buffer("table", table)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        codes: Any = self.codes
        values: Any = self.table[torch.stack((codes & 15, codes >> 4), -1).int()].flatten(-2)  # type: ignore[index]
        weight = values.view(codes.shape[0], -1, _NF4_GROUP) * self.absmax[..., None]  # type: ignore[index]
        return F.linear(x, weight.view(codes.shape[0], -1).to(x.dtype), self.bias)


class UnfusedSVDQuant(nn.Module):
    """y = (x/s)·Ŵᵀ + (x·Dᵀ)·Uᵀ + b by torch's operations, one after the other.

    eight_bit: with Ŵ kept in FP8 and x/s quantized per token, else with Ŵ kept in 16 bits.
    """

    def __init__(
        self, residual: Tensor, smooth: Tensor, down: Tensor, up: Tensor, bias: Tensor, eight_bit: bool
    ) -> None:
        super().__init__()
        self.eight_bit = eight_bit
        for name, value in (("smooth", smooth), ("down", down), ("up", up), ("bias", bias)):
            self.register_buffer(name, value)
        if eight_bit:
            codes, scale = quantize_fp8(residual)
            self.register_buffer("weight", codes)
            self.register_buffer("scale", scale.T.contiguous())
        else:
            self.register_buffer("weight", residual.to(down.dtype))

    def forward(self, x: Tensor) -> Tensor:
        part: Any = self
        h = x / part.smooth
        if self.eight_bit:
            codes, scale = quantize_fp8(h)
            y = multiply_fp8(codes, scale, part.weight, part.scale, part.bias, x.dtype)
        else:
            y = F.linear(h, part.weight, part.bias)
        return torch.addmm(y, F.linear(x, part.down), part.up.T)


def stored_bytes(module: nn.Module) -> int:
    """Bytes of parameters and buffers, of tensor subclasses those of the tensors that they are made of."""
    seen: set[int] = set()
    return sum(_bytes(t, seen) for t in (*module.parameters(), *module.buffers()))


def _bytes(tensor: Any, seen: set[int]) -> int:
    if hasattr(tensor, "__tensor_flatten__"):
        parts = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        return sum(_bytes(part, seen) for part in parts if isinstance(part, Tensor))
    total = 0
    state = getattr(tensor, "quant_state", None)
    for part in (tensor, *(getattr(state, name, None) for name in ("absmax", "code", "offset"))):
        if isinstance(part, Tensor) and part.data_ptr() not in seen:
            seen.add(part.data_ptr())
            total += part.nbytes
    return total
