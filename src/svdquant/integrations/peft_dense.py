"""PEFT's LoRA layers in a quantized model where nothing is fused: around linears and convolutions in 16 bits.

They are PEFT's own but for two things: adapters per entry of a batch, and unfusing to the bits that were there.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from peft.tuners.lora.layer import Conv2d, Linear
from torch import Tensor, nn

from ..errors import SVDQuantError
from ..nn.adapters import Requests


def unit_strength(layer: Any, name: str) -> float:
    """What strength 1 of an adapter multiplies its matrices with: alpha/r."""
    rank = layer.r[name]
    return float(layer.lora_alpha[name] / (math.sqrt(rank) if layer.use_rslora.get(name) else rank))


class RequestLayer:
    """On top of a LoRA layer of PEFT: adapters per entry of a batch, while `requests` is set."""

    requests: Requests | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer: Any = self
        if self.requests is None or layer.disable_adapters:
            y: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
            return y
        return add_requests(layer, self.requests, x, layer.base_layer(x, *args, **kwargs))


def add_requests(layer: Any, requests: Requests, x: Tensor, result: Tensor) -> Tensor:
    """result + what every entry's adapters make of x, adapter by adapter as PEFT does."""
    dtype, repeats = result.dtype, requests.repeats(x.shape[0])
    for name in layer.lora_A:
        if name not in requests.names:
            continue
        if name in layer.lora_variant:
            raise SVDQuantError(f"adapter {name!r} is no plain LoRA; requests of one batch cannot differ in it")
        strengths = requests.strengths(name, unit_strength(layer, name))
        down, up = layer.lora_A[name], layer.lora_B[name]
        delta = up(down(x.to(down.weight.dtype)))
        factors = torch.tensor(strengths, device=x.device).repeat(repeats)
        delta = (delta.float() * factors.view(-1, *[1] * (delta.dim() - 1))).to(delta.dtype)
        # A strength of 0 adds nothing at all, not even the sign of a zero.
        used = factors.view(-1, *[1] * (delta.dim() - 1)) != 0
        result = torch.where(used, result + delta, result)
    return result.to(dtype)


class RestoringLayer(RequestLayer):
    """On top of PEFT's LoRA around a layer in 16 bits: unfusing gives back the bits that were there."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        layer: Any = self
        parameters = layer.base_layer.weight, layer.base_layer.bias
        before = [None if p is None else p.detach().clone() for p in parameters]
        merged = len(layer.merged_adapters)
        super().merge(safe_merge, adapter_names)  # type: ignore[misc]
        if len(layer.merged_adapters) > merged:
            self.__dict__.setdefault("_unmerged", before)

    def unmerge(self) -> None:
        layer: Any = self
        if not layer.merged_adapters:
            return
        parameters = layer.base_layer.weight, layer.base_layer.bias
        for parameter, before in zip(parameters, self.__dict__.pop("_unmerged"), strict=True):
            if before is not None:
                parameter.data.copy_(before)
        layer.merged_adapters.clear()


class PlainLoraLinear(RestoringLayer, Linear):
    """PEFT's LoRA around a linear in 16 bits in a quantized model."""


class PlainLoraConv2d(RestoringLayer, Conv2d):
    """PEFT's LoRA around a convolution in 16 bits in a quantized model."""


def adopt(model: nn.Module) -> None:
    """Gives PEFT's layers around the 16-bit layers of a quantized model the two classes above. Idempotent."""
    for module in model.modules():
        if type(module) is Linear and type(module.base_layer) is nn.Linear:
            module.__class__ = PlainLoraLinear
        elif type(module) is Conv2d and type(module.base_layer) is nn.Conv2d:
            module.__class__ = PlainLoraConv2d
