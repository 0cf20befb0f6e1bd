"""Which parts of a pipeline are quantized, and how each is configured."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ..checkpoint.layout import Checkpoint, open_checkpoint
from ..config import SVDQuantConfig
from ..errors import SVDQuantError
from . import library_of
from .skeletons import component_class
from .slots import read_index
from .sources import denoisers, pipeline_bytes

TEXT_ENCODERS = ("none", "int4", "int8")
# Of the pipeline's bytes in 16 bits: what a smaller encoder would save is not worth its error.
SMALLEST_SHARE = 0.02
# What a text encoder takes over from the pipeline's options; how its layers are stored is its own.
_SHARED = ("gptq", "calibration_rows", "seed", "max_error", "keep_16bit_above")
_WEIGHTS_ONLY: dict[str, Any] = {"activations": "none", "rank": 0, "smooth": False}


def text_config(weights: str = "int4", **fields: Any) -> SVDQuantConfig:
    """How a text encoder is quantized: weights alone (W4A16, W8A16), without branch, smoothing or rotation."""
    return SVDQuantConfig(**({"weights": weights} | _WEIGHTS_ONLY | fields))


def model_config(config: SVDQuantConfig, library: str, part: str = "") -> SVDQuantConfig:
    """Of a model that is quantized by itself: `config`, or where it says nothing about it, a text encoder's own."""
    plain = SVDQuantConfig()
    chosen = any(getattr(config, name) != getattr(plain, name) for name in ("activations", "rank", "smooth"))
    if library != "transformers" or chosen or config.weights == "nvfp4":
        return config
    return replace(config, **_WEIGHTS_ONLY)


def component_config(config: SVDQuantConfig, library: str, part: str) -> SVDQuantConfig:
    """Of one component of a pipeline.

    A denoiser, or any other model of diffusers, has the pipeline's options with those of `components` in their place. A
    text encoder begins with weights alone, whatever the denoiser gets; limits of a layer's error hold for both.
    """
    own = config.components.get(part, {})
    if library != "transformers":
        return replace(config, components={}, **own)
    shared = {field: getattr(config, field) for field in _SHARED}
    return text_config(**(shared | own))


def planned_config(config: SVDQuantConfig, model: nn.Module, component: str | None) -> SVDQuantConfig:
    """What `quantize` would use for the model: of a pipeline's `component` (None: its first denoiser), or by itself."""
    library = library_of(model)
    if component is None and library == "diffusers":
        component = next((name for name in ("transformer", "unet") if name in config.components), None)
    if component is None:
        return model_config(replace(config, components={}), library)
    return component_config(config, library, component)


def with_text_encoders(config: SVDQuantConfig, pipeline: Path, weights: str) -> SVDQuantConfig:
    """`config` that also quantizes the pipeline's text encoders, but for small ones; what it says already, stays.

    Raises `SVDQuantError` where the pipeline has none that is large enough.
    """
    if weights not in TEXT_ENCODERS:
        raise SVDQuantError(f"text_encoders={weights!r} is not one of {', '.join(TEXT_ENCODERS)}")
    if weights == "none":
        return config
    found = _text_encoders(pipeline)
    if not found:
        raise SVDQuantError(f"{pipeline}: has no text encoder to quantize; leave out --text-encoders")
    least = SMALLEST_SHARE * pipeline_bytes(pipeline)
    chosen = {name: {"weights": weights} for name, size in found.items() if size >= least or name in config.components}
    if not chosen:
        raise SVDQuantError(
            f"{pipeline}: its text encoders ({', '.join(found)}) are less than 2 % of its bytes; leave out "
            "--text-encoders, or name one in a recipe under [components.NAME]"
        )
    said = config.components
    return replace(config, components=said | {name: fields | said.get(name, {}) for name, fields in chosen.items()})


def _text_encoders(pipeline: Path) -> dict[str, int]:
    """Name → bytes in 16 bits of the models of transformers that a pipeline calls text encoders."""
    found = {}
    for name, entry in read_index(pipeline).items():
        if name.startswith("text_encoder") and entry[0] == "transformers" and (pipeline / name).is_dir():
            found[name] = sum(2 * math.prod(t.shape) for t in open_checkpoint(pipeline, name).tensors.values())
    return found


def checkpoints_of(source: Path, config: SVDQuantConfig | None = None) -> dict[str, Checkpoint]:
    """The 16-bit models of a pipeline folder that are quantized, by name: denoisers, then those of `config.components`.

    Of a model folder, itself under the name "". Raises `SVDQuantError` for one that is quantized already, and for a
    component that the pipeline does not have or that cannot be quantized.
    """
    wanted = config.components if config is not None else {}
    if (source / "model_index.json").is_file():
        parts = denoisers(source)
        checkpoints = {part: open_checkpoint(source, part) for part in parts}
        checkpoints |= {name: _component(source, name) for name in wanted if name not in parts}
    elif wanted:
        raise SVDQuantError(
            f"{source}: is a model without its pipeline, so it has no {next(iter(wanted))}; leave it out"
        )
    else:
        checkpoints = {"": open_checkpoint(source)}
    for checkpoint in checkpoints.values():
        if checkpoint.quantization is not None:
            raise SVDQuantError(f"{checkpoint.path}: is quantized already; start from the 16-bit model")
    return checkpoints


def _component(pipeline: Path, name: str) -> Checkpoint:
    _, cls = component_class(pipeline, name)
    # Its own configuration may name another head on the same model.
    return replace(open_checkpoint(pipeline, name), model_class=cls)
