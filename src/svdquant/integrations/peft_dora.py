"""Adapters that are no plain LoRA, in the forward of PEFT's layers: DoRA and what multiplies outputs or inputs.

Every one changes what the layer was alone: with several, the changes add up. DoRA without W′ or W in memory:
W′ = m/‖W + s·BA‖ ⊙ (W + s·BA), row by row, or column by column where a file's lengths are those of columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SVDQuantError
from .peft_transforms import channels_back, channels_last, own_bias, own_weight, transforms_of


def is_special(layer: Any, name: str) -> bool:
    """Whether an adapter is more than a pair of matrices in this layer."""
    return name in layer.lora_variant or name in transforms_of(layer)


def active_specials(layer: Any) -> list[str]:
    """The active adapters of a layer where one that counts is no plain LoRA; else none."""
    if layer._disable_adapters or layer.merged_adapters or layer.__dict__.get("requests") is not None:
        return []
    transforms = transforms_of(layer)
    if not layer.lora_variant and not transforms:
        return []
    scaling = layer.scaling
    names = [name for name in layer.lora_A if name in layer.active_adapters]
    names = [name for name in names if isinstance(scaling[name], Tensor) or scaling[name] != 0]
    return names if any(name in layer.lora_variant or name in transforms for name in names) else []


def with_specials(layer: Any, x: Tensor, names: list[str]) -> Tensor:
    """The layer's output with these adapters, of any kind.

    layer: a LoRA layer of PEFT. Raises `SVDQuantError` for a DoRA whose magnitudes were not loaded.
    """
    base, transforms = layer.base_layer, transforms_of(layer)
    conv = isinstance(base, nn.Conv2d)
    moved = None
    lengths: dict[str, Tensor] = {}
    for name in names:
        transform = transforms.get(name)
        if transform is None or transform.side != "input":
            continue
        if transform.length is not None:
            lengths[name] = _column_factor(layer, name)
            delta = channels_last(x, conv) * (lengths[name] - 1).to(x.dtype)
        else:
            delta = transform(channels_last(x, conv)) * layer.scaling[name]
        moved = delta if moved is None else moved + delta
    alone = base(x) if moved is None or any(_reads_output(layer, name) for name in names) else None
    result: Any = alone if moved is None else base((x + channels_back(moved, conv)).to(x.dtype))
    linear, changes = None, torch.zeros_like(result)
    for name in names:
        transform, strength = transforms.get(name), layer.scaling[name]
        if _reads_output(layer, name) and linear is None:
            linear = _without_bias(alone, own_bias(layer), conv)
        if transform is not None and transform.side == "output":
            delta = channels_back(transform(channels_last(linear, conv)) * strength, conv)
        elif transform is not None and transform.length is None:
            continue
        else:
            factor = lengths.get(name)
            seen = x if factor is None else x * factor.to(x.dtype)
            delta = _product(layer, name, seen) * strength
            if name in layer.lora_variant:
                rows = _row_factor(layer, name).to(result.dtype)
                rows = rows.view(-1, 1, 1) if conv else rows
                delta = (rows - 1) * linear + rows * delta
        changes = changes + delta.to(result.dtype)
    return result + changes


def _reads_output(layer: Any, name: str) -> bool:
    transform = transforms_of(layer).get(name)
    return name in layer.lora_variant or (transform is not None and transform.side == "output")


def _without_bias(y: Any, bias: Tensor | None, conv: bool) -> Any:
    if bias is None:
        return y
    return y - (bias.view(-1, 1, 1) if conv else bias).to(y.dtype)


def _product(layer: Any, name: str, x: Tensor) -> Tensor:
    down, up = layer.lora_A[name], layer.lora_B[name]
    y: Tensor = up(down(layer.lora_dropout[name](x.to(down.weight.dtype))))
    return y


def dora_change(layer: Any, name: str, weight: Tensor | None = None) -> Tensor:
    """ΔW float32 [N, K] of a DoRA at its strength, of rows or columns; weight: the layer's own, where it is known."""
    weight = (own_weight(layer.base_layer) if weight is None else weight).flatten(1)
    down, up = layer.lora_A[name].weight.flatten(1).float(), layer.lora_B[name].weight.flatten(1).float()
    moved = weight + float(layer.scaling[name]) * (up @ down)
    if name in layer.lora_variant:
        return (
            moved * (layer.lora_magnitude_vector[name].weight.float().flatten() / moved.norm(dim=1))[:, None] - weight
        )
    return moved * (transforms_of(layer)[name].length.float() / moved.norm(dim=0)) - weight


def _row_factor(layer: Any, name: str) -> Tensor:
    return _factor(layer, name, layer.lora_magnitude_vector[name].weight, 1)


def _column_factor(layer: Any, name: str) -> Tensor:
    return _factor(layer, name, transforms_of(layer)[name].length, 0)


def _factor(layer: Any, name: str, magnitude: Tensor, axis: int) -> Tensor:
    """m/‖W + s·BA‖ of rows (axis 1) or columns (0), remembered while what it was made of stays."""
    down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
    strength = float(layer.scaling[name])
    key = strength, [(id(t), t.data_ptr(), 0 if t.is_inference() else t._version) for t in (down, up, magnitude)]
    known = layer.__dict__.setdefault("_rescalings", {}).get(name)
    if known is not None and known[0] == key and not magnitude.requires_grad:
        found: Tensor = known[1]
        return found
    with torch.no_grad():
        weight = own_weight(layer.base_layer).flatten(1)
        norm = (weight + strength * (up.flatten(1).float() @ down.flatten(1).float())).norm(dim=axis)
        if not bool(magnitude.isfinite().all()):
            raise SVDQuantError(f"adapter {name!r} is a DoRA without magnitudes for some of its layers")
    made = magnitude.float().flatten() / norm
    if not magnitude.requires_grad or not torch.is_grad_enabled():
        layer.__dict__["_rescalings"][name] = key, made.detach()
    return made
