"""Who else multiplies by a layer's weight on a GPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..results import BASELINE, PEER
from .data import LayerData
from .modules import FP8Linear, NF4Linear, UnfusedSVDQuant, stored_bytes

BF16 = "torch bf16"
FP8 = "fp8 row-wise, compiled"
NF4 = "bitsandbytes NF4"
NF4_TORCH = "NF4 by compiled torch"
_TORCHAO, _BITSANDBYTES = "torchao", "bitsandbytes"


@dataclass(frozen=True)
class Contender:
    """make(data) → module. package: without which it does not run; compiled: by torch, for each shape anew.

    rate: the ceiling that bounds its product.
    """

    name: str
    make: Callable[[LayerData], nn.Module]
    rate: str
    kind: str = PEER
    compiled: bool = False
    package: str | None = None

    def missing(self) -> str:
        """Why it cannot run here, or ""."""
        if self.package is None or importlib.util.find_spec(self.package) is not None:
            return ""
        return f"not installed: pip install {self.package}"


class _Dense(nn.Module):
    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight.clone())
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        part: Any = self
        return F.linear(x, part.weight, part.bias)


def dense_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """An `nn.Linear` around tensors."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta", dtype=weight.dtype)
    made.weight = nn.Parameter(weight, requires_grad=False)
    made.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return made


def torchao_fp8(model: nn.Module) -> None:
    """Every linear of a module in place."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    quantize_(model, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))


def bitsandbytes_nf4(linear: nn.Linear) -> nn.Module:
    from bitsandbytes.nn import Linear4bit

    dtype, device = linear.weight.dtype, linear.weight.device
    made = Linear4bit(
        linear.in_features, linear.out_features, linear.bias is not None, dtype, quant_type="nf4", device="meta"
    )
    made.weight = type(made.weight)(linear.weight.data, requires_grad=False, quant_type="nf4")
    if linear.bias is not None:
        made.bias = nn.Parameter(linear.bias.data, requires_grad=False)
    # Moving it to its device is what quantizes it, also where it is there already.
    return made.to(device)


def _torchao(data: LayerData) -> nn.Module:
    holder = nn.Sequential(dense_linear(data.weight, data.bias))
    torchao_fp8(holder)
    return holder


def _unfused(data: LayerData, eight_bit: bool) -> nn.Module:
    residual = data.record("int4", "int8").residual(torch.float32)
    return UnfusedSVDQuant(residual, data.smooth, data.down, data.up, data.bias, eight_bit)


CONTENDERS = (
    Contender(BF16, lambda d: _Dense(d.weight, d.bias), "bf16", BASELINE),
    Contender(FP8, lambda d: FP8Linear(d.weight, d.bias), "fp8", compiled=True),
    Contender("fp8 row-wise, eager", lambda d: FP8Linear(d.weight, d.bias), "fp8"),
    Contender("torchao fp8 row-wise, compiled", _torchao, "fp8", compiled=True, package=_TORCHAO),
    Contender(NF4, lambda d: bitsandbytes_nf4(dense_linear(d.weight, d.bias)), "bf16", package=_BITSANDBYTES),
    Contender(NF4_TORCH, lambda d: NF4Linear(d.weight, d.bias), "bf16", compiled=True),
    Contender("unfused SVDQuant, 16 bits", lambda d: _unfused(d, False), "bf16"),
    Contender("unfused SVDQuant, fp8, compiled", lambda d: _unfused(d, True), "fp8", compiled=True),
)
# With one row, which only reads the weight.
WEIGHT_ONLY = tuple(c for c in CONTENDERS if c.name in (BF16, FP8, NF4, NF4_TORCH))

__all__ = [
    "BF16",
    "CONTENDERS",
    "FP8",
    "NF4",
    "NF4_TORCH",
    "WEIGHT_ONLY",
    "Contender",
    "bitsandbytes_nf4",
    "dense_linear",
    "stored_bytes",
    "torchao_fp8",
]
