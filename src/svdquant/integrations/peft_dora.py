"""DoRA on quantized layers: W′ = m/‖W + s·BA‖ ⊙ (W + s·BA), row by row, without W′ or W in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import SVDQuantError
from ..nn import SVDQuantConv2d


def with_dora(layer: Any, x: Tensor, names: list[str]) -> Tensor:
    """The layer's output with these adapters, DoRAs and plain ones; every DoRA rescales what the layer had alone.

    layer: a LoRA layer of PEFT around a quantized linear. Raises `SVDQuantError` for a convolution, and for a DoRA
    whose magnitudes were not loaded.
    """
    base = layer.base_layer
    if isinstance(base, SVDQuantConv2d):
        raise SVDQuantError(f"adapter {names[0]!r} is a DoRA of a convolution, which quantized models do not take")
    result = base(x)
    linear, changes = None, torch.zeros_like(result)
    for name in names:
        down, up, strength = layer.lora_A[name], layer.lora_B[name], layer.scaling[name]
        delta = up(layer.lora_dropout[name](x.to(down.weight.dtype)) @ down.weight.t()) * strength
        if name in layer.lora_variant:
            factor, bias = _rescaling(layer, name)
            if linear is None:
                linear = result if bias is None else result - bias.to(result.dtype)
            factor = factor.to(result.dtype)
            delta = (factor - 1) * linear + factor * delta
        changes = changes + delta.to(result.dtype)
    return result + changes


def _rescaling(layer: Any, name: str) -> tuple[Tensor, Tensor | None]:
    """(m/‖W + s·BA‖ [N], the layer's bias [N] or None), remembered while what they were made of stays."""
    down, up, magnitude = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.lora_magnitude_vector[name].weight
    strength = float(layer.scaling[name])
    key = strength, [(id(t), t.data_ptr(), 0 if t.is_inference() else t._version) for t in (down, up, magnitude)]
    known = layer.__dict__.setdefault("_rescalings", {}).get(name)
    if known is not None and known[0] == key and not magnitude.requires_grad:
        found: tuple[Tensor, Tensor | None] = known[1]
        return found
    with torch.no_grad():
        weight, bias = layer.base_layer.tensors().dense()
        norm = (weight + strength * (up.float() @ down.float())).norm(dim=1)
        if not bool(magnitude.isfinite().all()):
            raise SVDQuantError(f"adapter {name!r} is a DoRA without magnitudes for some of its layers")
    made = magnitude.float() / norm, bias
    if not magnitude.requires_grad or not torch.is_grad_enabled():
        layer.__dict__["_rescalings"][name] = key, (made[0].detach(), bias)
    return made
