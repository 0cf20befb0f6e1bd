"""FLUX.1: dev, schnell, Fill, Depth, Canny, Kontext, Krea and fine-tunes; one class, `FluxTransformer2DModel`."""

from __future__ import annotations

from typing import Any

import torch

from .base import Family


def example_inputs(model: Any) -> dict[str, Any]:
    """Sixteen image and eight text tokens, batch 1."""
    config, parameter = model.config, next(model.parameters())
    make = {"device": parameter.device, "dtype": parameter.dtype}
    inputs = {
        "hidden_states": torch.zeros(1, 16, config.in_channels, **make),
        "encoder_hidden_states": torch.zeros(1, 8, config.joint_attention_dim, **make),
        "pooled_projections": torch.zeros(1, config.pooled_projection_dim, **make),
        "timestep": torch.ones(1, **make),
        "img_ids": torch.zeros(16, 3, device=parameter.device),
        "txt_ids": torch.zeros(8, 3, device=parameter.device),
    }
    if config.guidance_embeds:
        inputs["guidance"] = torch.ones(1, **make)
    return inputs


FAMILY = Family(
    name="flux",
    model_classes=("FluxTransformer2DModel",),
    blocks=("transformer_blocks", "single_transformer_blocks"),
    w4a16=("*.norm1.linear", "*.norm1_context.linear", "single_transformer_blocks.*.norm.linear"),
    example_inputs=example_inputs,
)
