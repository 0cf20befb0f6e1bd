"""Quantized modules with random contents, and a block of them as a transformer has it."""

from __future__ import annotations

from typing import Any

import cpu_truth
import torch
from cpu_truth import BF16
from torch import nn

from svdquant.nn import SVDQuantLinear, W4A16Linear


def quantized(k: int, n: int, activations: str = "int8", dtype: torch.dtype = BF16, **options: Any) -> SVDQuantLinear:
    layer = SVDQuantLinear.from_tensors(cpu_truth.layer(k, n, dtype=dtype, **options), dtype)
    layer.activations = activations
    return layer


def weights_only(k: int, n: int, dtype: torch.dtype = BF16, **options: Any) -> W4A16Linear:
    return W4A16Linear.from_tensors(
        cpu_truth.layer(k, n, dtype=dtype, rank=0, kind="w4a16", smooth=False, **options), dtype
    )


class Block(nn.Module):
    """Two layers read one input; between and behind them is what a transformer has."""

    def __init__(self, width: int = 128, dtype: torch.dtype = BF16) -> None:
        super().__init__()
        self.modulation = weights_only(width, 2 * width, dtype)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.q = quantized(width, width, "auto", dtype, seed=1, rotate=True)
        self.k = quantized(width, width, "int8", dtype, seed=2, smooth=False)
        self.up = quantized(width, 3 * width, "int4", dtype, seed=3)
        self.down = quantized(3 * width, width, "int4", dtype, seed=4, unsigned=((0, 3 * width),))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        shift, scale = self.modulation(nn.functional.silu(t)).tanh().chunk(2, -1)
        h = self.norm(x) * (1 + scale[:, None]) + shift[:, None]
        x = x + 0.02 * self.q(h) * torch.sigmoid(self.k(h))
        return x + 0.02 * self.down(nn.functional.gelu(self.up(self.norm(x) * (1 + shift[:, None]))))


def block_inputs(batch: int = 2, tokens: int = 7, dtype: torch.dtype = BF16) -> tuple[torch.Tensor, torch.Tensor]:
    x = cpu_truth.inputs(batch * tokens + batch, 128, dtype)
    return x[: batch * tokens].reshape(batch, tokens, 128), x[batch * tokens :]
