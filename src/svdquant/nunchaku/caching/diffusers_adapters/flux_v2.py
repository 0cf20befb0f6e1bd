"""First-block caching of FLUX, by the name of Nunchaku's second implementation."""

from . import apply_cache_on_pipe, apply_cache_on_transformer

__all__ = ["apply_cache_on_pipe", "apply_cache_on_transformer"]
