"""Which adapters are active, and how strongly: found and changed without a search through the model."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor, nn

from ..config import QuantizationMethod


def is_quantized(model: Any) -> bool:
    return getattr(model, "quantization_method", None) == QuantizationMethod.SVDQUANT


def forget_branches(model: nn.Module) -> None:
    """After matrices of adapters were overwritten in place by means that leave no trace."""
    for module in model.modules():
        cache = module.__dict__.get("_branches")
        if cache is not None:
            cache.clear()


# Model → its LoRA layers, found once: looking through all modules takes longer than everything else in a switch.
_layers: weakref.WeakKeyDictionary[nn.Module, tuple[int, list[weakref.ref[Any]]]] = weakref.WeakKeyDictionary()


def lora_layers(model: nn.Module) -> list[Any]:
    """Every layer of PEFT in `model`."""
    from . import peft

    known = _layers.get(model)
    if known is not None and known[0] == peft.layers_made():
        found = [layer for reference in known[1] if (layer := reference()) is not None]
        if len(found) == len(known[1]):
            return found
    found = [m for m in model.modules() if isinstance(m, peft.BaseTunerLayer)]
    _layers[model] = (peft.layers_made(), [weakref.ref(m) for m in found])
    return found


def quick(set_adapters: Any) -> Any:
    """The same by a list of the layers instead of a search, where that says the same."""

    def set_quickly(self: Any, adapter_names: Any, weights: Any = None) -> Any:
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        strengths = weights if isinstance(weights, list) else [weights] * len(names)
        plain = all(s is None or isinstance(s, (int, float)) for s in strengths)
        # Which matrices ask for gradients matters in training only.
        if not is_quantized(self) or not plain or self.training or len(strengths) != len(names):
            return set_adapters(self, adapter_names, weights)
        values = [1.0 if s is None else float(s) for s in strengths]
        pairs = list(zip(names, values, strict=True))
        for layer in lora_layers(self):
            # Past nn.Module's own __setattr__, which takes longer than the rest.
            own = layer.__dict__
            own["_active_adapter"] = names
            scaling, special = own["scaling"], own.get("use_rslora")
            for name, value in pairs:
                if name not in scaling:
                    continue
                if special is None or special.get(name):
                    layer.set_scale(name, value)
                elif isinstance(scaling[name], Tensor):
                    # Prepared for a compiler, which would compile again for a number.
                    scaling[name].fill_(value * own["lora_alpha"][name] / own["r"][name])
                else:
                    scaling[name] = value * own["lora_alpha"][name] / own["r"][name]
        return None

    return set_quickly
