"""Where the FLUX transformer was imported from in 2024."""

from .transformers.transformer_flux import NunchakuFluxTransformer2dModel

__all__ = ["NunchakuFluxTransformer2dModel"]
