"""The text encoders and the VAE inside an all-in-one checkpoint of a UNet, under the names of the base's own files."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.layout import open_checkpoint, read_json
from ..errors import SVDQuantError
from .fine_tune import FineTune, finite
from .lazy_tensor import LazyTensor
from .skeletons import class_of
from .slots import read_index
from .sources import model_class

# Component → what stands before its names, in SDXL's checkpoints and in Stable Diffusion 1's.
PREFIXES = {
    "text_encoder": ("conditioner.embedders.0.transformer.", "cond_stage_model.transformer."),
    "text_encoder_2": ("conditioner.embedders.1.model.",),
    "vae": ("first_stage_model.",),
}
SCHEDULER = Path("scheduler") / "scheduler_config.json"
_OPEN_CLIP = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)")


def own_parts(tune: FineTune, base: str) -> dict[str, str]:
    """Component → prefix of its names, of those that both the file and the pipeline `base` have."""
    if tune.found.model_class != "UNet2DConditionModel":
        return {}
    index, found = read_index(base), {}
    for name, prefixes in PREFIXES.items():
        if not isinstance(index.get(name), list) or index[name][-1] is None:
            continue
        prefix = next((p for p in prefixes if any(n.startswith(p) for n in tune.checkpoint.tensors)), None)
        if prefix is not None:
            found[name] = prefix
    return found


def part_tensors(tune: FineTune, part: str, prefix: str, pipeline: Path) -> dict[str, LazyTensor]:
    """A component's tensors under the names of its files in `pipeline`.

    Raises `SVDQuantError` where one is missing or has another shape.
    """
    tensors = tune.below(prefix)
    if part == "vae":
        from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

        config = read_json(pipeline / part / "config.json")
        named = {prefix + name: tensor for name, tensor in tensors.items()}
        tensors = {k: v for k, v in convert_ldm_vae_checkpoint(named, config).items() if isinstance(v, LazyTensor)}
    elif part == "text_encoder_2":
        tensors = _from_open_clip(tensors)
    chosen = {}
    for name, info in open_checkpoint(pipeline, part).tensors.items():
        if name.endswith("position_ids"):
            continue
        tensor = tensors.get(name, tensors.get(f"text_model.{name}"))
        if tensor is None or tuple(tensor.shape) != info.shape:
            found = "is missing" if tensor is None else f"is {list(tensor.shape)}"
            raise SVDQuantError(
                f"{tune.path}: its {part} is not as {pipeline} has it ({name} {found} instead of {list(info.shape)}); "
                "give the pipeline that it was made from as base"
            )
        chosen[name] = tensor
    return chosen


def _from_open_clip(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """OpenCLIP's text tower under the names of transformers."""
    outer = {
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "ln_final.weight": "text_model.final_layer_norm.weight",
        "ln_final.bias": "text_model.final_layer_norm.bias",
    }
    converted = {}
    for name, tensor in tensors.items():
        block = _BLOCK.fullmatch(name)
        if name == "text_projection":
            converted["text_projection.weight"] = tensor.t()
        elif name in outer:
            converted[outer[name]] = tensor
        elif block is not None:
            start, leaf = f"text_model.encoder.layers.{block[1]}.", block[3]
            if block[2] == "attn.in_proj":
                for letter, piece in zip("qkv", tensor.chunk(3, 0), strict=True):
                    converted[f"{start}self_attn.{letter}_proj.{leaf}"] = piece
            elif block[2] in _OPEN_CLIP:
                converted[f"{start}{_OPEN_CLIP[block[2]]}.{leaf}"] = tensor
    return converted


def load_own_parts(
    file: Path, pipeline: Path, slot: str, dtype: torch.dtype, given: Collection[str] = ()
) -> dict[str, Any]:
    """The components besides the denoiser that the file has, and the scheduler if the file asks for another.

    slot: the denoiser's name in the pipeline. given: components that are not wanted.
    """
    loaded: dict[str, Any] = {}
    with FineTune(file, read_json(pipeline / slot / "config.json")) as tune:
        for part, prefix in own_parts(tune, str(pipeline)).items():
            if part in given:
                continue
            tensors = part_tensors(tune, part, prefix, pipeline)
            state = {name: finite(name, tensor, dtype, (), file) for name, tensor in tensors.items()}
            library, name = class_of(read_json(pipeline / part / "config.json"))
            cls: Any = model_class(name, library)
            if library == "transformers":
                config = cls.config_class.from_pretrained(pipeline / part)
                loaded[part] = cls.from_pretrained(None, config=config, state_dict=state, dtype=dtype).eval()
            else:
                model: Any = cls.from_config(cls.load_config(pipeline / part)).to(dtype)
                model.load_state_dict(state)
                loaded[part] = model.eval()
        fields = tune.scheduler_fields()
    if fields and "scheduler" not in given:
        import diffusers

        config = read_json(pipeline / SCHEDULER) | fields
        loaded["scheduler"] = getattr(diffusers, config["_class_name"]).from_config(config)
    return loaded
