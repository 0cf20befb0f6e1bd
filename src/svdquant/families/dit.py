"""Transformers that need no fused forwards yet: only how to run one small forward, so that a plan can be traced."""

from __future__ import annotations

from typing import Any

import torch

from .base import Family


def _maker(model: Any) -> tuple[Any, dict[str, Any]]:
    parameter = next(model.parameters())
    return model.config, {"device": parameter.device, "dtype": parameter.dtype}


def _pixart_inputs(model: Any) -> dict[str, Any]:
    config, make = _maker(model)
    size = config.patch_size * 4
    added: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
    if model.use_additional_conditions:
        added = {"resolution": torch.ones(1, 2, **make), "aspect_ratio": torch.ones(1, 1, **make)}
    return {
        "hidden_states": torch.zeros(1, config.in_channels, size, size, **make),
        "encoder_hidden_states": torch.zeros(1, 8, config.caption_channels, **make),
        "timestep": torch.ones(1, **make),
        "added_cond_kwargs": added,
    }


def _sana_inputs(model: Any) -> dict[str, Any]:
    config, make = _maker(model)
    inputs = {
        "hidden_states": torch.zeros(1, config.in_channels, 4 * config.patch_size, 4 * config.patch_size, **make),
        "encoder_hidden_states": torch.zeros(1, 8, config.caption_channels, **make),
        "timestep": torch.ones(1, **make),
    }
    if config.guidance_embeds:
        inputs["guidance"] = torch.ones(1, **make)
    return inputs


def _sd3_inputs(model: Any) -> dict[str, Any]:
    config, make = _maker(model)
    size = config.patch_size * 4
    return {
        "hidden_states": torch.zeros(1, config.in_channels, size, size, **make),
        "encoder_hidden_states": torch.zeros(1, 8, config.joint_attention_dim, **make),
        "pooled_projections": torch.zeros(1, config.pooled_projection_dim, **make),
        "timestep": torch.ones(1, **make),
    }


def _ltx2_inputs(model: Any) -> dict[str, Any]:
    """One frame of 4×4 tokens and as many of sound."""
    config, make = _maker(model)
    text = config.caption_channels
    return {
        "hidden_states": torch.zeros(1, 16, config.in_channels, **make),
        "audio_hidden_states": torch.zeros(1, 16, config.audio_in_channels, **make),
        "encoder_hidden_states": torch.zeros(1, 8, text, **make),
        "audio_encoder_hidden_states": torch.zeros(1, 8, text, **make),
        "timestep": torch.ones(1, **make),
        "num_frames": 1,
        "height": 4,
        "width": 4,
        "audio_num_frames": 16,
    }


PIXART = Family(
    "pixart",
    ("PixArtTransformer2DModel",),
    ("transformer_blocks",),
    shared=("adaln_single.linear",),
    example_inputs=_pixart_inputs,
)
SANA = Family(
    "sana",
    ("SanaTransformer2DModel",),
    ("transformer_blocks",),
    shared=("time_embed.linear",),
    example_inputs=_sana_inputs,
)
LTX2 = Family(
    "ltx2",
    ("LTX2VideoTransformer3DModel",),
    ("transformer_blocks",),
    shared=("*time_embed.linear", "av_cross_attn_*.linear"),
    example_inputs=_ltx2_inputs,
)
SD3 = Family("sd3", ("SD3Transformer2DModel",), ("transformer_blocks",), example_inputs=_sd3_inputs)
