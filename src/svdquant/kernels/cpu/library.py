"""The compiled CPU library: where it lies, whether this machine can use it, and why not."""

from __future__ import annotations

import ctypes
import os
import struct
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from ...errors import SVDQuantError
from .structures import declare
from .threads import find_runtime

ABI_VERSION = 3
_FILE = "SVDQUANT_CPU_LIBRARY"
_ISA = "SVDQUANT_CPU_ISA"
_REPAIR = "`pip install --force-reinstall svdquant`, or compile it by `python -m svdquant.kernels.cpu.build`"
_NEEDS = "AVX2, FMA and F16C on x86, the dot-product instructions on ARM"


@dataclass(frozen=True)
class Status:
    """What `svdquant doctor` says of the CPU library.

    available: whether products use it. isa: the variant in use; variants: all that this processor can run, best
    first. path: of the library, "" where there is none. threads: "libgomp", "libomp", or "none" (one thread) with
    threads_reason. reason: why it is not available, one sentence, else "".
    """

    available: bool
    isa: str = ""
    path: str = ""
    threads: str = "none"
    reason: str = ""
    variants: tuple[str, ...] = ()
    threads_reason: str = ""


@dataclass(frozen=True)
class Library:
    """A library that this process has loaded and can use. isa: the variant that it runs."""

    cdll: ctypes.CDLL
    isa: str
    path: str


class _Refused(Exception):
    """Why the library cannot be used, and what to do where something can be done."""


class _Broken(_Refused):
    """The same of a library that should be there, and work."""


_lock = threading.Lock()
_found: tuple[Library | None, Status, SVDQuantError | None] | None = None


def load() -> Library | None:
    """The library, loaded once per process; None where it cannot be used (`status` says why).

    Raises `SVDQuantError` for one thing only: SVDQUANT_CPU_ISA names a variant that the library does not have or this
    processor does not run.
    """
    library, _, error = _find()
    if error is not None:
        raise error
    return library


def status() -> Status:
    """What was found; never raises."""
    return _find()[1]


def _find() -> tuple[Library | None, Status, SVDQuantError | None]:
    global _found
    if _found is None:
        with _lock:
            if _found is None:
                _found = _examine()
    return _found


def _examine() -> tuple[Library | None, Status, SVDQuantError | None]:
    path: Path | None = None
    try:
        path = _file()
        cdll = _open(path)
        variants = tuple(cdll.svdq_available().decode().split(","))
        wanted = os.environ.get(_ISA)
        if wanted and cdll.svdq_select(wanted.encode()) != 0:
            text = f"{_ISA}={wanted!r} is not one of {', '.join(variants)}, which this processor can run"
            return None, Status(False, path=str(path), reason=text, variants=variants), SVDQuantError(text)
    except _Refused as refusal:
        remedy = ""
        if isinstance(refusal, _Broken):
            remedy = f": name another one in {_FILE}, or unset it" if os.environ.get(_FILE) else f": {_REPAIR}"
        return None, Status(False, path=str(path or ""), reason=f"{refusal}{remedy}"), None
    runtime = find_runtime()
    cdll.svdq_set_runtime(*runtime.pointers)
    if runtime.name == "libgomp":
        # libgomp's threads do not exist in a forked child, and it would wait for them forever.
        os.register_at_fork(after_in_child=lambda: cdll.svdq_set_runtime(None, None, None, None))
    library = Library(cdll, cdll.svdq_isa().decode(), str(path))
    found = Status(True, library.isa, str(path), runtime.name, "", variants, runtime.reason)
    return library, found, None


def _file() -> Path:
    """Where the library should be. Raises `_Refused` where there is none."""
    named = os.environ.get(_FILE)
    if named == "0":
        raise _Refused(f"{_FILE}=0 turns it off")
    if named:
        if not os.path.isfile(named):
            raise _Broken(f"{_FILE}={named} is not a file")
        return Path(named).absolute()
    from . import build  # not above: `python -m svdquant.kernels.cpu.build` would find itself imported already

    target = build.host_target()
    if target is None:
        raise _Refused("there is no compiled library for this platform")
    path = build.LIBRARIES / target.library
    if not os.path.isfile(path):
        raise _Broken(f"this installation lacks the compiled library for {target.name}")
    return path


def _open(path: Path) -> ctypes.CDLL:
    """Opens and checks a library. Raises `_Refused`."""
    try:
        _check_complete(path)
        cdll = ctypes.CDLL(str(path))
    except OSError as error:
        raise _Broken(f"the library cannot be loaded ({error})") from error
    try:
        version, available, isa = cdll.svdq_abi_version, cdll.svdq_available, cdll.svdq_isa
        select, set_runtime = cdll.svdq_select, cdll.svdq_set_runtime
    except AttributeError as error:
        raise _Broken(f"{path.name} is not a library of svdquant ({error})") from error
    version.restype, version.argtypes = ctypes.c_int32, []
    if version() != ABI_VERSION:
        raise _Broken(f"{path.name} has interface {version()}, this version of svdquant needs {ABI_VERSION}")
    try:
        declare(cdll)
    except AttributeError as error:
        raise _Broken(f"{path.name} is not a whole library of svdquant ({error})") from error
    available.restype = isa.restype = ctypes.c_char_p
    select.restype, select.argtypes = ctypes.c_int32, [ctypes.c_char_p]
    set_runtime.restype, set_runtime.argtypes = None, [ctypes.c_void_p] * 4
    if not available():
        raise _Refused(f"this processor is too old: the library needs {_NEEDS}")
    return cdll


def _check_complete(path: Path) -> None:
    """Raises `OSError` for an ELF file that was cut off: Linux would load it, and kill the process at first use."""
    if sys.platform != "linux":
        return
    with path.open("rb") as file:
        header = file.read(64)
        if header[:4] != b"\x7fELF":
            raise OSError("it is not a shared library")
        try:
            table, size, count = struct.unpack_from("<32xQ14xHH", header)
            file.seek(table)
            segments = struct.unpack("<" + "8xQ16xQ16x" * count, file.read(size * count))
        except struct.error:
            raise OSError("the file is incomplete") from None
        ends = [start + length for start, length in zip(segments[::2], segments[1::2], strict=True)]
        if max(ends, default=0) > path.stat().st_size:
            raise OSError("the file is incomplete")
