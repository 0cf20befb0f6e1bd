"""A single 16-bit .safetensors as a pipeline folder, from which quantizing goes on as from any other."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.layout import open_checkpoint
from ..errors import SVDQuantError
from ..ptq.stream import write_atomically
from .pipeline import check_files, denoisers, load_single_file, resolve_model
from .work_folder import check_disk, copy_entries, other_components, size_of, storing, write_text


def check_single_file(file: Path, base: str | None) -> None:
    """Raises `SVDQuantError` where the file is quantized already, or has no usable pipeline to belong to."""
    checkpoint = open_checkpoint(file)
    if checkpoint.quantization is not None:
        raise SVDQuantError(f"{file}: is quantized already; start from the 16-bit model")
    if base is None:
        raise SVDQuantError(f"{file}: a single file lacks its configuration; name its pipeline with --base")
    pipeline = resolve_model(base)
    denoisers(pipeline)
    check_files(pipeline)


def origin_of(file: Path, base: str, dtype: torch.dtype | None) -> dict[str, Any]:
    """What a single file is unpacked from."""
    stat = file.stat()
    return {
        "file": str(file.resolve()),
        "size": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "base": str(resolve_model(base).resolve()),
        "dtype": str(dtype or torch.bfloat16),
    }


def unpack(file: Path, base: str, work: Path, dtype: torch.dtype | None, origin: dict[str, Any]) -> Path:
    """A single 16-bit .safetensors as a pipeline folder: its denoiser converted by diffusers, the rest of `base`."""
    folder, pipeline = work / "source", resolve_model(base)
    complete = folder / "complete"
    if complete.is_file() and complete.read_text(encoding="utf-8") == json.dumps(origin):
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    part, wanted = denoisers(pipeline)[0], dtype or torch.bfloat16
    rest = other_components(pipeline, {part})
    weights = sum(math.prod(t.shape) for t in open_checkpoint(file).tensors.values()) * wanted.itemsize
    check_disk(work, weights + sum(size_of(entry) for entry in rest))
    model: Any = load_single_file(file, pipeline, wanted)
    with storing(folder):
        model.save_pretrained(folder / part)
    copy_entries(rest, folder)
    write_atomically(complete, lambda path: write_text(path, json.dumps(origin)))
    return folder
