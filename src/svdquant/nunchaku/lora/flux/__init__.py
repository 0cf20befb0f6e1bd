"""Adapters of FLUX."""

from __future__ import annotations

from ..._lazy import lazy

__getattr__, __dir__ = lazy(__name__, {"compose_lora": "compose"}, ("compose",))
