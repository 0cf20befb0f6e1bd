"""Where the SANA transformer was imported from at first."""

from .transformers.transformer_sana import NunchakuSanaTransformer2DModel

__all__ = ["NunchakuSanaTransformer2DModel"]
