"""The UNet of SDXL."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..._lazy import lazy

if TYPE_CHECKING:
    from .unet_sdxl import NunchakuSDXLUNet2DConditionModel

__all__ = ["NunchakuSDXLUNet2DConditionModel"]

__getattr__, __dir__ = lazy(__name__, {"NunchakuSDXLUNet2DConditionModel": "unet_sdxl"}, ("unet_sdxl",))
