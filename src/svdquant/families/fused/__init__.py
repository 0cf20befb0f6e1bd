"""Fused forwards for modules of diffusers: the module stays what it is, only its class becomes a subclass of it.

Every fused class has its parent's name and parameters, adds no state, and calls the parent's forward wherever
`kernels.fused` would not run: other devices, gradients, compilers, wrapped layers.
"""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import Any

from torch import nn

from ...kernels import fused, gpu
from ...nn import SVDQuantLinear


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
    from . import flux, modules

    found: dict[type, type] = {}
    for ours in (*modules.FUSED, *flux.FUSED):
        theirs, method = ours.__base__, "forward" if issubclass(ours, nn.Module) else "__call__"
        assert theirs is not None
        known, there = (_parameters(getattr(cls, method)) for cls in (ours, theirs))
        if known[: len(there)] == there:
            found[theirs] = ours
    flux.register(found)
    return found


def _parameters(function: Any) -> list[str]:
    return list(inspect.signature(function, follow_wrapped=False).parameters)
