"""The model classes, each in the module where Nunchaku has it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import lazy

if TYPE_CHECKING:
    from .text_encoders.t5_encoder import NunchakuT5EncoderModel
    from .transformers import (
        NunchakuFluxTransformer2dModel,
        NunchakuFluxTransformer2DModelV2,
        NunchakuQwenImageTransformer2DModel,
        NunchakuSanaTransformer2DModel,
        NunchakuZImageTransformer2DModel,
    )
    from .unets.unet_sdxl import NunchakuSDXLUNet2DConditionModel

__all__ = [
    "NunchakuFluxTransformer2DModelV2",
    "NunchakuFluxTransformer2dModel",
    "NunchakuQwenImageTransformer2DModel",
    "NunchakuSDXLUNet2DConditionModel",
    "NunchakuSanaTransformer2DModel",
    "NunchakuT5EncoderModel",
    "NunchakuZImageTransformer2DModel",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "NunchakuFluxTransformer2DModelV2": "transformers",
        "NunchakuFluxTransformer2dModel": "transformers",
        "NunchakuQwenImageTransformer2DModel": "transformers",
        "NunchakuSDXLUNet2DConditionModel": "unets.unet_sdxl",
        "NunchakuSanaTransformer2DModel": "transformers",
        "NunchakuT5EncoderModel": "text_encoders.t5_encoder",
        "NunchakuZImageTransformer2DModel": "transformers",
    },
    ("text_encoders", "transformer_flux", "transformer_sana", "transformers", "unets"),
)
