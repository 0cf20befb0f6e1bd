"""Pipelines that needed a class of their own."""

from __future__ import annotations

from .._lazy import lazy

__getattr__, __dir__ = lazy(__name__, {}, ("pipeline_qwenimage",))
