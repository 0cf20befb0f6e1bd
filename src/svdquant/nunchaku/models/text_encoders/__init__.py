"""The 4-bit T5."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..._lazy import lazy

if TYPE_CHECKING:
    from .t5_encoder import NunchakuT5EncoderModel

__all__ = ["NunchakuT5EncoderModel"]

__getattr__, __dir__ = lazy(__name__, {"NunchakuT5EncoderModel": "t5_encoder"}, ("t5_encoder",))
