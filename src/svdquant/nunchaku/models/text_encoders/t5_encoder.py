"""The T5 encoder with 4-bit weights."""

from __future__ import annotations

from transformers import T5EncoderModel

from .._base import NunchakuModel, stands_in


@stands_in
class NunchakuT5EncoderModel(NunchakuModel, T5EncoderModel):
    """transformers' T5 encoder with quantized layers."""
