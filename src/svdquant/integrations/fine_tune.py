"""Weights of a denoiser without a configuration: where they are, which model they are of, under which names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.layout import Checkpoint, open_checkpoint
from ..checkpoint.mapped import MappedTensors
from ..checkpoint.skeleton import cast_floating
from ..errors import SVDQuantError
from ..ptq.damage import damage
from .lazy_tensor import LazyTensor, forget
from .original_bases import default_base
from .original_config import config_from_shapes
from .original_names import PREFIXES, Found, convert, find_denoiser, to_diffusers
from .skeletons import build_skeleton
from .sources import model_class
from .stored_weights import lazy_weights

_WEIGHTS = (".safetensors", ".sft")
_INDEX = ".safetensors.index.json"
_SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})\.safetensors")


def bare_file(path: Path) -> Path | None:
    """The weights that `path` is without a configuration: a file, a sharded set's index, or either in a folder.

    Of one shard, the index of its set. Raises `SVDQuantError` for a shard without its set.
    """
    if path.is_file() and path.name.lower().endswith((*_WEIGHTS, _INDEX)):
        return _whole_set(path)
    if not path.is_dir() or any((path / name).is_file() for name in ("config.json", "model_index.json")):
        return None
    return _only_weights(path)


def _only_weights(folder: Path) -> Path | None:
    indices = sorted(folder.glob(f"*{_INDEX}"))
    files = indices or sorted(file for file in folder.iterdir() if file.suffix.lower() in _WEIGHTS)
    return files[0] if len(files) == 1 else None


def _whole_set(file: Path) -> Path:
    shard = _SHARD.fullmatch(file.name)
    if shard is None or int(shard[2]) == 1:
        return file
    index = file.with_name(shard[1] + _INDEX)
    if index.is_file():
        return index
    raise SVDQuantError(
        f"{file}: is one of {int(shard[2])} parts of a model, and {index.name} is not beside it; download the whole "
        "set into one folder"
    )


def weights_alone(path: Path, base: str | None) -> Path | None:
    """`bare_file`, or the weights of a model folder that is to be put into the pipeline `base`."""
    if path.is_file() or path.suffix.lower() == ".gguf":
        return bare_file(path) or path
    if base is None or (path / "model_index.json").is_file() or not (path / "config.json").is_file():
        return bare_file(path)
    return _only_weights(path)


# As ComfyUI reads them: fine-tunes for v-prediction draw noise with the scheduler of another model.
_SCHEDULERS: dict[str, tuple[str, Any]] = {
    "v_pred": ("prediction_type", "v_prediction"),
    "ztsnr": ("rescale_betas_zero_snr", True),
}


# In LTX-2's files below the denoiser's prefix, in diffusers a component of its own.
_CONNECTOR = re.compile(r"(video|audio)_embeddings_connector\.")


class FineTune:
    """Weights of a denoiser without its configuration. Use as a context manager: it maps the file.

    Raises `SVDQuantError` for a damaged file, one that is quantized already, and one that holds no denoiser.
    """

    def __init__(self, path: Path, config: dict[str, Any] | None = None) -> None:
        """config: of the model that it has to be; a file with its very names needs not be known otherwise."""
        self.path = path
        self.checkpoint: Checkpoint = open_checkpoint(path)
        if self.checkpoint.quantization is not None:
            raise SVDQuantError(f"{path}: is quantized already; start from the 16-bit model")
        self.found: Found = self._as_it_is(config) or find_denoiser(self.checkpoint.tensors, path)
        self._mapped = MappedTensors(self.checkpoint.tensors)

    def __enter__(self) -> FineTune:
        self._mapped.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        forget()
        self._mapped.__exit__(*error)

    def _as_it_is(self, config: dict[str, Any] | None) -> Found | None:
        """What `config` describes, where the file has all of that model's names."""
        if config is None:
            return None
        try:
            names = _state_of(config).keys()
        except SVDQuantError:
            raise
        # Classes of diffusers check no type of what configures them.
        except (TypeError, ValueError, RuntimeError, KeyError, AttributeError, ZeroDivisionError) as error:
            raise SVDQuantError(
                f"{self.path}: the configuration of its {config['_class_name']} makes no model ({error}); download its "
                "pipeline again"
            ) from error
        held = self.checkpoint.tensors.keys()
        fitting = (p for p in PREFIXES if all(p + name in held for name in names))
        prefix = next(fitting, None)
        return None if prefix is None else Found(prefix, str(config["_class_name"]))

    @cached_property
    def tensors(self) -> dict[str, LazyTensor]:
        """The denoiser's, as floats, by the file's names without their prefix."""
        return self.below(self.found.prefix)

    def below(self, prefix: str) -> dict[str, LazyTensor]:
        """The tensors whose names begin with `prefix`, as floats, by the rest of their names."""
        held = self.checkpoint.tensors
        infos = {name[len(prefix) :]: info for name, info in held.items() if name.startswith(prefix)}
        return lazy_weights(infos, self._mapped, self.checkpoint.metadata, self.path, prefix)

    def default_base(self) -> str | None:
        return default_base(self.found.model_class, self.tensors, self.path.name)

    def config(self) -> dict[str, Any]:
        """Of the model, from its tensors' shapes. Raises `SVDQuantError` where they do not tell it."""
        name = self.found.model_class
        why: SVDQuantError | None = None
        for tensors in (self.tensors, convert(name, self.tensors, _SDXL_UNET)):
            config = config_from_shapes(name, tensors)
            if config is None:
                continue
            config = {"_class_name": name} | config
            try:
                self.converted(config, f"a {name} of those shapes")
            except SVDQuantError as error:
                why = error
                continue
            except (ValueError, TypeError, RuntimeError):
                continue
            return config
        raise why or SVDQuantError(
            f"{self.path}: a single file lacks its configuration, which its shapes do not tell of a {name}; name its "
            "pipeline with --base"
        )

    def converted(self, config: dict[str, Any], base: str) -> dict[str, LazyTensor]:
        """The tensors under the names, and in the shapes, of the model that `config`, of `base`, describes."""
        cls = model_class(str(config.get("_class_name", "")))
        if not _alike(self.found.model_class, cls.__name__):
            remedy = self.default_base()
            raise SVDQuantError(
                f"{self.path}: holds a {self.found.model_class}, and {base} has a {cls.__name__}; give its own "
                f"pipeline{f', e.g. {remedy!r},' if remedy else ''} as base"
            )
        expected = _state_of(config)
        ignore = tuple(getattr(cls, "_keys_to_ignore_on_load_unexpected", None) or ())
        return to_diffusers(cls.__name__, self.tensors, expected, config, self.path, base, ignore)

    def scheduler_fields(self) -> dict[str, Any]:
        """What the file says of its scheduler, by tensors of certain names; UNets alone do."""
        if self.found.model_class != "UNet2DConditionModel":
            return {}
        return {field: value for mark, (field, value) in _SCHEDULERS.items() if mark in self.checkpoint.tensors}

    def left_out(self, used: Collection[str] = ()) -> str:
        """What else the file holds, in words; "" for nothing. used: prefixes of what is used besides the denoiser."""
        prefixes = (self.found.prefix, *used)
        rest = [name for name in self.checkpoint.tensors if not name.startswith(prefixes)]
        rest += [name for name in self.found.names(self.checkpoint.tensors) if _CONNECTOR.match(name)]
        # Names of at least two parts; single ones are schedules and counters.
        groups = Counter(name.split(".")[0] for name in rest if "." in name)
        return ", ".join(f"{group} ({count} tensors)" for group, count in groups.most_common())


