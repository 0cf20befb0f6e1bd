"""Z-Image."""

from __future__ import annotations

from diffusers import ZImageTransformer2DModel

from .._base import stands_in
from .._offload import OffloadingModel


@stands_in
class NunchakuZImageTransformer2DModel(OffloadingModel, ZImageTransformer2DModel):
    """diffusers' Z-Image transformer with quantized layers; loaded to the CPU where no device is named."""

    _default_device = "cpu"
