"""Which component of a pipeline a checkpoint is, and which pipeline a published checkpoint belongs to."""

from __future__ import annotations

import contextlib
import inspect
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..checkpoint.hub import looks_like_hub_id
from ..checkpoint.layout import ACCEPTED, DENOISERS, Checkpoint, read_json
from ..checkpoint.nunchaku_layouts import STOCK_CLASSES
from ..errors import SVDQuantError
from .sources import hub_json

_FLUX, _QWEN = "FluxTransformer2DModel", "QwenImageTransformer2DModel"
_SINGLE = "single_transformer_blocks."

# (part of a published checkpoint's name, its model class, the pipeline that it was made from); the first match counts.
PUBLISHED = (
    ("flux.1-schnell", _FLUX, "black-forest-labs/FLUX.1-schnell"),
    ("flux.1-krea-dev", _FLUX, "black-forest-labs/FLUX.1-Krea-dev"),
    ("flux.1-kontext-dev", _FLUX, "black-forest-labs/FLUX.1-Kontext-dev"),
    ("flux.1-fill-dev", _FLUX, "black-forest-labs/FLUX.1-Fill-dev"),
    ("flux.1-depth-dev", _FLUX, "black-forest-labs/FLUX.1-Depth-dev"),
    ("flux.1-canny-dev", _FLUX, "black-forest-labs/FLUX.1-Canny-dev"),
    ("flux.1-dev", _FLUX, "black-forest-labs/FLUX.1-dev"),
    ("shuttle-jaguar", _FLUX, "shuttleai/shuttle-jaguar"),
    ("sana1.6b", "SanaTransformer2DModel", "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers"),
    ("sana-1600m", "SanaTransformer2DModel", "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers"),
    ("sdxl-turbo", "UNet2DConditionModel", "stabilityai/sdxl-turbo"),
    ("sdxl", "UNet2DConditionModel", "stabilityai/stable-diffusion-xl-base-1.0"),
    ("qwen-image-edit-2509", _QWEN, "Qwen/Qwen-Image-Edit-2509"),
    ("qwen-image-edit", _QWEN, "Qwen/Qwen-Image-Edit"),
    ("qwen-image", _QWEN, "Qwen/Qwen-Image"),
    ("z-image-turbo", "ZImageTransformer2DModel", "Tongyi-MAI/Z-Image-Turbo"),
)
# What has to agree between a model and the pipeline around it; a number of layers may differ.
_COMPARED = (
    "in_channels",
    "out_channels",
    "guidance_embeds",
    "joint_attention_dim",
    "pooled_projection_dim",
    "cross_attention_dim",
    "caption_channels",
    "cap_feat_dim",
    "d_model",
)


def model_class_of(checkpoint: Checkpoint) -> str:
    """The stock class of a checkpoint's model, "" where it does not say."""
    name = STOCK_CLASSES.get(checkpoint.model_class, checkpoint.model_class)
    return name or (_FLUX if any(tensor.startswith(_SINGLE) for tensor in checkpoint.tensors) else "")


def blocks_only(checkpoint: Checkpoint) -> bool:
    """Whether it is one of the oldest files, whose other tensors have to come from a 16-bit pipeline."""
    return checkpoint.blocks_only


def published_base(checkpoint: Checkpoint, names: Iterable[str] = ()) -> str | None:
    """The Hub id of the pipeline that a published checkpoint was made from, None for any other.

    names: what else the checkpoint is known by, next to its path: its Hub id.
    """
    if checkpoint.quantization is None:
        return None
    where, origin = checkpoint.path, str(checkpoint.config.get("_name_or_path", ""))
    for name in (*names, where.name, where.parent.name, origin):
        for part, model_class, base in PUBLISHED:
            if part in name.lower() and model_class == model_class_of(checkpoint):
                return base
    return None


def read_index(base: str | Path) -> dict[str, Any]:
    """The model_index.json of a pipeline folder or Hub id. Raises `SVDQuantError` where it is no pipeline."""
    if looks_like_hub_id(base):
        index = hub_json(str(base), "model_index.json")
    else:
        file = Path(base) / "model_index.json"
        if not Path(base).exists():
            raise SVDQuantError(f"{base}: does not exist; give {ACCEPTED}")
        index = read_json(file) if file.is_file() else None
    if index is None:
        raise SVDQuantError(f"{base}: has no model_index.json, so it is no pipeline; give a pipeline folder or Hub id")
    return index


