"""How quantized models live in diffusers and transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SVDQuantError

if TYPE_CHECKING:
    from torch import nn

    from ..config import SVDQuantConfig
    from ..ptq import Report

__all__ = ["attach", "library_of", "quantize"]


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


def quantize(
    model: nn.Module,
    config: SVDQuantConfig | None = None,
    calibrate: Callable[[nn.Module], Any] | None = None,
    *,
    work_dir: str | Path | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Report:
    """Quantizes `model` in place and returns the report.

    calibrate: any callable that runs the model it is given, e.g. `lambda m: pipe(prompts)`; None = data-free. It is
    called twice: up to the end of the first forward, to see which layers share an input, and then whole. work_dir:
    where calibration inputs are kept meanwhile; a temporary folder by default. progress(done, total, name) is called
    after each group. A model of diffusers or transformers can be saved with its own `save_pretrained` afterwards.
    Nothing is changed where `SVDQuantError` is raised.
    """
    from ..config import SVDQuantConfig
    from ..ptq.quantize import quantize as in_place

    config = config or SVDQuantConfig()
    report = in_place(model, config, calibrate, work_dir=work_dir, progress=progress)
    attach(model, config)
    return report
