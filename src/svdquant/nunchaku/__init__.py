"""The names that users of Nunchaku import, at the same sub-paths: `from svdquant.nunchaku import …`.

`install()` makes `import nunchaku` mean this package, for scripts that are to run unchanged. Nothing heavy is imported
before a name is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._install import install, uninstall
from ._lazy import lazy

if TYPE_CHECKING:
    from .models import (
        NunchakuFluxTransformer2dModel,
        NunchakuFluxTransformer2DModelV2,
        NunchakuQwenImageTransformer2DModel,
        NunchakuSanaTransformer2DModel,
        NunchakuSDXLUNet2DConditionModel,
        NunchakuT5EncoderModel,
        NunchakuZImageTransformer2DModel,
    )

__all__ = [
    "NunchakuFluxTransformer2DModelV2",
    "NunchakuFluxTransformer2dModel",
    "NunchakuQwenImageTransformer2DModel",
    "NunchakuSDXLUNet2DConditionModel",
    "NunchakuSanaTransformer2DModel",
    "NunchakuT5EncoderModel",
    "NunchakuZImageTransformer2DModel",
    "install",
    "uninstall",
]

__getattr__, __dir__ = lazy(
    __name__,
    {name: "models" for name in __all__ if name.startswith("Nunchaku")},
    ("caching", "lora", "models", "pipeline", "pipelines", "utils"),
)
