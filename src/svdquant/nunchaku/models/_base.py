"""What the model classes share: `from_pretrained` with Nunchaku's keywords, and standing in for the stock class."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from ...checkpoint import load_model
from ...checkpoint.header import read_header
from ...checkpoint.hub import ACCESS, fetch
from ...errors import SVDQuantError
from ...nn import quantized_layers
from ..utils import PRECISIONS, default_device, require_device

# Keywords of Hugging Face's loaders that change nothing here: loading is always from safetensors, memory-mapped.
_WITHOUT_EFFECT = {
    "force_filename",
    "headers",
    "library_name",
    "library_version",
    "local_dir_use_symlinks",
    "low_cpu_mem_usage",
    "mirror",
    "proxies",
    "repo_type",
    "resume_download",
    "use_safetensors",
    "user_agent",
}
_HUB_KEYWORDS = ("subfolder", *ACCESS)
T = TypeVar("T", bound=type)

# Stock class name → the class here that loads it.
FAMILIES = {
    "FluxTransformer2DModel": "NunchakuFluxTransformer2dModel",
    "QwenImageTransformer2DModel": "NunchakuQwenImageTransformer2DModel",
    "SanaTransformer2DModel": "NunchakuSanaTransformer2DModel",
    "T5EncoderModel": "NunchakuT5EncoderModel",
    "UNet2DConditionModel": "NunchakuSDXLUNet2DConditionModel",
    "ZImageTransformer2DModel": "NunchakuZImageTransformer2DModel",
}


def stands_in(cls: T) -> T:
    """Lets a subclass pass for the stock class it extends wherever a library writes or looks up the class by name.

    Saved models and pipelines then name diffusers' (transformers') own class and load without this package's names.
    """
    stock = next(base for base in cls.__mro__[1:] if base.__module__.partition(".")[0] in ("diffusers", "transformers"))
    cls._stock, cls._nunchaku_path = stock, (cls.__module__, cls.__name__)  # type: ignore[attr-defined]
    cls.__name__, cls.__qualname__, cls.__module__ = stock.__name__, stock.__qualname__, stock.__module__
    return cls


def _rebuild(module: str, name: str) -> Any:
    cls = getattr(importlib.import_module(module), name)
    return cls.__new__(cls)


class NunchakuModel:
    """First base of every model class here; the second is the stock class."""

    _stock: type
    _nunchaku_path: tuple[str, str]
    # "accelerator" or "cpu": where models of this class are put that are loaded without `device`.
    _default_device = "accelerator"

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        device: str | torch.device | int | None = None,
        offload: bool = False,
        torch_dtype: torch.dtype = torch.bfloat16,
        precision: str = "auto",
        return_metadata: bool = False,
        **kwargs: Any,
    ) -> Any:
        """A quantized model, or (model, metadata of its file) with `return_metadata`.

        pretrained_model_name_or_path: a file, a folder, "owner/name/file.safetensors" or "owner/name"; every format
            that `svdquant.load_model` reads.
        device: None = the first accelerator, else the CPU, for the classes that Nunchaku puts on the GPU; the CPU for
            those that it leaves there (FLUX V2, Qwen-Image, Z-Image, SDXL), so that a pipeline can place them.
        offload: the blocks stay in host memory, and come to the accelerator one after another from the moment the
            model is sent there: now, where `device` is named; else with the pipeline (`pipe.to("cuda")`).
        torch_dtype: of what is not packed.
        precision: "int4" or "fp4" warns where the file holds the other one; both run on every device.
        base: a pipeline (folder or Hub id) that provides what a file of 2024 lacks.
        kwargs: `revision`, `token`, `cache_dir`, `local_files_only`, `subfolder`, … for the Hub.

        Raises `SVDQuantError` for a file of another model and for keywords that mean nothing.
        """
        if offload and not hasattr(cls, "set_offload"):
            raise SVDQuantError(f"{cls._nunchaku_path[1]} moves as a whole; leave offload out")
        where = default_device(cls._default_device) if device is None else require_device(device)
        model, metadata = cls._load(pretrained_model_name_or_path, torch_dtype, precision, kwargs)
        if offload:
            model.set_offload(True)
        if not offload or device is not None:
            model.to(where)
        return (model, metadata) if return_metadata else model

    @classmethod
    def _load(
        cls, path: str | Path, dtype: torch.dtype, precision: str, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, str]]:
        if precision not in PRECISIONS:
            raise SVDQuantError(f"precision={precision!r} is not one of {', '.join(PRECISIONS)}")
        hub = {key: kwargs.pop(key) for key in _HUB_KEYWORDS if key in kwargs}
        base = kwargs.pop("base", None)
        if unknown := sorted(kwargs.keys() - _WITHOUT_EFFECT):
            raise SVDQuantError(f"{cls._nunchaku_path[1]}.from_pretrained takes no {unknown[0]}; leave it out")
        local = fetch(path, **hub)
        if not local.exists():
            # Still an id, of a repository that diffusers loads, or a path whose absence `load_model` explains.
            model = load_model(local.as_posix(), torch_dtype=dtype, base=base, **hub)
        else:
            model = load_model(local, torch_dtype=dtype, base=base)
        cls._adopt(model, path)
        cls._compare_precision(model, precision, path)
        return model, _metadata(local)

    @classmethod
    def _adopt(cls, model: Any, path: str | Path) -> None:
        if type(model) is not cls._stock:
            found = type(model).__name__
            use = f"load it with {FAMILIES[found]}" if found in FAMILIES else "load it with svdquant.load_model"
            raise SVDQuantError(f"{path}: holds a {found}, not a {cls._stock.__name__}; {use}")
        model.__class__ = cls

    @classmethod
    def _compare_precision(cls, model: nn.Module, precision: str, path: str | Path) -> None:
        if precision == "auto":
            return
        wanted = PRECISIONS[precision]
        held = {layer.spec.weights for layer in quantized_layers(model).values() if layer.spec.kind == "svdquant"}  # type: ignore[union-attr]
        if held and wanted not in held:
            warnings.warn(
                f"{path}: holds {', '.join(sorted(held))} weights, not {wanted}; they run here all the same",
                stacklevel=4,
            )

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is not where its name says, so pickle gets the place where it is.
        return _rebuild, self._nunchaku_path, self.__dict__


def _metadata(local: Path) -> dict[str, str]:
    files = [local] if local.is_file() else sorted(local.glob("*.safetensors")) if local.is_dir() else []
    merged: dict[str, str] = {}
    for file in files:
        merged |= read_header(file)[1]
    return merged
