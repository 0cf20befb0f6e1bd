"""The form of 2024: a whole pipeline from a base and a quantized model."""

from __future__ import annotations

from .._lazy import lazy

__getattr__, __dir__ = lazy(__name__, {}, ("flux",))
