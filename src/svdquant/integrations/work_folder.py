"""The folder beside an output in which it is built: locked, claimed for one job, moved into place when finished."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from safetensors import SafetensorError

from ..errors import SVDQuantError

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two processes apart
    fcntl = None  # type: ignore[assignment]

_NOT_COPIED = (".*", "*.bin", "*.pt", "*.ckpt")


def write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()[:16]


@contextmanager
def storing(path: Path) -> Iterator[None]:
    """Turns errors of the disk into one sentence."""
    try:
        yield
    except (OSError, SafetensorError, shutil.Error) as error:
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or ["disk full?"])[0]
        raise SVDQuantError(
            f"{path}: could not be stored ({reason}); free disk space or fix the permissions, then run the same "
            "command again to go on"
        ) from error


def check_output(out: Path, source: Path, overwrite: bool) -> None:
    """Refuses an output that would replace something else than a model, or is what is read, or within it."""
    if not out.name:
        raise SVDQuantError(f"{out}: cannot be replaced; choose a folder in it")
    if (source / "model_index.json").is_file() and source.resolve() in out.resolve().parents:
        raise SVDQuantError(f"{out}: is inside {source}, which is read; choose a folder outside it")
    if not out.exists():
        return
    if not out.is_dir():
        raise SVDQuantError(f"{out}: is a file; choose a folder that does not exist yet")
    if not any(out.iterdir()):
        return
    if not overwrite:
        raise SVDQuantError(f"{out}: exists already; choose another folder or pass --overwrite")
    if out.resolve() in (source.resolve(), *source.resolve().parents):
        raise SVDQuantError(f"{out}: holds the model that is read ({source}); choose another folder")
    if not any((out / name).is_file() for name in ("model_index.json", "config.json", "svdquant_report.json")):
        raise SVDQuantError(f"{out}: is a folder without a model, so it is not replaced; empty it or choose another")


@contextmanager
def locked(work: Path, out: Path) -> Iterator[None]:
    """Holds `work` for this process. A folder in which no job was begun goes again at the end."""
    made = [folder for folder in (work, *work.parents) if not folder.exists()]
    if work.exists() and not is_work_folder(work):
        raise SVDQuantError(f"{work}: is not svdquant's, but in the way; move it or choose another output folder")
    try:
        lock = take_lock(work, out)
    except OSError as error:
        raise SVDQuantError(f"{work}: cannot be made ({error.strerror}); choose another output folder") from error
    try:
        yield
    finally:
        if not (work / "job.json").is_file():
            shutil.rmtree(work, ignore_errors=True)
            for folder in made[1:]:
                if folder.exists() and not any(folder.iterdir()):
                    folder.rmdir()
        lock.close()


def is_work_folder(work: Path) -> bool:
    return work.is_dir() and ((work / "lock").is_file() or (work / "job.json").is_file() or not any(work.iterdir()))


def take_lock(work: Path, out: Path) -> TextIO:
    """Opens `work`/lock for this process alone, until it is closed."""
    while True:
        work.mkdir(parents=True, exist_ok=True)
        lock = (work / "lock").open("a")
        if fcntl is None:
            lock.close()
            return lock
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                return lock  # a file system without locks
            lock.close()
            raise SVDQuantError(
                f"another svdquant is working on {out}; wait for it or choose another output"
            ) from error
        try:
            if os.path.samestat(os.fstat(lock.fileno()), (work / "lock").stat()):
                return lock
        except FileNotFoundError:
            pass
        lock.close()  # of a run that has just finished and removed it


def clear_folder(work: Path, keep: tuple[str, ...] = ()) -> None:
    for entry in work.iterdir():
        if entry.name in ("lock", *keep):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink()


def check_disk(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise SVDQuantError(
            f"{folder}: needs about {needed / 2**30:.1f} GiB of disk, {free / 2**30:.1f} GiB are free; free some or "
            "choose another output folder"
        )


def other_components(source: Path, skip: set[str]) -> list[Path]:
    """Everything of the pipeline but the denoisers: other models, tokenizers, scheduler, licence."""
    entries = [e for e in sorted(source.iterdir()) if not e.name.startswith(".") and e.name not in skip | {"README.md"}]
    return [
        e for e in entries if e.is_dir() or e.suffix in (".json", ".txt", ".md") or e.name.upper().startswith("LICENSE")
    ]


def size_of(path: Path) -> int:
    """Of a file, or of those in a folder that are copied."""
    files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
    return sum(f.stat().st_size for f in files if not any(f.match(pattern) for pattern in _NOT_COPIED))


def copy_entries(entries: list[Path], target: Path) -> None:
    for entry in entries:
        with storing(target / entry.name):
            if entry.is_dir():
                shutil.copytree(entry, target / entry.name, ignore=shutil.ignore_patterns(*_NOT_COPIED))
            else:
                shutil.copy2(entry, target / entry.name)


def publish(result: Path, out: Path, work: Path) -> None:
    """Moves the finished folder to its place; what stood there goes only then."""
    replaced = work / "replaced"
    shutil.rmtree(replaced, ignore_errors=True)
    if out.exists():
        os.replace(out, replaced)
    try:
        os.replace(result, out)
    except OSError:
        if replaced.exists():
            os.replace(replaced, out)
        raise
    shutil.rmtree(work, ignore_errors=True)
