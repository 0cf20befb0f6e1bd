"""Reads the header of a safetensors file: names, types and shapes, without touching a weight."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import SVDQuantError

MAX_HEADER_BYTES = 100_000_000
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """dtype: as safetensors writes it ("BF16", "U8", …); nbytes: its size; start: where in `file` it lies."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    start: int = field(default=0, compare=False)
    file: Path | None = field(default=None, compare=False)


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """(tensors by name, metadata) of a safetensors file.

    Raises `SVDQuantError` where the file cannot be read, is shorter than it says, or is no safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            raw = file.read(length) if length <= min(MAX_HEADER_BYTES, size - 8) else b""
    except OSError as error:
        raise SVDQuantError(f"{path}: cannot be read ({error.strerror or error}); check its permissions") from error
    if start == b"version ":
        raise SVDQuantError(f"{path}: is a git-lfs pointer, not the weights; run `git lfs pull` in that folder")
    if len(start) < 8 or not raw:
        raise SVDQuantError(f"{path}: is truncated or no safetensors file ({size} bytes); download it again")
    try:
        entries = json.loads(raw)
        if not isinstance(entries, dict):
            raise ValueError("no JSON object")
        metadata = entries.pop("__metadata__", None) or {}
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata are not strings")
        tensors, ends = _tensors(entries, path, 8 + length)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SVDQuantError(f"{path}: its safetensors header is damaged ({error}); download it again") from error
    expected = 8 + length + ends
    if size != expected:
        what = "is truncated" if size < expected else "has bytes after its last tensor"
        raise SVDQuantError(f"{path}: {what} ({size} bytes, its header says {expected}); download it again")
    return tensors, metadata


def _tensors(entries: dict[str, Any], file: Path, data: int) -> tuple[dict[str, TensorInfo], int]:
    """Checks each entry, and that the data lie one after another; returns where they end."""
    position, tensors = 0, {}
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if dtype not in BITS:
            raise ValueError(f"tensor {name} has the unknown type {dtype!r}")
        if not all(type(n) is int and n >= 0 for n in (*shape, start, stop)):
            raise ValueError(f"tensor {name} has a negative or fractional size")
        if start != position or (stop - start) * 8 != math.prod(shape) * BITS[dtype]:
            raise ValueError(f"tensor {name} does not lie where its shape says")
        tensors[name], position = TensorInfo(dtype, shape, stop - start, data + start, file), stop
    return {name: tensors[name] for name in entries}, position
