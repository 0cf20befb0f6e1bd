"""4-bit diffusion models with SVDQuant: quantize, save, load, draw, on any device.

Importing this registers the quantization method "svdquant" with diffusers and transformers as soon as they are
imported; it imports neither of them, nor torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import _registration
from .config import LayerSpec, SVDQuantConfig
from .errors import SVDQuantError

if TYPE_CHECKING:
    from .checkpoint import load_model, save_model
    from .integrations import quantize
    from .integrations.pipeline import load_pipeline
    from .integrations.requests import adapters_per_request
    from .nn import SVDQuantLinear, W4A16Linear, set_activations
    from .recipe import read_recipe

__version__ = "0.1.0"

_LAZY = {
    "adapters_per_request": "integrations.requests",
    "quantize": "integrations",
    "read_recipe": "recipe",
    "load_model": "checkpoint",
    "load_pipeline": "integrations.pipeline",
    "save_model": "checkpoint",
    "set_activations": "nn",
    "SVDQuantLinear": "nn",
    "W4A16Linear": "nn",
}

__all__ = [
    "LayerSpec",
    "SVDQuantConfig",
    "SVDQuantError",
    "SVDQuantLinear",
    "W4A16Linear",
    "__version__",
    "adapters_per_request",
    "load_model",
    "load_pipeline",
    "quantize",
    "read_recipe",
    "save_model",
    "set_activations",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'svdquant' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


_registration.install()
