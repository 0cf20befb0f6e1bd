"""The OpenMP runtime that torch runs on: the CPU library takes its threads from there, never from a second one."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

_KMPC = ("__kmpc_fork_call", "__kmpc_push_num_threads", "__kmpc_global_thread_num")


@dataclass(frozen=True)
class Runtime:
    """Entry points, 0 for those that are not used, in the order of `svdq_set_runtime`.

    name: "libgomp" or "libomp" (LLVM's and Intel's), "none" with a reason where no runtime was found.
    """

    pointers: tuple[int, int, int, int]
    name: str
    reason: str = ""


def find_runtime() -> Runtime:
    """The runtime that torch's own loops use; never raises."""
    if not torch.backends.openmp.is_available():
        return _none("this build of torch has no OpenMP")
    for handle in _handles():
        # On Linux compilers of both families call the first; LLVM's runtime offers both.
        entry, kmpc = _address(handle, "GOMP_parallel"), [_address(handle, name) for name in _KMPC]
        if entry and sys.platform == "linux":
            return Runtime((entry, 0, 0, 0), "libomp" if _from_llvm(entry) else "libgomp")
        if all(kmpc):
            return Runtime((0, kmpc[0], kmpc[1], kmpc[2]), "libomp")
    return _none("torch's OpenMP library was not found among the loaded ones")


def _none(reason: str) -> Runtime:
    return Runtime((0, 0, 0, 0), "none", reason)


def _handles() -> Iterator[ctypes.CDLL]:
    """Loaded libraries to look names up in, in the order in which torch's own calls found theirs."""
    folder = Path(torch.__file__).parent / "lib"
    if sys.platform == "win32":
        for name in ("libiomp5md.dll", "libomp140.x86_64.dll"):
            module = _loaded_module(name)
            if module:
                yield ctypes.CDLL(name, handle=module)
        return
    if sys.platform == "linux":
        # What was preloaded comes before torch's own dependencies.
        yield ctypes.CDLL(None)
    # A look-up in a library goes on in what it was linked to.
    file = folder / ("libtorch_cpu.dylib" if sys.platform == "darwin" else "libtorch_cpu.so")
    with contextlib.suppress(OSError):
        yield ctypes.CDLL(str(file), mode=os.RTLD_NOLOAD)


def _loaded_module(name: str) -> int | None:
    get = ctypes.windll.kernel32.GetModuleHandleW  # type: ignore[attr-defined]
    get.argtypes, get.restype = [ctypes.c_wchar_p], ctypes.c_void_p
    return get(name)


def _address(library: ctypes.CDLL, name: str) -> int:
    try:
        return ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0
    except AttributeError:
        return 0


class _Origin(ctypes.Structure):
    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def _from_llvm(address: int) -> bool:
    """Whether the library that holds an address is LLVM's or Intel's, by what else it exports."""
    origin, dladdr = _Origin(), getattr(ctypes.CDLL(None), "dladdr", None)
    if dladdr is None or not dladdr(ctypes.c_void_p(address), ctypes.byref(origin)) or not origin.file:
        return False
    with contextlib.suppress(OSError):
        return _address(ctypes.CDLL(os.fsdecode(origin.file), mode=os.RTLD_NOLOAD), _KMPC[0]) != 0
    return False
