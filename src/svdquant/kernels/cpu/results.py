"""Large results in memory that the process has had.

malloc maps what is larger than 32 MiB anew for every call and gives it back to the system afterwards; every page of it
is a fault on first use, which takes 10 % of a linear with an output of 100 MB. Here such memory is kept for the next
result of about its size: at most `KEPT` bytes, those freed last.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import weakref

import torch
from torch import Tensor

# glibc's largest M_MMAP_THRESHOLD: what is smaller comes from memory that malloc keeps.
LARGE = 32 << 20
KEPT = 256 << 20
# Not shared with the children of a fork. Windows has no such maps, and torch's memory is used.
_FLAGS = getattr(mmap, "MAP_PRIVATE", 0) | getattr(mmap, "MAP_ANONYMOUS", 0)

# Only list operations that are atomic, no lock: memory comes back wherever the collector happens to run.
_free: list[mmap.mmap] = []


def new_result(like: Tensor, rows: int, columns: int) -> Tensor:
    """[rows, columns] of `like`'s type, not initialized. A large one's storage cannot be resized."""
    size = rows * columns * like.element_size()
    if size < LARGE or not _FLAGS or like.device.type != "cpu" or type(like) is not Tensor:
        return like.new_empty(rows, columns)
    memory = _take(size) or _map(size)
    if memory is None:
        forget()
        return like.new_empty(rows, columns)  # says how much there was not
    # The tensor's storage holds the view, and with it the map, until the last tensor that shares it is gone.
    view = memoryview(memory)
    weakref.finalize(view, _give_back, memory).atexit = False
    return torch.frombuffer(view, dtype=like.dtype, count=rows * columns).view(rows, columns)


def forget() -> None:
    """Gives what is kept back to the system."""
    _free.clear()


def _map(size: int) -> mmap.mmap | None:
    try:
        return mmap.mmap(-1, math.ceil(size / mmap.PAGESIZE) * mmap.PAGESIZE, flags=_FLAGS)
    except OSError:
        return None


def _take(size: int) -> mmap.mmap | None:
    for memory in reversed(_free.copy()):
        if size <= len(memory) <= size + size // 4:
            with contextlib.suppress(ValueError):  # another thread has taken it
                _free.remove(memory)
                return memory
    return None


def _give_back(memory: mmap.mmap) -> None:
    if len(memory) > KEPT:
        return
    _free.append(memory)
    while sum(map(len, _free.copy())) > KEPT:
        with contextlib.suppress(IndexError):
            _free.pop(0)
