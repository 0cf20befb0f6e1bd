"""Skipping blocks in steps that change little."""

from __future__ import annotations

from .._lazy import lazy

__getattr__, __dir__ = lazy(__name__, {}, ("diffusers_adapters",))
