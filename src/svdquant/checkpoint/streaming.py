"""Reading a 16-bit checkpoint tensor by tensor, and writing a sharded one without ever holding it whole."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import SVDQuantError
from ..ptq.stream import write_atomically
from .layout import Checkpoint

SHARD_BYTES = 512 << 20
INDEX_SUFFIX = ".safetensors.index.json"


class WeightReader:
    """Tensors of a `Checkpoint` by name, memory-mapped; nothing is kept."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype | None = None, fp32: tuple[str, ...] = ()) -> None:
        """dtype: floating tensors are cast to it, but for those whose path has a part named in `fp32`."""
        self.checkpoint, self.dtype, self.fp32 = checkpoint, dtype, fp32
        self._file_of: dict[str, Path] = {}
        for file in checkpoint.files:
            with safe_open(file, "pt") as handle:
                self._file_of |= dict.fromkeys(handle.keys(), file)

    @property
    def names(self) -> list[str]:
        return list(self._file_of)

    def get(self, name: str) -> Tensor:
        """Raises `SVDQuantError` where the checkpoint has no such tensor."""
        if name not in self._file_of:
            raise SVDQuantError(f"{self.checkpoint.path}: tensor {name} is missing; download the model again")
        with safe_open(self._file_of[name], "pt") as handle:
            value = handle.get_tensor(name)
        # A copy in any case: a mapped tensor keeps the file open, and its alignment is whatever the file has.
        if self.dtype is not None and value.is_floating_point() and not any(p in name.split(".") for p in self.fp32):
            return value.to(self.dtype, copy=True)
        return value.clone()

    def fingerprint(self) -> str:
        """Changes with the files' names, sizes, times and tensor layout."""
        digest = hashlib.sha256()
        for file in self.checkpoint.files:
            stat = file.stat()
            digest.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}".encode())
        digest.update(json.dumps(sorted(self._file_of)).encode())
        return digest.hexdigest()[:16]


class ShardWriter:
    """Writes tensors into shards of bounded size; `finish` names them as diffusers and transformers expect."""

    def __init__(self, folder: Path, stem: str = "diffusion_pytorch_model", shard_bytes: int = SHARD_BYTES) -> None:
        self.folder, self.stem, self.shard_bytes = folder, stem, shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self.total = 0

    def add(self, name: str, value: Tensor) -> None:
        size = value.numel() * value.element_size()
        if self._pending and self._pending_bytes + size > self.shard_bytes:
            self._flush()
        self._pending[name] = value.contiguous()
        self._pending_bytes += size
        self.total += size

    def finish(self) -> None:
        self._flush()
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards):
            final = (
                f"{self.stem}-{number + 1:05d}-of-{count:05d}.safetensors" if count > 1 else f"{self.stem}.safetensors"
            )
            self._part(number).replace(self.folder / final)
            weight_map |= dict.fromkeys(names, final)
        if count > 1:
            index: dict[str, Any] = {"metadata": {"total_size": self.total}, "weight_map": weight_map}
            text = json.dumps(index, indent=2, sort_keys=True)
            write_atomically(self.folder / f"{self.stem}{INDEX_SUFFIX}", lambda path: _write_text(path, text))

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number:05d}.safetensors"

    def _flush(self) -> None:
        if not self._pending:
            return
        tensors = self._pending
        write_atomically(self._part(len(self._shards)), lambda path: save_file(tensors, path, {"format": "pt"}))
        self._shards.append(list(tensors))
        self._pending, self._pending_bytes = {}, 0


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
