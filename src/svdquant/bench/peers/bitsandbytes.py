"""bitsandbytes: NF4 weights, 16-bit activations."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cases import LinearCase
from .base import Peer


class BitsAndBytesNF4(Peer):
    name = "bitsandbytes NF4"
    family = "bitsandbytes"
    packages = {"bitsandbytes": "bitsandbytes"}  # noqa: RUF012

    def prepare(self, case: LinearCase) -> None:
        from bitsandbytes.nn import Linear4bit

        dtype = torch.float32 if case.dtype == torch.float32 else torch.bfloat16
        layer = Linear4bit(case.shape.k, case.shape.n, compute_dtype=dtype, quant_type="nf4", device="meta")
        weight = type(layer.weight)(case.weight.to(dtype, copy=True), requires_grad=False, quant_type="nf4")
        layer.weight = weight
        layer.bias = torch.nn.Parameter(case.bias.to(dtype, copy=True), requires_grad=False)
        # Moving it to its device is what quantizes it.
        self._layer = layer.to("cpu").eval()

    def input(self, case: LinearCase) -> Tensor:
        return case.x.to(torch.float32 if case.dtype == torch.float32 else torch.bfloat16)

    def __call__(self, x: Tensor) -> Tensor:
        return self._layer(x)

    @property
    def bytes(self) -> int | None:
        state = self._layer.weight.quant_state
        return self._layer.weight.nbytes + state.absmax.nbytes + self._layer.bias.nbytes