def pipeline_class(wanted: str | type | None, index: dict[str, Any]) -> Any:
    """The class of the pipeline: the one that is asked for, else that of the index.

    None for a class of the repository's own, which diffusers has to find. Raises `SVDQuantError` for no pipeline class.
    """
    import diffusers

    named = index.get("_class_name") if wanted is None else wanted
    if wanted is None and not isinstance(named, str):
        return None
    cls = getattr(diffusers, named, None) if isinstance(named, str) else named
    if not (isinstance(cls, type) and issubclass(cls, diffusers.DiffusionPipeline)):
        name = named if isinstance(named, str) else getattr(named, "__name__", named)
        raise SVDQuantError(f"{name} is no pipeline class of diffusers {diffusers.__version__}; upgrade diffusers")
    return cls


def component_names(cls: Any, index: dict[str, Any]) -> list[str]:
    """What may be handed to the pipeline."""
    listed = [name for name, entry in index.items() if isinstance(entry, list) and not name.startswith("_")]
    taken = [] if cls is None else [name for name in inspect.signature(cls.__init__).parameters if name != "self"]
    return list(dict.fromkeys(taken + listed))


def find_slot(checkpoint: Checkpoint, base: str | Path, index: dict[str, Any], cls: Any) -> str:
    """The component of the pipeline whose class is the checkpoint's; denoisers before others.

    One that the index leaves empty counts by what the pipeline's class says of it. A 16-bit file that does not say what
    it is counts as the denoiser. Raises `SVDQuantError` where nothing fits.
    """
    wanted = model_class_of(checkpoint)
    classes = {n: e[1] for n, e in index.items() if isinstance(e, list) and len(e) == 2 and e[1] is not None}
    order = sorted(classes, key=lambda name: DENOISERS.index(name) if name in DENOISERS else len(DENOISERS))
    fitting = [name for name in order if classes[name] == wanted or (not wanted and name in DENOISERS)]
    if not fitting:
        fitting = [name for name, types in _accepted(cls).items() if name not in classes and wanted in types]
    if fitting:
        return fitting[0]
    name = index["_class_name"] if cls is None else cls.__name__
    base_class = published_base(checkpoint) or next((b for _, c, b in PUBLISHED if c == wanted), None)
    remedy = f"a pipeline that has a {wanted}" if base_class is None else f"its own pipeline, e.g. {base_class!r},"
    if not any(part in classes for part in DENOISERS):
        raise SVDQuantError(
            f"{checkpoint.path}: holds a {wanted or 'denoiser'}, and {base} is a {name}, which has no denoiser; give "
            f"{remedy} as base and run the {name} before it"
        )
    held = ", ".join(f"{part} {classes[part]}" for part in order if part in DENOISERS)
    what = wanted or "model of unknown class"
    raise SVDQuantError(
        f"{checkpoint.path}: holds a {what}, and {base} is a {name} with the {held}; give {remedy} as base"
    )


def _accepted(cls: Any) -> dict[str, tuple[str, ...]]:
    """Class names that the pipeline's constructor takes, by component."""
    if cls is None:
        return {}
    try:
        hints = typing.get_type_hints(cls.__init__)
    except (NameError, TypeError):
        hints = {}
    return {
        name: tuple(getattr(part, "__name__", "") for part in (hint, *typing.get_args(hint)))
        for name, hint in hints.items()
        if name != "return"
    }


def compare(checkpoint: Checkpoint, base: str | Path, slot: str, skip: tuple[str, ...] = ()) -> None:
    """Raises `SVDQuantError` where the pipeline was made for another model of the same class. skip: what may differ."""
    config: dict[str, Any] = {}
    if looks_like_hub_id(base):
        # Without network it may be the one file of the base that is not here; that is no reason to stop.
        with contextlib.suppress(SVDQuantError):
            config = hub_json(str(base), f"{slot}/config.json") or {}
    else:
        file = Path(base) / slot / "config.json"
        config = read_json(file) if file.is_file() else {}
    for key in _COMPARED:
        ours, theirs = checkpoint.config.get(key), config.get(key)
        if key in skip or ours is None or theirs is None or ours == theirs:
            continue
        known = published_base(checkpoint)
        remedy = repr(known) if known not in (None, str(base)) else "the pipeline that it was made from"
        raise SVDQuantError(
            f"{checkpoint.path}: has {key} {ours} and the {slot} of {base} has {theirs}, so they do not fit; give "
            f"{remedy} as base"
        )
