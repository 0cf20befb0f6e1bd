"""Matrix products whose rows do not depend on what stands beside them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Libraries choose another kernel, and so another order of summation, for another number of rows. Feeding them blocks
# of one fixed size leaves them nothing to choose.
_BLOCK = {"cpu": 64}
_OTHER_BLOCK = 256


def block_rows(device: torch.device) -> int:
    return _BLOCK.get(device.type, _OTHER_BLOCK)


def linear_rows(x: Tensor, weight: Tensor) -> Tensor:
    """x [M, K] times weight [N, K] transposed, computed in blocks of a fixed number of rows. Returns [M, N]."""
    rows, block = x.shape[0], block_rows(x.device)
    if rows == 0:
        return x.new_empty(0, weight.shape[0])
    if rows == block:
        return F.linear(x, weight)
    out = x.new_empty(-(-rows // block) * block, weight.shape[0])
    transposed = weight.t()
    for start in range(0, rows, block):
        part = x[start : start + block]
        if part.shape[0] < block:
            part = F.pad(part, (0, 0, 0, block - part.shape[0]))
        torch.mm(part, transposed, out=out[start : start + block])
    return out[:rows]
