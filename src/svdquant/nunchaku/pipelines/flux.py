"""A FLUX pipeline in one call, as scripts of 2024 make it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ...checkpoint.hub import ACCESS, fetch
from ...checkpoint.layout import PICKLES, open_checkpoint
from ...errors import SVDQuantError
from ..models.text_encoders.t5_encoder import NunchakuT5EncoderModel
from ..models.transformers.transformer_flux import NunchakuFluxTransformer2dModel


def from_pretrained(
    pretrained_model_name_or_path: str | Path,
    *,
    torch_dtype: torch.dtype = torch.bfloat16,
    qmodel_path: str | Path | None = None,
    qencoder_path: str | Path | None = None,
    qmodel_device: str | torch.device | None = None,
    **kwargs: Any,
) -> Any:
    """A `FluxPipeline` with a quantized transformer.

    pretrained_model_name_or_path: the 16-bit pipeline (folder or Hub id): everything that the other two lack.
    qmodel_path: the quantized transformer: a file, a folder or a Hub path; None = the pipeline as it is.
    qencoder_path: a 4-bit T5 as .safetensors (the pickle of 2024 is refused).
    qmodel_device: of these two; None = the first accelerator, else the CPU.
    kwargs: go to `FluxPipeline.from_pretrained`.

    Raises `SVDQuantError` where one of them cannot be loaded.
    """
    from diffusers import FluxPipeline

    access = {key: kwargs[key] for key in ACCESS[:4] if key in kwargs and key != "revision"}
    if qencoder_path is not None:
        if str(qencoder_path).endswith(PICKLES):
            raise SVDQuantError(
                f"{qencoder_path}: is a pickle, which can run code when it is read; take the same encoder as "
                "awq-int4-flux.1-t5xxl.safetensors from nunchaku-tech/nunchaku-t5"
            )
        kwargs["text_encoder_2"] = NunchakuT5EncoderModel.from_pretrained(
            qencoder_path, torch_dtype=torch_dtype, device=qmodel_device, **access
        )
    if qmodel_path is not None:
        local = fetch(qmodel_path, **access)
        kwargs["transformer"] = NunchakuFluxTransformer2dModel.from_pretrained(
            local,
            torch_dtype=torch_dtype,
            device=qmodel_device,
            base=None if _is_complete(local) else str(pretrained_model_name_or_path),
            **access,
        )
    try:
        return FluxPipeline.from_pretrained(pretrained_model_name_or_path, torch_dtype=torch_dtype, **kwargs)
    except SVDQuantError:
        raise
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SVDQuantError(
            f"{pretrained_model_name_or_path}: is no pipeline that diffusers can load ({reason}); give the 16-bit FLUX"
        ) from error


def _is_complete(path: Path) -> bool:
    """Whether a checkpoint needs nothing from the base, whose 16-bit transformer is then not even downloaded."""
    if not path.exists():
        return True
    checkpoint = open_checkpoint(path)
    return bool(checkpoint.config) and not checkpoint.blocks_only
