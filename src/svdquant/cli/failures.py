"""Every exception as one sentence and an exit code."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from ..errors import SVDQuantError

DEBUG = "SVDQUANT_DEBUG"
BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130
# Typer carries its own copy of click, or uses the installed one, depending on its version.
_UsageError = next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "UsageError")
_ClickException = next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException")


class Interrupted(Exception):
    """A `KeyboardInterrupt` that knows what it interrupted; Typer would swallow the plain one."""

    def __init__(self, what: str, resumable: bool) -> None:
        again = "; the same command goes on from there" if resumable else ""
        super().__init__(f"interrupted while {what}{again}")


@contextmanager
def doing(what: str, resumable: bool = False) -> Iterator[None]:
    """Remembers what was being done ("loading X") when an exception leaves the block; the innermost wins.

    resumable: repeating the command goes on where it stopped.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted(what, resumable) from error
    except Exception as error:
        if not hasattr(error, "_svdquant_doing"):
            error._svdquant_doing = what  # type: ignore[attr-defined]
        raise


def explain(error: BaseException) -> tuple[str, int]:
    """(sentence without a line break, exit code) of an exception; the sentence is empty where nothing went wrong."""
    sentence, code = _explain(error)
    return " ".join(sentence.split()), code


def _explain(error: BaseException) -> tuple[str, int]:
    what = getattr(error, "_svdquant_doing", "")
    if isinstance(error, SVDQuantError):
        return str(error), BAD_INPUT
    if isinstance(error, SystemExit):
        return "", error.code if isinstance(error.code, int) else FAILED
    if isinstance(error, typer.Exit):
        return "", error.exit_code
    if isinstance(error, Interrupted):
        return str(error), INTERRUPTED
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        return "interrupted", INTERRUPTED
    if isinstance(error, _ClickException):
        return _usage(error), BAD_INPUT
    if isinstance(error, BrokenPipeError):
        return "", FAILED
    if is_disk_full(error):
        return f"{_file_of(error, what)}: the disk is full; free some space and run the same command again", BAD_INPUT
    if isinstance(error, OSError) and error.strerror:
        return f"{_file_of(error, what)}: {error.strerror[:1].lower()}{error.strerror[1:]}; {_remedy(error)}", BAD_INPUT
    if is_out_of_memory(error):
        return (
            f"not enough memory while {what or 'working'}; use fewer or smaller pictures, another --device, or for "
            "quantize --max-memory",
            BAD_INPUT,
        )
    lines = str(error).strip().splitlines()
    detail = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return f"{what or 'the command'} failed ({detail}); add --debug for the traceback", FAILED


def _usage(error: BaseException) -> str:
    message: str = error.format_message()  # type: ignore[attr-defined]
    context = getattr(error, "ctx", None)
    if isinstance(error, _UsageError) and message:
        return f"{message.strip().rstrip('.')}; see `{context.command_path if context else 'svdquant'} --help`"
    return message  # empty where the help was shown instead


def is_disk_full(error: BaseException) -> bool:
    """Also of safetensors, which wraps the system's error in a type of its own."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return "No space left on device" in str(error)


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _file_of(error: BaseException, what: str) -> str:
    name = getattr(error, "filename", None)
    return str(name) if name else what or "the output"


def _remedy(error: OSError) -> str:
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "choose another folder or change its permissions"
    return "check the path"
