"""Qwen-Image and Qwen-Image-Edit."""

from __future__ import annotations

from diffusers import QwenImageTransformer2DModel

from .._base import stands_in
from .._offload import OffloadingModel


@stands_in
class NunchakuQwenImageTransformer2DModel(OffloadingModel, QwenImageTransformer2DModel):
    """diffusers' Qwen-Image transformer with quantized layers; loaded to the CPU where no device is named."""

    _default_device = "cpu"
