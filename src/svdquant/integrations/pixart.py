"""Adapters for models of diffusers that have no LoRA calls of their own, as PixArt's."""

from __future__ import annotations

from functools import cache
from typing import Any

from ..errors import SVDQuantError


def adopt(model: Any) -> None:
    """Gives a model diffusers' LoRA calls (`load_lora_adapter`, `set_adapters`, …): its class becomes a subclass.

    Raises `SVDQuantError` for what is no model of diffusers.
    """
    from diffusers import ModelMixin

    if not isinstance(model, ModelMixin):
        raise SVDQuantError(
            f"{type(model).__name__} is no model of diffusers and takes no adapters; use PEFT's own calls"
        )
    cls: Any = type(model)
    model.__class__ = _with_adapters(cls)


@cache
def _with_adapters(cls: Any) -> Any:
    from diffusers.loaders.peft import PeftAdapterMixin

    def reduce(self: Any, protocol: Any) -> Any:
        # The class is not where its name says, so pickle gets the way to make it.
        return _rebuild, (cls,), self.__getstate__()

    # Saved configurations and pipelines name the class and its module: diffusers' own.
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__reduce_ex__": reduce}
    return type(cls.__name__, (cls, PeftAdapterMixin), names)


def _rebuild(cls: Any) -> Any:
    made = _with_adapters(cls)
    return made.__new__(made)
