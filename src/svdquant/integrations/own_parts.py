"""The text encoders and the VAE inside an all-in-one checkpoint, under the names of the base's own files."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ..checkpoint.header import TensorInfo
from ..checkpoint.layout import open_checkpoint, read_json
from ..checkpoint.mapped import TORCH_TYPES, MappedTensors
from ..errors import SVDQuantError
from .fine_tune import FineTune, finite
from .lazy_tensor import LazyTensor
from .skeletons import component_class
from .slots import read_index
from .sources import model_class

SCHEDULER = Path("scheduler") / "scheduler_config.json"
# What stands before a text encoder's names: in Stable Diffusion's and SDXL's files, in ComfyUI's, in diffusers' way.
_ENCODER = re.compile(
    r"((cond_stage_model|conditioner\.embedders\.\d+|text_encoders\.[^.]+)\.)(transformer|model)\.|(text_encoder(_\d)?\.)"
)
_VAE = ("first_stage_model.", "vae.")
# A part of which fewer tensors fit is another model than the base's.
_LEAST_LIKENESS = 0.5
# In transformers the same tensor under two names.
_TIED = {"shared.weight": "encoder.embed_tokens.weight", "encoder.embed_tokens.weight": "shared.weight"}
# What files may lack: no pipeline reads the head, and SD3 was trained without CLIP-L's projection.
_OF_BASE = ("text_projection.weight", "lm_head.weight")
# Buffers, tokenizers, and heads that the base's model does not have.
_SPARE = re.compile(
    r"(^|\.)(position_ids|inv_freq|logit_scale|scaled_fp8|spiece_model|tekken_model|text_projection(\.weight)?|"
    r"lm_head\.weight)$"
)


@dataclass
class OwnParts:
    """prefixes: component of the pipeline → what stands before its names in the file; unread: the same of what is left
    out because it cannot be read → why."""

    prefixes: dict[str, str] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)

    @property
    def used(self) -> tuple[str, ...]:
        """Beginnings of names that belong to the parts, counters beside their weights included."""
        return tuple(_root(prefix) for prefix in self.prefixes.values())


def _root(prefix: str) -> str:
    found = _ENCODER.fullmatch(prefix)
    return prefix if found is None else found[1] or prefix


def own_parts(tune: FineTune, pipeline: Path) -> OwnParts:
    """The parts that both the file and the pipeline folder have: those that are most alike belong together."""
    names = tune.checkpoint.tensors
    encoders = {found[0] for name in names if (found := _ENCODER.match(name))}
    # Where two are alike they come in the order of the pipeline's: CLIP-L, CLIP-G, T5.
    ordered = sorted(encoders, key=lambda prefix: (".clip_g." in prefix, prefix))
    vaes = [prefix for prefix in _VAE if any(name.startswith(prefix) for name in names)]
    parts, likeness = OwnParts(), {}
    for part, entry in read_index(pipeline).items():
        if not isinstance(entry, list) or entry[-1] is None or not (pipeline / part / "config.json").is_file():
            continue
        encoder = part.startswith("text_encoder") and entry[0] == "transformers"
        prefixes = ordered if encoder else vaes if part == "vae" else []
        wanted = open_checkpoint(pipeline, part).tensors if prefixes else {}
        wanted = {name: info for name, info in wanted.items() if name not in _OF_BASE}
        for prefix in prefixes:
            try:
                tensors = _renamed(tune, part, prefix, pipeline)
            except SVDQuantError as error:
                parts.unread[prefix] = str(error).removeprefix(f"{tune.path}: ")
                continue
            fitting = sum(_has_shape(_find(tensors, name), info) for name, info in wanted.items())
            likeness[part, prefix] = fitting / max(len(wanted), 1)
    for (part, prefix), share in sorted(likeness.items(), key=lambda entry: -entry[1]):
        if share >= _LEAST_LIKENESS and part not in parts.prefixes and prefix not in parts.prefixes.values():
            parts.prefixes[part] = prefix
    return parts


def part_tensors(tune: FineTune, part: str, prefix: str, pipeline: Path) -> dict[str, LazyTensor]:
    """A component's tensors under the names of its files in `pipeline`.

    Raises `SVDQuantError` where one is missing, has another shape, or has no place there.
    """
    tensors = _renamed(tune, part, prefix, pipeline)
    chosen: dict[str, LazyTensor] = {}
    for name, info in open_checkpoint(pipeline, part).tensors.items():
        if name.endswith("position_ids"):
            continue
        tensor = _find(tensors, name)
        if tensor is None and name in _OF_BASE:
            tensor = _of_base(name, info)
        if tensor is None or not _has_shape(tensor, info):
            found = "is missing" if tensor is None else f"is {list(tensor.shape)}"
            raise _unlike(tune, part, pipeline, f"{name} {found} instead of {list(info.shape)}")
        chosen[name] = tensor
    if part == "vae":
        # What its converter leaves out is of no use to the model.
        return chosen
    used = frozenset().union(*(tensor.sources for tensor in chosen.values()))
    left = [name for name in tune.below(prefix).keys() - used if not _SPARE.search(name)]
    left = sorted(name for name in left if prefix + name not in _unused_layers() and _TIED.get(name) not in used)
    if left:
        raise _unlike(tune, part, pipeline, f"{left[0]} has no place there")
    return chosen


def _unlike(tune: FineTune, part: str, pipeline: Path, what: str) -> SVDQuantError:
    return SVDQuantError(
        f"{tune.path}: its {part} is not as {pipeline} has it ({what}); give the pipeline that it was made from as base"
    )


def _has_shape(tensor: LazyTensor | None, info: TensorInfo) -> bool:
    return tensor is not None and tuple(tensor.shape) == info.shape


def _find(tensors: Mapping[str, LazyTensor], name: str) -> LazyTensor | None:
    """Of a file's tensors the one that is `name` in the base's: CLIP's are below `text_model`, or not."""
    aliases = (name, f"text_model.{name}", name.removeprefix("text_model."), _TIED.get(name, name))
    return next((tensors[alias] for alias in aliases if alias in tensors), None)


