"""FLUX.1: schnell, dev, fill, depth, canny, Kontext, Krea."""

from __future__ import annotations

from diffusers import FluxTransformer2DModel

from .._adapters import AdapterMethods
from .._attention import FluxAttentionMethods
from .._base import stands_in
from .._offload import OffloadingModel


@stands_in
class NunchakuFluxTransformer2dModel(AdapterMethods, FluxAttentionMethods, OffloadingModel, FluxTransformer2DModel):
    """diffusers' FLUX transformer with quantized layers, and the methods that Nunchaku's had."""
