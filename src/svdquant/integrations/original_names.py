"""What a file of weights holds, by the names in it, and those names as diffusers has them."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import SVDQuantError
from .flux_names import from_black_forest_labs
from .lazy_tensor import LazyTensor

# What stands before a denoiser's names: in all-in-one checkpoints, in ComfyUI's saves, in trainers' state dicts.
PREFIXES = (
    "model.diffusion_model.",
    "model.model.",
    "diffusion_model.",
    "transformer.",
    "unet.",
    "net.",
    "module.",
    "model.",
    "",
)
# Class of diffusers → groups of names of which a file of it has all of one group. The first class that fits counts.
_MARKS: dict[str, tuple[tuple[str, ...], ...]] = {
    "Flux2Transformer2DModel": (
        ("single_stream_modulation.lin.weight",),
        ("single_transformer_blocks.0.attn.to_qkv_mlp_proj.weight",),
    ),
    "ChromaTransformer2DModel": (("distilled_guidance_layer.in_proj.weight",),),
    "HunyuanVideoTransformer3DModel": (
        ("txt_in.individual_token_refiner.blocks.0.adaLN_modulation.1.bias",),
        ("context_embedder.token_refiner.refiner_blocks.0.norm1.weight",),
    ),
    "FluxTransformer2DModel": (
        ("double_blocks.0.img_attn.norm.key_norm.scale", "single_blocks.0.linear1.weight"),
        ("double_blocks.0.img_attn.norm.key_norm.weight", "single_blocks.0.linear1.weight"),
        ("single_transformer_blocks.0.proj_mlp.weight", "context_embedder.weight"),
    ),
    "SD3Transformer2DModel": (
        ("joint_blocks.0.context_block.adaLN_modulation.1.bias",),
        ("transformer_blocks.0.norm1_context.linear.weight", "pos_embed.pos_embed", "context_embedder.bias"),
    ),
    "SanaTransformer2DModel": (
        ("blocks.0.mlp.inverted_conv.conv.weight",),
        ("transformer_blocks.0.ff.conv_inverted.weight",),
    ),
    "QwenImageTransformer2DModel": (("transformer_blocks.0.img_mod.1.weight", "txt_norm.weight"),),
    "ZImageTransformer2DModel": (
        ("layers.0.adaLN_modulation.0.weight", "cap_embedder.1.weight"),
        ("layers.0.attention.to_q.weight", "all_x_embedder.2-1.weight"),
    ),
    "Lumina2Transformer2DModel": (("layers.0.adaLN_modulation.1.weight", "cap_embedder.0.weight"),),
    "WanVACETransformer3DModel": (("vace_blocks.0.after_proj.bias",), ("vace_blocks.0.proj_out.bias",)),
    "WanAnimateTransformer3DModel": (("face_adapter.fuser_blocks.0.linear2.weight",),),
    "WanTransformer3DModel": (
        ("head.modulation",),
        ("blocks.0.attn1.to_q.weight", "condition_embedder.time_proj.weight"),
    ),
    "LTX2VideoTransformer3DModel": (
        ("audio_patchify_proj.weight",),
        ("audio_proj_in.weight", "audio_time_embed.linear.weight"),
    ),
    "LTXVideoTransformer3DModel": (
        ("patchify_proj.weight",),
        ("transformer_blocks.0.scale_shift_table", "proj_in.weight", "time_embed.linear.weight"),
    ),
    "MochiTransformer3DModel": (("blocks.0.attn.qkv_x.weight",),),
    "AuraFlowTransformer2DModel": (("double_layers.0.attn.w2q.weight",),),
    "HiDreamImageTransformer2DModel": (("double_stream_blocks.0.block.adaLN_modulation.1.bias",),),
    "CosmosTransformer3DModel": (
        ("blocks.block1.blocks.0.block.attn.to_q.0.weight",),
        ("blocks.0.self_attn.q_proj.weight", "x_embedder.proj.1.weight"),
    ),
    "PixArtTransformer2DModel": (
        ("adaln_single.linear.weight", "pos_embed.proj.weight", "caption_projection.linear_1.weight"),
    ),
    "UNet2DConditionModel": (
        ("input_blocks.0.0.weight",),
        ("down_blocks.0.resnets.0.conv1.weight", "time_embedding.linear_1.weight"),
    ),
}
_LORA = re.compile(r"\.?(lora_[AB]|lora_(up|down)|lora\.(up|down)|lokr_w[12]|hada_w[12]|oft_blocks|dora_scale)\b")
# Parts of names → what else a file may hold. Read only where no denoiser is found.
_OTHERS = (
    (("control_model.", "controlnet_blocks.", "controlnet_cond_embedding.", "control_layers."), "ControlNet"),
    (
        (
            "SelfAttention.q.weight",
            "text_model.encoder.",
            "transformer.resblocks.",
            "self_attn.q_proj.weight",
            "self_attn.k_proj.weight",
        ),
        "text encoder",
    ),
    (("decoder.conv_in.", "decoder.up", "decoder.conv1.", "decoder.stages.", "first_stage_model."), "VAE"),
)
# Buffers and counters of training code, which no model of diffusers has.
_SPARE = re.compile(
    r"^(model_ema\.|norm_final\.weight$|pos_embed$|y_embedder\.y_embedding$|__\w+__$|scaled_fp8$|num_batches_tracked$)"
    r"|^(video|audio)_embeddings_connector\.|\.inv_freq$|^pos_embedder\.|_extra_state$|^accum_|^rope\."
)


@dataclass(frozen=True)
class Found:
    """The denoiser in a file: what stands before its names, and its class."""

    prefix: str
    model_class: str

    def names(self, names: Collection[str]) -> dict[str, str]:
        """The file's names of the denoiser's tensors by what they are without the prefix."""
        return {name[len(self.prefix) :]: name for name in names if name.startswith(self.prefix)}


def find_denoiser(names: Collection[str], where: Path) -> Found:
    """Raises `SVDQuantError` saying what the file holds instead where it holds no denoiser that is known."""
    names = set(names)
    if any(_LORA.search(name) for name in names):
        raise SVDQuantError(
            f"{where}: is an adapter, not a model; draw with it by --lora, or put it into a quantized model with "
            "`svdquant lora merge`"
        )
    for prefix in PREFIXES:
        for model_class, groups in _MARKS.items():
            if any(all(prefix + mark in names for mark in group) for group in groups):
                return Found(prefix, model_class)
    for parts, kind in _OTHERS:
        if any(part in name for part in parts for name in names):
            raise SVDQuantError(f"{where}: is a {kind} alone; give the file of a transformer or UNet")
    shown = min(names, default="nothing")
    raise SVDQuantError(
        f"{where}: holds no transformer or UNet that is known by its names ({shown}, …); give a pipeline folder, or a "
        "model folder with config.json"
    )


def to_diffusers(
    model_class: str,
    tensors: Mapping[str, LazyTensor],
    expected: Mapping[str, Any],
    config: dict[str, Any],
    where: Path,
    base: str,
    ignore: Collection[str] = (),
) -> dict[str, LazyTensor]:
    """The tensors under the names that `expected`, a model's, has.

    Of the names as they are and the converted ones, those count of which fewer are missing. Raises `SVDQuantError` for
    a tensor that is missing, has another shape, or belongs to no part of the model: the file is of another model then.
    base: what the model is that of, for that sentence. ignore: patterns of converted names that the model leaves out.
    """
    chosen = dict(tensors)
    if not expected.keys() <= tensors.keys():
        try:
            converted = _converted(model_class, tensors, config)
        except (KeyError, IndexError, ValueError, RuntimeError, AttributeError, TypeError) as error:
            converted = {}
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        else:
            reason = ""
        if len(expected.keys() - converted.keys()) < len(expected.keys() - tensors.keys()):
            chosen = converted
        elif reason and len(expected.keys() - tensors.keys()) > len(expected) // 2:
            raise SVDQuantError(
                f"{where}: its names could not be converted to a {model_class}'s ({reason}); {_remedy(base)}"
            )
    if missing := sorted(expected.keys() - chosen.keys()):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise SVDQuantError(f"{where}: lacks {missing[0]}{more}, which {base} has; {_remedy(base)}")
    for name, tensor in expected.items():
        if chosen[name].shape != tensor.shape:
            raise SVDQuantError(
                f"{where}: {name} has the shape {list(chosen[name].shape)}, in {base} it has {list(tensor.shape)}; "
                f"{_remedy(base)}"
            )
    ignored = [name for name in chosen.keys() - expected.keys() if any(re.search(p, name) for p in ignore)]
    used = frozenset().union(*(chosen[name].sources for name in (*expected, *ignored)))
    if left := sorted(name for name in tensors.keys() - used if not _SPARE.search(name)):
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise SVDQuantError(f"{where}: holds {left[0]}{more}, which {base} has no place for; {_remedy(base)}")
    return {name: chosen[name] for name in expected}


def convert(model_class: str, tensors: Mapping[str, LazyTensor], config: dict[str, Any]) -> dict[str, LazyTensor]:
    """The tensors under diffusers' names; as they are where the class has no other names, or these are diffusers'."""
    try:
        converted = _converted(model_class, tensors, config)
    except (KeyError, IndexError, ValueError, RuntimeError, AttributeError, TypeError):
        return dict(tensors)
    return converted


def _converted(model_class: str, tensors: Mapping[str, LazyTensor], config: dict[str, Any]) -> dict[str, LazyTensor]:
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    if model_class == "FluxTransformer2DModel":
        return from_black_forest_labs(tensors)
    function: Callable[..., Any] | None = SINGLE_FILE_LOADABLE_CLASSES.get(model_class, {}).get("checkpoint_mapping_fn")
    if function is None:
        return dict(tensors)
    # These two look for names below the prefix that their files have.
    given = dict(tensors)
    if model_class == "SanaTransformer2DModel":
        # It drops these two, and fails where they have been dropped already.
        given = dict.fromkeys(("pos_embed", "y_embedder.y_embedding"), next(iter(tensors.values()))) | given
    prefix = {"UNet2DConditionModel": "model.diffusion_model.", "CosmosTransformer3DModel": "net."}.get(model_class, "")
    with torch.no_grad():
        made = function(checkpoint={prefix + name: tensor for name, tensor in given.items()}, config=config)
    return {name: tensor for name, tensor in made.items() if isinstance(tensor, LazyTensor)}


def _remedy(base: str) -> str:
    return f"if the file is of another model than {base}, name its pipeline with --base"
