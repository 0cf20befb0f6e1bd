"""safetensors files tensor by tensor: memory-mapped in, streamed out; neither way holds a file in memory."""

from __future__ import annotations

import ctypes
import json
import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import SVDQuantError
from .header import TensorInfo

TORCH_TYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
NAMES = {dtype: name for name, dtype in TORCH_TYPES.items()}
_ENTRY_BYTES = 160
_RELEASE = getattr(mmap, "MADV_DONTNEED", None)
_CHUNK = 16 << 20
_TRIM_EVERY = 256 << 20


def _trim() -> Callable[[int], int] | None:
    """glibc's call that gives freed memory back to the system; None elsewhere."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None


def _release(mapped: mmap.mmap, start: int, stop: int) -> None:
    """Gives back the pages that lie wholly between two places of a file."""
    first, end = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, stop // mmap.PAGESIZE * mmap.PAGESIZE
    if _RELEASE is not None and end > first:
        mapped.madvise(_RELEASE, first, end - first)


class MappedTensors:
    """Tensors of safetensors files by name, whose headers have been read already. Use as a context manager."""

    def __init__(self, tensors: dict[str, TensorInfo]) -> None:
        self.tensors = tensors
        self._maps: dict[Path, mmap.mmap] = {}
        self._read, self._trim = 0, _trim()

    def __enter__(self) -> MappedTensors:
        return self

    def __exit__(self, *_args: object) -> None:
        for mapped in self._maps.values():
            mapped.close()
        self._maps.clear()
        if self._trim is not None:
            self._trim(0)

    def get(self, name: str, device: torch.device | str | None = None) -> Tensor:
        """A copy in memory of its own; the file's pages are given back at once."""
        info = self.tensors[name]
        dtype = TORCH_TYPES.get(info.dtype)
        if dtype is None or info.file is None:
            raise SVDQuantError(f"{info.file}: tensor {name} has the type {info.dtype}, which is not supported")
        if not info.nbytes:
            return torch.empty(info.shape, dtype=dtype, device=device)
        mapped = self._map(info.file)
        value = torch.empty(info.nbytes, dtype=torch.uint8)
        # A copy of bytes, whose alignment in the file does not matter; through memoryviews, which close with the map.
        memory, source = memoryview(value.numpy()), memoryview(mapped)
        for start in range(0, info.nbytes, _CHUNK):
            stop = min(start + _CHUNK, info.nbytes)
            memory[start:stop] = source[info.start + start : info.start + stop]
            _release(mapped, info.start + start, info.start + stop)
        self._read += info.nbytes
        if self._trim is not None and self._read > _TRIM_EVERY:
            # What is unpacked leaves holes of half its size on the heap, between what is kept.
            self._read = 0
            self._trim(0)
        tensor = value.view(dtype).view(info.shape)
        return tensor if device is None else tensor.to(device)

    def _map(self, file: Path) -> mmap.mmap:
        if file not in self._maps:
            try:
                with file.open("rb") as handle:
                    self._maps[file] = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
            except OSError as error:
                raise SVDQuantError(f"{file}: cannot be read ({error.strerror or error}); check it") from error
        return self._maps[file]


class StreamedFile:
    """A safetensors file that is written tensor by tensor; its header takes the room that was set aside for it."""

    def __init__(self, path: Path, names_bytes: int, count: int, metadata: dict[str, str]) -> None:
        self._entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
        room = len(self._text()) + names_bytes + count * _ENTRY_BYTES
        self._room = -(-room // 8) * 8
        self._file = path.open("wb")
        self._file.write(b"\0" * (8 + self._room))
        self._position = 0
        self._late: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor) -> None:
        """Appends a tensor. Tiny ones wait for the end, so that the others stay aligned."""
        value = value.detach()
        if value.nbytes % 8:
            self._late[name] = value.clone()
            return
        self._write(name, value)

    def _write(self, name: str, value: Tensor) -> None:
        start, self._position = self._position, self._position + value.nbytes
        self._entries[name] = {
            "dtype": NAMES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [start, self._position],
        }
        if value.nbytes:
            self._file.write(memoryview(value.cpu().contiguous().flatten().view(torch.uint8).numpy()))

    def _text(self) -> bytes:
        return json.dumps(self._entries, separators=(",", ":"), ensure_ascii=False).encode()

    def finish(self) -> None:
        for name in sorted(self._late, key=lambda name: -self._late[name].element_size()):
            self._write(name, self._late[name])
        text = self._text()
        assert len(text) <= self._room, "the header outgrew its room"
        self._file.seek(0)
        self._file.write(self._room.to_bytes(8, "little") + text.ljust(self._room))
        self._file.close()

    def close(self) -> None:
        self._file.close()


@contextmanager
def streamed_file(path: Path, names: list[str], metadata: dict[str, str]) -> Iterator[StreamedFile]:
    """A `StreamedFile` that is finished when the block ends well. names: at least those that will be added."""
    file = StreamedFile(path, sum(len(name.encode()) for name in names), len(names), metadata)
    try:
        yield file
        file.finish()
    finally:
        file.close()
