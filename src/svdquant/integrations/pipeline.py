"""Whole pipelines by name: find, load, place on a device, draw."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint import load_model
from ..checkpoint.canonical import FOREIGN
from ..checkpoint.hub import fetch, looks_like_hub_id
from ..checkpoint.layout import DENOISERS, Checkpoint, open_checkpoint, read_json
from ..errors import SVDQuantError
from .drawing import PipelineOptions, draw, generation_defaults, parse_dtype, pick_device, place
from .fine_tune import bare_file
from .own_parts import load_own_parts
from .single_file import Say, fitting_base, load_single_file, part_of, tell
from .skeletons import build_skeleton, skeleton
from .slots import (
    blocks_only,
    compare,
    component_names,
    find_slot,
    model_class_of,
    pipeline_class,
    published_base,
    read_index,
)
from .sources import (
    check_files,
    denoisers,
    embedded_model,
    host_memory_for,
    model_class,
    pipeline_bytes,
    resolve_checkpoint,
    resolve_model,
    variant_of,
)

__all__ = [
    "PipelineOptions",
    "build_skeleton",
    "check_files",
    "check_model",
    "denoisers",
    "draw",
    "embedded_model",
    "generation_defaults",
    "host_memory_for",
    "load_pipeline",
    "load_single_file",
    "model_class",
    "parse_dtype",
    "pick_device",
    "pipeline_bytes",
    "place",
    "resolve_model",
    "skeleton",
]


@dataclass(frozen=True)
class Parts:
    """What a pipeline is put together from: found, and its files' headers read; no weight is loaded yet.

    folder: the pipeline. slot: the component that `checkpoint` becomes; both None where the folder has everything.
    """

    folder: Path
    cls: Any
    slot: str | None = None
    checkpoint: Checkpoint | None = None


def check_model(model: str | Path, base: str | Path | None = None, say: Say | None = None) -> Parts:
    """What `load_pipeline` will use. Raises `SVDQuantError` for what cannot be loaded, without loading any weight.

    say: told what is taken from a single file, and for which pipeline it is taken.
    """
    return _find_parts(model, base, None, (), say)


def load_pipeline(
    checkpoint: str | Path,
    base: str | Path | None = None,
    *,
    torch_dtype: str | torch.dtype | None = None,
    device: str = "auto",
    pipeline: str | type | None = None,
    dtype: str | torch.dtype | None = None,
    max_memory: str | None = None,
    offload_folder: Path | None = None,
    **components: Any,
) -> Any:
    """A diffusers pipeline, quantized or not, ready to draw on `device`.

    checkpoint: a model as `load_model` takes it, or one in 16 bits, which `base` is built around; or a whole pipeline
        (folder or Hub id), which needs no base.
    base: the pipeline (folder or Hub id) that has everything else. It may be left out for published checkpoints, whose
        names say what they were made from. The weights that the checkpoint replaces are neither read nor downloaded.
    torch_dtype: of everything that is not packed; None = bfloat16. dtype: the same under diffusers' newer name.
    device: "auto" takes the first accelerator.
    pipeline: a diffusers class or its name, e.g. "FluxImg2ImgPipeline"; None = the one that the base names.
    max_memory: of a 16-bit denoiser in host memory, e.g. "8GB"; the rest of it stays in `offload_folder`.
    components: others in place of the base's: objects, None, or paths of quantized models, e.g.
        text_encoder_2="awq-int4-flux.1-t5xxl.safetensors".

    Raises `SVDQuantError` where something is missing, damaged, or made for another pipeline.
    """
    from diffusers import DiffusionPipeline

    where, wanted = pick_device(device), parse_dtype(torch_dtype) or parse_dtype(dtype) or torch.bfloat16
    parts = _find_parts(checkpoint, base, pipeline, components.keys())
    files = {name: _open_component(name, value, parts) for name, value in components.items() if _is_path(value)}
    for name, file in files.items():
        components[name] = load_model(file, torch_dtype=wanted)
    if parts.checkpoint is not None and parts.slot is not None:
        components[parts.slot] = _load_part(parts.checkpoint, parts.folder, parts.slot, wanted)
        if parts.checkpoint.is_file and parts.checkpoint.quantization is None:
            components |= load_own_parts(parts.checkpoint.path, parts.folder, parts.slot, wanted, components.keys())
    else:
        components |= _own_denoisers(parts.folder, components.keys(), wanted, max_memory, offload_folder)
    cls = DiffusionPipeline if pipeline is None else parts.cls
    options: dict[str, Any] = {"torch_dtype": wanted, "use_safetensors": True} | components
    if variant := variant_of(parts.folder, skip=components.keys()):
        options["variant"] = variant
    try:
        pipe = cls.from_pretrained(parts.folder, **options)
    except SVDQuantError:
        raise
    except (OSError, TypeError, ValueError, RuntimeError, AttributeError, KeyError, ImportError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SVDQuantError(f"{parts.folder}: diffusers could not load this pipeline ({reason})") from error
    pipe.set_progress_bar_config(disable=True)
    pipe._svdquant_source = parts.folder
    if max_memory is None:
        place(pipe, where)
    return pipe


def _find_parts(
    model: str | Path,
    base: str | Path | None,
    pipeline: str | type | None,
    given: Collection[str],
    say: Say | None = None,
) -> Parts:
    path = resolve_checkpoint(model)
    if (path / "model_index.json").is_file():
        index = read_index(path)
        cls = pipeline_class(pipeline, index)
        _check_names(given, path, cls, index)
        check_files(path, skip=given)
        return Parts(path, cls)
    path = bare_file(path) or path
    checkpoint = open_checkpoint(path)
    bare = checkpoint.is_file and checkpoint.quantization is None
    if bare:
        base = fitting_base(path, None if base is None else str(base), say)
    elif base is None:
        base = published_base(checkpoint, (str(model),))
    if base is None:
        raise SVDQuantError(f"{path}: is a model without its pipeline; name the pipeline as base (--base)")
    index = read_index(base)
    cls = pipeline_class(pipeline, index)
    _check_names(given, base, cls, index)
    slot = part_of(str(base), path) if bare else find_slot(checkpoint, base, index, cls)
    if slot in given:
        raise SVDQuantError(f"{path}: becomes the {slot} of {base}; give no other {slot}")
    # Another pipeline class may read other channels with the same text encoders and VAE.
    compare(checkpoint, base, slot, ("in_channels", "out_channels") if pipeline is not None else ())
    unused = set(given) if blocks_only(checkpoint) else {*given, slot}
    folder = resolve_model(base, skip=sorted(unused))
    check_files(folder, skip=unused)
    if bare and say is not None:
        tell(path, str(base), folder, say)
    return Parts(folder, cls, slot, checkpoint)


def _check_names(given: Collection[str], where: str | Path, cls: Any, index: dict[str, Any]) -> None:
    known = component_names(cls, index)
    for name in given:
        if name not in known:
            kind = index.get("_class_name") if cls is None else cls.__name__
            raise SVDQuantError(f"{where}: a {kind} takes no {name}; its components are {', '.join(known)}")


def _is_path(value: Any) -> bool:
    return isinstance(value, (str, Path))


def _open_component(name: str, value: str | Path, parts: Parts) -> str | Path:
    """The path that `load_model` takes; raises `SVDQuantError` where its model is not what the pipeline has there."""
    local = fetch(value)
    if looks_like_hub_id(local):
        return value
    found = model_class_of(open_checkpoint(local))
    entry = read_index(parts.folder).get(name) or [None, None]
    if isinstance(entry, list) and entry[-1] is not None and found != entry[-1]:
        raise SVDQuantError(f"{value}: holds a {found or 'model of unknown class'}, {name} has to be a {entry[-1]}")
    return local


def _own_denoisers(
    folder: Path,
    given: Collection[str],
    dtype: torch.dtype,
    max_memory: str | None,
    offload: Path | None,
) -> dict[str, nn.Module]:
    """The denoisers of a pipeline folder that diffusers cannot load, or not in one piece."""
    loaded: dict[str, nn.Module] = {}
    for name in DENOISERS:
        if name in given or not (folder / name / "config.json").is_file():
            continue
        config = read_json(folder / name / "config.json")
        method = (config.get("quantization_config") or {}).get("quant_method")
        if method is None and max_memory is None and not any((folder / name).glob("transformer_blocks.safetensors")):
            continue
        checkpoint = open_checkpoint(folder, name)
        if checkpoint.method in FOREIGN:
            loaded[name] = load_model(folder, torch_dtype=dtype, component=name)
        elif checkpoint.quantization is None and max_memory is not None:
            loaded[name] = _offloaded(checkpoint.path, checkpoint.model_class, dtype, max_memory, offload)
    return loaded


def _load_part(checkpoint: Checkpoint, folder: Path, slot: str, dtype: torch.dtype) -> nn.Module:
    """A component that comes without its pipeline: quantized, or a 16-bit folder or file."""
    path = checkpoint.path
    if checkpoint.quantization is not None:
        base = folder / slot if blocks_only(checkpoint) else None
        model: nn.Module = load_model(path, torch_dtype=dtype, base=base)
        return model
    if checkpoint.is_file:
        return load_single_file(path, folder, dtype, slot)
    try:
        model = model_class(checkpoint.model_class).from_pretrained(path, torch_dtype=dtype, use_safetensors=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SVDQuantError(f"{path}: diffusers could not load this model ({reason})") from error
    return model


def _offloaded(folder: Path, name: str, dtype: torch.dtype, max_memory: str, offload: Path | None) -> nn.Module:
    """A 16-bit model of which `max_memory` stays in host memory and the rest on disk (accelerate)."""
    if offload is None:
        raise SVDQuantError("max_memory needs a folder for what does not fit")
    return model_class(name).from_pretrained(
        folder, torch_dtype=dtype, device_map="auto", max_memory={"cpu": max_memory}, offload_folder=str(offload)
    )
