"""SDXL and SDXL-Turbo."""

from __future__ import annotations

from diffusers import UNet2DConditionModel

from .._base import stands_in
from .._offload import OffloadingModel


@stands_in
class NunchakuSDXLUNet2DConditionModel(OffloadingModel, UNet2DConditionModel):
    """diffusers' UNet with quantized layers; loaded to the CPU where no device is named."""

    _default_device = "cpu"
