"""Files by Nunchaku's way of naming them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...checkpoint.hub import fetch
from ...errors import SVDQuantError


def adapter_file(path: Any) -> Path:
    """A local file, or one of the Hub ("owner/name/file.safetensors"). Raises `SVDQuantError` where it is neither."""
    local = fetch(path)
    if not local.exists():
        raise SVDQuantError(f"{path}: is neither a file nor one of the Hub (owner/name/file.safetensors)")
    return local
