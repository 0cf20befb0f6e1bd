"""The transformers, one module per family."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..._lazy import lazy

if TYPE_CHECKING:
    from .transformer_flux import NunchakuFluxTransformer2dModel
    from .transformer_flux_v2 import NunchakuFluxTransformer2DModelV2
    from .transformer_qwenimage import NunchakuQwenImageTransformer2DModel
    from .transformer_sana import NunchakuSanaTransformer2DModel
    from .transformer_zimage import NunchakuZImageTransformer2DModel

__all__ = [
    "NunchakuFluxTransformer2DModelV2",
    "NunchakuFluxTransformer2dModel",
    "NunchakuQwenImageTransformer2DModel",
    "NunchakuSanaTransformer2DModel",
    "NunchakuZImageTransformer2DModel",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "NunchakuFluxTransformer2DModelV2": "transformer_flux_v2",
        "NunchakuFluxTransformer2dModel": "transformer_flux",
        "NunchakuQwenImageTransformer2DModel": "transformer_qwenimage",
        "NunchakuSanaTransformer2DModel": "transformer_sana",
        "NunchakuZImageTransformer2DModel": "transformer_zimage",
    },
    ("transformer_flux", "transformer_flux_v2", "transformer_qwenimage", "transformer_sana", "transformer_zimage"),
)
