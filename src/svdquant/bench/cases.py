"""What is multiplied: shapes, and weights and inputs as diffusion transformers have them."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import SVDQuantError

# FLUX.1's: attention projections, the same of few tokens, both halves of a feed-forward, modulation, a smaller picture.
DEFAULT_SHAPES = (
    "1024x3072x3072",
    "256x3072x3072",
    "4096x3072x12288",
    "4096x12288x3072",
    "1x3072x18432",
    "1536x3072x12288",
)
CALIBRATION_ROWS = 512
_SHAPE = re.compile(r"(\d+)[x×](\d+)[x×](\d+)", re.IGNORECASE)
_FEWEST = 16
_MOST = 2**31


@dataclass(frozen=True)
class Shape:
    """x [M, K] times a weight [N, K]."""

    m: int
    k: int
    n: int

    @property
    def modulation(self) -> bool:
        """One row per picture: only the weights are quantized, and they are found cold."""
        return self.m == 1

    def __str__(self) -> str:
        return f"{self.m}x{self.k}x{self.n}"


def parse_shape(text: str) -> Shape:
    """ "1024x3072x3072" as M×K×N. Raises `SVDQuantError` for anything else."""
    match = _SHAPE.fullmatch(text.strip())
    if match is None:
        raise SVDQuantError(f"shape {text!r} is not MxKxN; write rows, inputs and outputs as 1024x3072x3072")
    shape = Shape(*(int(part) for part in match.groups()))
    if shape.m < 1 or shape.k < _FEWEST or shape.n < _FEWEST:
        raise SVDQuantError(f"shape {text!r} is too small; M is at least 1, K and N at least {_FEWEST}")
    if max(shape.m * shape.k, shape.n * shape.k, shape.m * shape.n) >= _MOST:
        raise SVDQuantError(f"shape {text!r} is too large; no matrix may have {_MOST} numbers")
    return shape


@dataclass
class LinearCase:
    """One linear and its input, all in the model's type.

    weight [N, K], bias [N], x [M, K], calibration [rows, K]: other rows of the same kind as x, for those who look at
    inputs beforehand. reference: float32 [M, N], the product of the original weights.
    """

    shape: Shape
    dtype: torch.dtype
    weight: Tensor
    bias: Tensor
    x: Tensor
    calibration: Tensor
    reference: Tensor
    threads: int


def linear_case(shape: Shape, dtype: torch.dtype, threads: int, seed: int = 0) -> LinearCase:
    """A weight with a decaying spectrum; inputs whose channels differ in size, 1 % of them outliers of twelve times."""
    g = torch.Generator().manual_seed(seed)
    k, n = shape.k, shape.n
    directions = torch.randn(n, 48, generator=g) @ (
        torch.randn(48, k, generator=g) * torch.logspace(0, -1.5, 48)[:, None]
    )
    weight = (torch.randn(n, k, generator=g) * 0.02 + directions * 0.01).to(dtype)
    bias = (torch.randn(n, generator=g) * 0.1).to(dtype)
    spread = torch.exp(0.5 * torch.randn(k, generator=g))
    spread[torch.randperm(k, generator=g)[: k // 100]] *= 12
    rows = (torch.randn(shape.m + CALIBRATION_ROWS, k, generator=g) * spread).to(dtype)
    x, calibration = rows[: shape.m].clone(), rows[shape.m :].clone()
    reference = F.linear(x.float(), weight.float(), bias.float())
    return LinearCase(shape, dtype, weight, bias, x, calibration, reference, threads)
