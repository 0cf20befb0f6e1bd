"""Models of no family, whose plans come from guessed inputs: quantized, saved, loaded, and run with these inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import svdquant
from svdquant import SVDQuantConfig
from svdquant.families.guess import guess_inputs, skeleton_of
from svdquant.nn import quantized_layers
from svdquant.ptq import make_plan

CONFIG = SVDQuantConfig(rank=16)
_HEADS = {"num_attention_heads": 2, "attention_head_dim": 64, "num_layers": 2}
_WAN = _HEADS | {"in_channels": 4, "out_channels": 4, "text_dim": 64, "freq_dim": 64, "ffn_dim": 256}
TINY: dict[str, dict[str, Any]] = {
    "AceStepTransformer1DModel": {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 64, "in_channels": 24, "audio_acoustic_hidden_dim": 8,
    },
    "AnyFlowTransformer3DModel": _WAN,
    "BriaFibo2Transformer2DModel": {
        "in_channels": 4, "dim": 128, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 1, "cap_feat_dim": 64,
        "injection_layer_ids": (1,), "perceiver_num_layers": 1, "min_num_gist_tokens": 8, "max_num_gist_tokens": 16,
        "gist_step": 8, "gist_min_text_len": 8, "gist_max_text_len": 16,
    },
    "EasyAnimateTransformer3DModel": _HEADS | {
        "mmdit_layers": 2, "in_channels": 4, "out_channels": 4, "patch_size": 2, "text_embed_dim": 64,
        "time_embed_dim": 64,
    },
    "HiDreamImageTransformer2DModel": _HEADS | {
        "num_single_layers": 1, "patch_size": 2, "in_channels": 4, "caption_channels": [64, 96], "text_emb_dim": 32,
        "llama_layers": [0, 1, 1], "axes_dims_rope": (32, 16, 16),
    },
    "HunyuanVideoFramepackTransformer3DModel": _HEADS | {
        "in_channels": 4, "out_channels": 4, "num_single_layers": 1, "num_refiner_layers": 1, "text_embed_dim": 64,
        "pooled_projection_dim": 32, "rope_axes_dim": (16, 24, 24), "has_image_proj": True, "image_proj_dim": 32,
        "has_clean_x_embedder": True,
    },
    "Ideogram4Transformer2DModel": _HEADS | {
        "in_channels": 16, "intermediate_size": 256, "adaln_dim": 64, "llm_features_dim": 96,
        "mrope_section": (16, 8, 8),
    },
    "LatteTransformer3DModel": _HEADS | {
        "in_channels": 4, "patch_size": 2, "caption_channels": 64, "norm_type": "ada_norm_single",
        "cross_attention_dim": 128, "norm_elementwise_affine": False, "sample_size": 8,
    },
    "MiniMaxH3Transformer3DModel": _HEADS | {
        "hidden_size": 128, "num_refiner_layers": 1, "ffn_dim": 256, "in_channels": 4, "audio_in_channels": 8,
        "text_dim": 64, "freq_dim": 64, "time_embed_hidden_dim": 128, "time_embed_dim": 64, "rope_freq_dim": 8,
    },
    "MiniMaxMusic3Transformer1DModel": _HEADS | {"in_channels": 12, "condition_dim": 48, "ff_inner_dim": 256},
    "OmniGenTransformer2DModel": {
        "hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 256,
        "num_layers": 2, "vocab_size": 64, "pad_token_id": 0, "time_step_dim": 64,
        "rope_scaling": {"type": "su", "short_factor": [1.0] * 32, "long_factor": [1.0] * 32},
    },
    "QwenImage21Transformer2DModel": _HEADS | {
        "in_channels": 16, "out_channels": 16, "context_in_dim": 64, "axes_dims_rope": (16, 24, 24),
    },
    "WanAnimateTransformer3DModel": _WAN | {
        "in_channels": 12, "latent_channels": 4, "image_dim": 64, "face_encoder_hidden_dim": 64,
        "motion_encoder_size": 16, "motion_style_dim": 32, "motion_dim": 4, "motion_encoder_dim": 32,
        "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8}, "inject_face_latents_blocks": 2,
    },
    "WanAnimate2Transformer3DModel": {
        "in_dim": 12, "dim": 256, "ffn_dim": 256, "freq_dim": 64, "text_dim": 64, "out_dim": 4, "num_heads": 2,
        "num_layers": 2, "text_len": 16,
    },
}  # fmt: skip


def built(name: str) -> Any:
    """With numbers that differ everywhere: initialised as they are, some last layers answer with zeros."""
    torch.manual_seed(0)
    model = getattr(diffusers, name)(**TINY[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def inputs_of(model: nn.Module) -> dict[str, Any]:
    """The guessed ones, with values for those that have shapes alone."""
    found: dict[str, Any] = {}
    skeleton = skeleton_of(model)
    assert skeleton is not None

    def attempt(guessed: dict[str, Any]) -> None:
        skeleton(**guessed)
        found.update(guessed)

    guess_inputs(skeleton, attempt)
    generator = torch.Generator().manual_seed(1)

    def valued(x: Any) -> Any:
        return torch.randn(x.shape, generator=generator) if isinstance(x, Tensor) and x.is_meta else x

    return tree_map(valued, {k: v for k, v in found.items() if k != "kv_cache"}) | fresh_cache(found)


def fresh_cache(found: dict[str, Any]) -> dict[str, Any]:
    """The guess has filled its own with tensors of no values."""
    return {"kv_cache": type(found["kv_cache"])(len(found["kv_cache"].layer_caches))} if "kv_cache" in found else {}


@torch.no_grad()
def output(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    leaves = tree_leaves(model(**inputs | fresh_cache(inputs), return_dict=False))
    return torch.cat([leaf.flatten().double() for leaf in leaves])


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", TINY)
def test_from_quantizing_to_running(name: str, tmp_path: Path) -> None:
    """Activations in 4 bits lose more than weights alone; what is loaded draws the same bits."""
    model = built(name)
    plan = make_plan(model, CONFIG)
    assert plan.traced
    inputs = inputs_of(model)
    expected = output(model, inputs)
    assert expected.isfinite().all() and expected.std() > 0
    svdquant.quantize(model, CONFIG)
    layers = quantized_layers(model)
    assert layers.keys() == {n for n, layer in plan.layers.items() if layer.kind != "keep"} and len(layers) >= 7
    errors = {}
    for activations in ("none", "int8", "int4"):
        svdquant.set_activations(model, activations)
        errors[activations] = relative(output(model, inputs), expected)
    assert 0 < errors["none"] < errors["int4"] < 0.2 and errors["int8"] < 1.1 * errors["none"], errors
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    svdquant.set_activations(loaded, "int4")
    assert torch.equal(output(loaded, inputs), output(model, inputs))
