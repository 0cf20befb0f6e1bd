"""Models on the meta device, from their configuration alone: what plans are made of."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint.hub import looks_like_hub_id
from ..checkpoint.layout import ACCEPTED, PICKLES, open_checkpoint, read_json
from ..errors import SVDQuantError
from .slots import read_index
from .sources import denoisers, hub_json, model_class


def skeleton(
    model: str | Path, dtype: torch.dtype = torch.bfloat16, component: str | None = None, base: str | None = None
) -> nn.Module:
    """A model on the meta device, from its configuration alone.

    model: a pipeline or model folder, a config.json, a Hub id (only its configuration is fetched) or the name of a
    model class of diffusers or transformers (its default configuration). component: of a pipeline, which is `base` for
    a model that comes without one; None = its denoiser. A file of weights alone has the configuration of `base`, or
    what its tensors' shapes tell; its header is read.
    Raises `SVDQuantError` where there is no such model.
    """
    path = Path(model)
    if path.suffix.lower() in PICKLES:
        raise SVDQuantError(f"{path}: pickle files can run code; convert to safetensors")
    if str(model).isidentifier() and not path.exists() and (library := _library_with(str(model))):
        return build_skeleton(model_class(str(model), library), None, dtype)
    if component is not None:
        if base is not None and path.exists() and not (path / "model_index.json").is_file():
            model = base
        library, name = component_class(model, component)
        config = _component_config(model, component)
        return build_skeleton(model_class(name, library), config, dtype)
    if path.suffix == ".json" and path.is_file() and not path.name.endswith(".index.json"):
        config = read_json(path)
    elif looks_like_hub_id(model):
        config = _hub_config(str(model))
    else:
        config = _local_config(path, base)
    library, name = class_of(config)
    if not name:
        raise SVDQuantError(f"{model}: its config.json names no model class (_class_name, architectures)")
    return build_skeleton(model_class(name, library), config, dtype)


def class_of(config: dict[str, Any]) -> tuple[str, str]:
    """(library, class) that a model's configuration names; the class is "" where it names none."""
    if "_class_name" in config:
        return "diffusers", str(config["_class_name"])
    architectures = config.get("architectures") or [""]
    return "transformers", str(architectures[0])


def build_skeleton(cls: Any, config: dict[str, Any] | None, dtype: torch.dtype) -> nn.Module:
    """A model of `cls` on the meta device, in evaluation mode. config: None = the defaults of the class."""
    # A quantized model's own configuration describes the same module tree.
    fields = {k: v for k, v in (config or {}).items() if k != "quantization_config"}
    with torch.device("meta"):
        if hasattr(cls, "config_class"):
            # Plain attention traces on tensors without data.
            made = cls.config_class.from_dict(fields | {"attn_implementation": "eager"})
            model = cls(made)
        else:
            model = cls() if config is None else cls.from_config(fields)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return model.eval()


def _library_with(name: str) -> str | None:
    """The library that has a class of that name."""
    import diffusers
    import transformers

    libraries = (("diffusers", diffusers), ("transformers", transformers))
    return next((library for library, module in libraries if hasattr(module, name)), None)


def component_class(pipeline: str | Path, name: str) -> tuple[str, str]:
    """(library, class) of a pipeline's component. Raises `SVDQuantError` where it has no weights worth quantizing."""
    entries = {key: entry for key, entry in read_index(pipeline).items() if isinstance(entry, list)}
    library, cls = (str(part or "") for part in entries.get(name, ["", ""])[:2])
    if not cls:
        present = [key for key, entry in entries.items() if entry[-1] is not None]
        raise SVDQuantError(f"{pipeline}: the pipeline has no {name}; its components are {', '.join(present)}")
    if "Autoencoder" in cls:
        raise SVDQuantError(f"{name} is an {cls}, made of convolutions that stay in 16 bits; leave it out")
    base = {"diffusers": "ModelMixin", "transformers": "PreTrainedModel"}.get(library)
    found = None if base is None else getattr(importlib.import_module(library), cls, None)
    if base is None or base not in [parent.__name__ for parent in getattr(found, "__mro__", ())]:
        raise SVDQuantError(f"{name} is a {cls}, no model of diffusers or transformers; leave it out")
    return library, cls


def _component_config(pipeline: str | Path, component: str) -> dict[str, Any]:
    name = f"{component}/config.json"
    if not looks_like_hub_id(pipeline):
        return read_json(Path(pipeline) / name)
    config = hub_json(str(pipeline), name)
    if config is None:
        raise SVDQuantError(f"{pipeline}: has no {name}")
    return config


def _local_config(path: Path, base: str | None) -> dict[str, Any]:
    from .fine_tune import bare_file
    from .single_file import config_of_file

    path = bare_file(path) or path
    if path.is_file():
        return open_checkpoint(path).config or config_of_file(path, base)
    if not path.is_dir():
        raise SVDQuantError(f"{path}: does not exist; give {ACCEPTED}")
    if (path / "model_index.json").is_file():
        return read_json(path / denoisers(path)[0] / "config.json")
    if (path / "config.json").is_file():
        return read_json(path / "config.json")
    raise SVDQuantError(f"{path}: has no config.json; give {ACCEPTED}")


def _hub_config(repo: str) -> dict[str, Any]:
    for name in ("transformer/config.json", "unet/config.json", "config.json"):
        config = hub_json(repo, name)
        if config is not None:
            return config
    raise SVDQuantError(f"{repo}: has no transformer/config.json, unet/config.json or config.json")
