"""PEFT's LoRA layers in a quantized model where nothing is fused: around linears and convolutions in 16 bits.

They are PEFT's own but for two things: adapters per entry of a batch, and unfusing to the bits that were there.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from peft.tuners.lora.layer import Conv2d, Linear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from ..errors import SVDQuantError
from ..nn.adapters import Requests
from .peft_dora import active_specials, dora_change, is_special, with_specials
from .peft_transforms import transforms_of

# What layers remember of their tensors: no part of copies or pickles.
_REMEMBERED = ("_branches", "_rescalings", "_own_bias")


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

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in _REMEMBERED}


def add_requests(layer: Any, requests: Requests, x: Tensor, result: Tensor) -> Tensor:
    """result + what every entry's adapters make of x, adapter by adapter as PEFT does."""
    dtype, repeats = result.dtype, requests.repeats(x.shape[0])
    for name in layer.lora_A:
        if name not in requests.names:
            continue
        if is_special(layer, name):
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
    """On top of PEFT's LoRA around a layer in 16 bits: unfusing gives back the bits that were there.

    Transforms of outputs and inputs are computed here, DoRA is PEFT's own.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer: Any = self
        if not args and not kwargs and transforms_of(layer) and (names := active_specials(layer)):
            return with_specials(layer, x, names)
        return super().forward(x, *args, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        layer: Any = self
        names = [name for name in check_adapters_to_merge(layer, adapter_names) or () if name in layer.lora_A]
        if not names:
            return
        parameters = layer.base_layer.weight, layer.base_layer.bias
        before = self.__dict__.get("_unmerged") or [None if p is None else p.detach().clone() for p in parameters]
        specials = [name for name in names if is_special(layer, name)]
        changes = {name: self._change(name, before[0].float()) for name in specials}
        for name, change in changes.items():
            if safe_merge and not bool(change.isfinite().all()):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
        if plain := [name for name in names if name not in changes]:
            super().merge(safe_merge, plain)  # type: ignore[misc]
        for name, change in changes.items():
            weight, bias = layer.base_layer.weight, layer.base_layer.bias
            weight.data = (weight.float() + change.view_as(weight)).to(weight.dtype)
            if layer.lora_bias.get(name):
                if bias is None:
                    raise SVDQuantError(
                        f"adapter {name!r} adds to the bias of a layer that has none and cannot be fused"
                    )
                bias.data += layer.lora_B[name].bias * layer.scaling[name]
            layer.merged_adapters.append(name)
        self.__dict__["_unmerged"] = before

    def _change(self, name: str, weight: Tensor) -> Tensor:
        """ΔW float32 of an adapter that is no plain LoRA; weight: of the layer without adapters, [N, K, …]."""
        layer: Any = self
        transform = transforms_of(layer).get(name)
        if transform is None or transform.length is not None:
            return dora_change(layer, name, weight)
        change: Tensor = transform.change(weight) * float(layer.scaling[name])
        return change

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
