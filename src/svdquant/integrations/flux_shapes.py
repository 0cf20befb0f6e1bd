"""FLUX' guards of an adapter's shapes, which look for weights that quantized layers do not have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SVDQuantError
from ..nn import quantized_layers
from .switching import is_quantized

_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"


def _split(cls: Any, model: nn.Module, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(tensors for quantized layers, the others) of an adapter with the prefix of `cls`."""
    quantized = {name.replace(".base_layer", "") for name in quantized_layers(model)}
    start = f"{cls.transformer_name}."
    ours = {key for key in state if key.removeprefix(start).partition(".lora_")[0] in quantized}
    return {k: v for k, v in state.items() if k in ours}, {k: v for k, v in state.items() if k not in ours}


def with_shapes_checked(expand: Any) -> Any:
    """FLUX widens linears for adapters that are wider than the model; packed weights cannot be."""

    def checked(
        cls: Any, transformer: Any, lora_state_dict: Any = None, norm_state_dict: Any = None, prefix: Any = None
    ) -> Any:
        if not is_quantized(transformer) or lora_state_dict is None:
            return expand(cls, transformer, lora_state_dict, norm_state_dict, prefix)
        ours, others = _split(cls, transformer, lora_state_dict)
        layers = {name.replace(".base_layer", ""): m for name, m in quantized_layers(transformer).items()}
        for key, value in ours.items():
            name = key.removeprefix(f"{cls.transformer_name}.").partition(".lora_")[0]
            layer: Any = layers[name]
            wide = key.endswith(_DOWN) and value.shape[1] > layer.in_features
            if wide or (key.endswith(_UP) and value.shape[0] != layer.out_features):
                raise SVDQuantError(
                    f"the adapter's {key} has the shape {list(value.shape)}, which does not fit the quantized {name} "
                    f"[{layer.out_features}, {layer.in_features}]; it was made for another model"
                )
        return expand(cls, transformer, others, norm_state_dict, prefix)

    return checked


def without_quantized(expand: Any) -> Any:
    """FLUX pads adapters that are narrower than the model; it looks for shapes that packed weights do not have."""

    def padded(cls: Any, transformer: Any, lora_state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        if not is_quantized(transformer):
            out: dict[str, Tensor] = expand(cls, transformer, lora_state_dict)
            return out
        ours, others = _split(cls, transformer, lora_state_dict)
        layers = {name.replace(".base_layer", ""): m for name, m in quantized_layers(transformer).items()}
        for key, value in ours.items():
            width = layers[key.removeprefix(f"{cls.transformer_name}.").partition(".lora_")[0]].in_features
            if key.endswith(_DOWN) and value.shape[1] < width:  # type: ignore[operator]
                ours[key] = torch.nn.functional.pad(value, (0, width - value.shape[1]))  # type: ignore[operator]
        done = expand(cls, transformer, others) | ours
        return {key: done[key] for key in lora_state_dict}

    return padded
