"""First-block caching of SANA."""

from . import apply_cache_on_pipe, apply_cache_on_transformer

__all__ = ["apply_cache_on_pipe", "apply_cache_on_transformer"]
