"""Block-Hadamard rotation of 128 channels: orthonormal and its own inverse.

Written as butterflies, not as a product with a matrix: additions in a fixed order give the same bits for a row whatever
stands beside it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BLOCK = 128


def rotate(x: Tensor) -> Tensor:
    """x [..., K] float32, K a multiple of 128; every 128 channels times H/√128."""
    y = x.unflatten(-1, (-1, BLOCK))
    half = BLOCK // 2
    while half:
        pair = y.unflatten(-1, (-1, 2, half))
        a, b = pair.unbind(-2)
        y = _stack(a + b, a - b)
        half //= 2
    return (y * (1 / math.sqrt(BLOCK))).flatten(-2)


def _stack(a: Tensor, b: Tensor) -> Tensor:
    return torch.stack((a, b), -2).flatten(-3)
