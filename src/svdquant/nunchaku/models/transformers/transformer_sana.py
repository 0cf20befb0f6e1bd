"""SANA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import SanaTransformer2DModel

from .._base import stands_in
from .._offload import OffloadingModel


@stands_in
class NunchakuSanaTransformer2DModel(OffloadingModel, SanaTransformer2DModel):
    """diffusers' SANA transformer with quantized layers."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        pag_layers: int | list[int] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As of every class here. pag_layers: changes nothing, because the blocks are diffusers' own, which
        `SanaPAGPipeline` perturbs itself (`pag_applied_layers`)."""
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