def _of_base(name: str, info: TensorInfo) -> LazyTensor:
    def read() -> torch.Tensor:
        with MappedTensors({name: info}) as mapped:
            return mapped.get(name)

    like = torch.empty(info.shape, dtype=TORCH_TYPES[info.dtype], device="meta")
    return LazyTensor(read, like, frozenset())


def _renamed(tune: FineTune, part: str, prefix: str, pipeline: Path) -> dict[str, LazyTensor]:
    """The tensors below `prefix` under the names of diffusers or transformers."""
    tensors = tune.below(prefix)
    if part == "vae":
        return _vae_names(tensors, prefix, read_json(pipeline / part / "config.json"))
    if any(name.startswith("transformer.resblocks.") for name in tensors):
        return _open_clip_names(tensors, prefix)
    if prefix.startswith("text_encoders.clip_l."):
        return {name: tensor for name, tensor in tensors.items() if not name.startswith("text_projection")}
    return tensors


def _open_clip_names(tensors: Mapping[str, LazyTensor], prefix: str) -> dict[str, LazyTensor]:
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    width = next((int(tensor.shape[-1]) for name, tensor in tensors.items() if name == "positional_embedding"), 0)
    model = SimpleNamespace(config=SimpleNamespace(hidden_size=width))
    named = {prefix + name: tensor for name, tensor in tensors.items()}
    converted: dict[str, LazyTensor] = convert_open_clip_checkpoint(model, named, prefix=prefix)
    return converted


def _vae_names(tensors: Mapping[str, LazyTensor], prefix: str, config: dict[str, Any]) -> dict[str, LazyTensor]:
    """By diffusers' converter for the class of the base's VAE; as they are where there is none, or nothing to do."""
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    function = SINGLE_FILE_LOADABLE_CLASSES.get(str(config.get("_class_name")), {}).get("checkpoint_mapping_fn")
    if function is None or any(".resnets." in name for name in tensors):
        return dict(tensors)
    # Some look for names below the prefix that their files have.
    begin = prefix if config["_class_name"] in ("AutoencoderKL", "AutoencoderKLLTXVideo") else ""
    try:
        made = function(checkpoint={begin + name: tensor for name, tensor in tensors.items()}, config=config)
    except (KeyError, IndexError, ValueError, RuntimeError, AttributeError, TypeError):
        return dict(tensors)
    return {name: tensor for name, tensor in made.items() if isinstance(tensor, LazyTensor)}


def _unused_layers() -> Collection[str]:
    """Names of Stable Diffusion 2's last layer, which its pipelines never ran."""
    from diffusers.loaders import single_file_utils

    names: Collection[str] = single_file_utils.SD_2_TEXT_ENCODER_KEYS_TO_IGNORE
    return names


def load_own_parts(
    file: Path, pipeline: Path, slot: str, dtype: torch.dtype, given: Collection[str] = ()
) -> dict[str, Any]:
    """The components besides the denoiser that the file has, and the scheduler if the file asks for another.

    slot: the denoiser's name in the pipeline. given: components that are not wanted.
    """
    loaded: dict[str, Any] = {}
    with FineTune(file, read_json(pipeline / slot / "config.json")) as tune:
        for part, prefix in own_parts(tune, pipeline).prefixes.items():
            if part in given:
                continue
            tensors = part_tensors(tune, part, prefix, pipeline)
            state = {name: finite(name, tensor, dtype, (), file) for name, tensor in tensors.items()}
            if part == "vae":
                cls: Any = model_class(str(read_json(pipeline / part / "config.json").get("_class_name")))
                model: Any = cls.from_config(cls.load_config(pipeline / part)).to(dtype)
                model.load_state_dict(state)
                loaded[part] = model.eval()
            else:
                library, name = component_class(pipeline, part)
                cls = model_class(name, library)
                config = cls.config_class.from_pretrained(pipeline / part)
                loaded[part] = cls.from_pretrained(None, config=config, state_dict=state, dtype=dtype).eval()
        fields = tune.scheduler_fields()
    if fields and "scheduler" not in given:
        import diffusers

        config = read_json(pipeline / SCHEDULER) | fields
        loaded["scheduler"] = getattr(diffusers, config["_class_name"]).from_config(config)
    return loaded
