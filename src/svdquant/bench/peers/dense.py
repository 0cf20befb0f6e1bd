"""torch's own linear: the baseline, and what a model without quantization costs."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cases import LinearCase
from .base import Peer


class _Dense(Peer):
    kind = "baseline"
    family = "torch"
    dtype: ClassVar[torch.dtype]

    def prepare(self, case: LinearCase) -> None:
        self._weight = case.weight.to(self.dtype, copy=True)
        self._bias = case.bias.to(self.dtype, copy=True)

    def input(self, case: LinearCase) -> Tensor:
        return case.x.to(self.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight, self._bias)

    @property
    def bytes(self) -> int | None:
        return self._weight.nbytes + self._bias.nbytes


class TorchBFloat16(_Dense):
    """What every ratio refers to."""

    name = "torch bf16"
    dtype = torch.bfloat16


class TorchFloat32(_Dense):
    name = "torch fp32"
    dtype = torch.float32
