"""Text encoders, classes of transformers: how to run a small forward, and what of them is no text encoder."""

from __future__ import annotations

from typing import Any

import torch

from .base import Family


def token_ids(model: Any) -> dict[str, Any]:
    """Eight tokens, batch 1."""
    return {"input_ids": torch.zeros(1, 8, dtype=torch.long, device=next(model.parameters()).device)}


def _with_positions(model: Any) -> dict[str, Any]:
    """With positions of its own, where a model would look for pictures among the tokens."""
    inputs = token_ids(model)
    return inputs | {"position_ids": torch.arange(8, device=inputs["input_ids"].device).view(1, 1, 8).expand(3, 1, 8)}


# A prompt never reaches them, so that calibration cannot, and in pipelines that edit they carry the picture.
_VISION = ("visual", "vision_tower", "vision_model", "multi_modal_projector")

ENCODERS = Family(
    "text encoder",
    ("T5EncoderModel", "UMT5EncoderModel", "CLIPTextModel", "CLIPTextModelWithProjection"),
    example_inputs=token_ids,
)
DECODERS = Family(
    "language model",
    (
        "Gemma2Model",
        "Gemma2ForCausalLM",
        "GlmModel",
        "LlamaModel",
        "LlamaForCausalLM",
        "Qwen3Model",
        "Qwen3ForCausalLM",
        "SmolLM3ForCausalLM",
    ),
    example_inputs=token_ids,
)
VISION_LANGUAGE = Family(
    "vision-language model",
    (
        "Gemma3ForConditionalGeneration",
        "LlavaForConditionalGeneration",
        "Mistral3ForConditionalGeneration",
        "Mistral3Model",
    ),
    keep=_VISION,
    example_inputs=token_ids,
)
QWEN_VL = Family(
    "vision-language model",
    (
        "Qwen2VLForConditionalGeneration",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLModel",
    ),
    keep=_VISION,
    example_inputs=_with_positions,
)
FAMILIES = (ENCODERS, DECODERS, VISION_LANGUAGE, QWEN_VL)