# Fields of a UNet's configuration that its conversion reads, as SDXL has them.
_SDXL_UNET = {
    "layers_per_block": 2,
    "addition_embed_type": "text_time",
    "class_embed_type": None,
    "num_class_embeds": None,
}


def _state_of(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    cls = model_class(str(config.get("_class_name", "")))
    return build_skeleton(cls, config, torch.bfloat16).state_dict()


def _alike(found: str, wanted: str) -> bool:
    """Whether files of one class may be of the other: diffusers converts the names of both by one function."""
    if found == wanted:
        return True
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES as known

    functions = [known.get(name, {}).get("checkpoint_mapping_fn") for name in (found, wanted)]
    return functions[0] is not None and functions[0] is functions[1]


def finite(name: str, tensor: LazyTensor, dtype: torch.dtype, fp32: tuple[str, ...], where: Path) -> Tensor:
    """A tensor's values in the model's type. Raises `SVDQuantError` naming the file's tensors where some are NaN."""
    value = tensor.value()
    if value.is_floating_point() and (why := damage(value)):
        raise SVDQuantError(f"{where}: {', '.join(sorted(tensor.sources))} holds {why}; download it again")
    # A copy of its own: cut from a larger one, it would keep that in memory.
    value = cast_floating(name, value, dtype, fp32, where)
    return value.contiguous() if value.untyped_storage().nbytes() == value.nbytes else value.clone()
