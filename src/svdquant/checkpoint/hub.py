"""Quantized models on the Hugging Face Hub; diffusers does the downloading."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from ..errors import SVDQuantError
from .layout import PICKLES, parse_config

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def looks_like_hub_id(path: str | Path) -> bool:
    """Whether a path that does not exist could be "owner/name"."""
    name = str(path)
    if not _HUB_ID.fullmatch(name) or name.endswith((".safetensors", ".json", *PICKLES)):
        return False
    try:
        return not Path(path).exists()
    except OSError:
        return False


def load_from_hub(repo: str, dtype: torch.dtype | None, component: str | None, kwargs: dict[str, Any]) -> Any:
    """Loads a model by its Hub id, after its configuration has been read. dtype None = bfloat16.

    Raises `SVDQuantError` where the repository cannot be reached or holds no quantized model.
    """
    from diffusers import AutoModel

    subfolder = kwargs.pop("subfolder", component)
    options = ("revision", "token", "cache_dir", "local_files_only")
    access: dict[str, Any] = {key: kwargs[key] for key in options if key in kwargs}
    config, subfolder = _config(AutoModel, repo, subfolder, access)
    quantization = config.get("quantization_config")
    if quantization is None:
        raise SVDQuantError(f"{repo}: holds an unquantized model; quantize it first with svdquant.quantize")
    parse_config(quantization, repo)
    try:
        return AutoModel.from_pretrained(repo, subfolder=subfolder, torch_dtype=dtype or torch.bfloat16, **kwargs)
    except SVDQuantError:
        raise
    except (OSError, ValueError) as error:
        raise unreachable(repo, error) from error


def _config(cls: Any, repo: str, subfolder: str | None, access: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    first: Exception | None = None
    for folder in (subfolder,) if subfolder else (None, "transformer", "unet"):
        try:
            return dict(cls.load_config(repo, subfolder=folder, **access)), folder
        except (OSError, ValueError) as error:
            first = first or error
    assert first is not None
    raise unreachable(repo, first) from first


def unreachable(repo: str, error: Exception) -> SVDQuantError:
    reason = (str(error).splitlines() or [type(error).__name__])[0].partition(". ")[0]
    return SVDQuantError(
        f"{repo}: is no local path and could not be loaded from the Hub ({reason}); if it is gated or private, accept "
        f"its terms at https://huggingface.co/{repo} and run `hf auth login`; without network, run "
        f"`hf download {repo}` elsewhere and give the folder"
    )
