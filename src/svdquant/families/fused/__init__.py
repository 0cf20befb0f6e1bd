"""Fused forwards for modules of diffusers: the module stays what it is, only its class becomes a subclass of it.

Every fused class has its parent's name and parameters, adds no state, and calls the parent's forward wherever
`kernels.fused` would not run: other devices, gradients, compilers, wrapped layers.
"""

from __future__ import annotations

import contextlib
import inspect
from dataclasses import replace
from functools import lru_cache
from importlib import import_module
from typing import Any

from torch import nn

from ...kernels import fused, gpu
from ...nn import SVDQuantLinear

# Each has its classes in FUSED: subclasses of diffusers' modules, blocks and attention processors.
FILES = (
    "modules", "rms_norm", "flux", "flux2", "qwen_image", "z_image", "sd3",
    "modulation", "wan", "ltx", "hunyuan",
)  # fmt: skip


def install(model: nn.Module) -> None:
    """Gives the modules and the default attention processors of `model` their fused classes. Idempotent.

    Does nothing where SVDQUANT_FUSE=0. Classes whose forward has parameters that the fused one does not know stay.
    """
    if fused.enabled():
        _change(model, _classes())
        if gpu.missing() is None:
            _digest(model)


def _digest(model: nn.Module) -> None:
    """What each layer does to its input, before a compiler asks."""
    from .inputs import reading_key

    for module in model.modules():
        if type(module) is SVDQuantLinear and module.qweight.device.type != "meta":
            reading_key(module)


def uninstall(model: nn.Module) -> None:
    """Undoes `install`."""
    _change(model, {ours: theirs for theirs, ours in _classes().items()})


def _change(model: nn.Module, classes: dict[type, type]) -> None:
    for module in model.modules():
        for part in (module, module.__dict__.get("processor")):
            if type(part) in classes:
                part.__class__ = classes[type(part)]  # type: ignore[union-attr,assignment]


@lru_cache(maxsize=1)
def _classes() -> dict[type, type]:
    """Class of diffusers → fused class."""
    found: dict[type, type] = {}
    for file in FILES:
        for ours in import_module(f".{file}", __name__).FUSED:
            theirs, method = ours.__base__, "forward" if issubclass(ours, nn.Module) else "__call__"
            known, there = (_parameters(getattr(cls, method)) for cls in (ours, theirs))
            if known[: len(there)] == there:
                found[theirs] = ours
    _register(found)
    return found


def _register(classes: dict[type, type]) -> None:
    """Tells diffusers' caches and layer skipping, which look classes up, what the fused ones are."""
    with contextlib.suppress(ImportError, AttributeError):
        from diffusers.hooks._helpers import AttentionProcessorRegistry, TransformerBlockRegistry

        for registry in (AttentionProcessorRegistry, TransformerBlockRegistry):
            for theirs, ours in classes.items():
                with contextlib.suppress(ValueError):
                    registry.register(ours, replace(registry.get(theirs)))


def _parameters(function: Any) -> list[str]:
    return list(inspect.signature(function, follow_wrapped=False).parameters)
