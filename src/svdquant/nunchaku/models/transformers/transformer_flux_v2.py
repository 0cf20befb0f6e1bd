"""FLUX.1 by the name of Nunchaku's second implementation; here both are the same model."""

from __future__ import annotations

from diffusers import FluxTransformer2DModel

from .._adapters import AdapterMethods
from .._attention import FluxAttentionMethods
from .._base import stands_in
from .._offload import OffloadingModel


@stands_in
class NunchakuFluxTransformer2DModelV2(AdapterMethods, FluxAttentionMethods, OffloadingModel, FluxTransformer2DModel):
    """As `NunchakuFluxTransformer2dModel`, but loaded to the CPU where no device is named."""

    _default_device = "cpu"
