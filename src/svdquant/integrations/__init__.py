"""How quantized models live in diffusers and transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import SVDQuantError

if TYPE_CHECKING:
    from torch import nn

    from ..config import SVDQuantConfig

__all__ = ["attach", "library_of"]


def library_of(model: nn.Module) -> str:
    """ "diffusers", "transformers", or "" for any other module."""
    for base in type(model).__mro__:
        root = base.__module__.partition(".")[0]
        if (root, base.__name__) in (("diffusers", "ModelMixin"), ("transformers", "PreTrainedModel")):
            return root
    return ""


def attach(model: nn.Module, config: SVDQuantConfig) -> None:
    """Marks a model quantized in place, so that its library saves and loads it as svdquant.

    `config.layers` is filled from the layers that the model has. A module of neither library stays as it is.
    Raises `SVDQuantError` where the model has no quantized layer.
    """
    from ..nn import quantized_layers

    if not quantized_layers(model):
        raise SVDQuantError(f"{type(model).__name__} has no quantized layers; quantize it first")
    library = library_of(model)
    if library == "diffusers":
        from . import diffusers

        diffusers.attach(model, config)
    elif library == "transformers":
        from . import transformers

        transformers.attach(model, config)
