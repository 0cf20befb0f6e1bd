"""What the verbs print: tables and JSON on stdout, progress and remarks on stderr."""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from types import TracebackType
from typing import Any

import typer

from .failures import DEBUG

# Where stderr is no terminal, a line this often (seconds) says how far a long run is.
_LINE_EVERY = 30.0


def debugging() -> bool:
    return os.environ.get(DEBUG, "0") not in ("", "0")


def quiet_libraries() -> None:
    """Silences the libraries' remarks and loading bars; downloads keep their bars."""
    if debugging():
        return
    warnings.filterwarnings("ignore")
    import diffusers.utils.logging
    import huggingface_hub.utils
    import huggingface_hub.utils.logging
    import transformers.utils.logging

    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity_error()
    huggingface_hub.utils.enable_progress_bars()


def print_json(data: Any) -> None:
    typer.echo(json.dumps(data, indent=2, default=str))


def remark(text: str) -> None:
    """A line on stderr."""
    typer.echo(text, err=True)


def size(count: float) -> str:
    """Bytes in the largest unit that leaves a number of one or more."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def table(header: list[str], rows: list[list[str]], right: str = "") -> str:
    """Columns as wide as their widest cell. right: one character per column, ">" aligns it to the right."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    marks = right.ljust(len(header), "<")
    out = []
    for line in lines:
        cells = (f"{cell:{mark}{width}}" for cell, mark, width in zip(line, marks, widths, strict=True))
        out.append("  ".join(cells).rstrip())
    return "\n".join(out)


class Stages:
    """Progress of named stages with the time left: bars on a terminal, else now and then a line.

    Calling it matches `progress` of `quantize_pipeline`: (stage, done, total, what is being worked on). The stage
    "note" is a remark, shown at once.
    """

    def __init__(self, names: dict[str, str]) -> None:
        """names: stage → what to call it."""
        self.names = names
        self._tasks: dict[str, Any] = {}
        self._bars: Any = None
        self._spoke = time.monotonic()

    def __enter__(self) -> Stages:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}", style="dim"),
            )
            self._bars = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, stage: str, done: int, total: int, text: str) -> None:
        if stage == "note":
            (self._bars.console.print if self._bars is not None else remark)(text)
            return
        label = self.names.get(stage, stage)
        if self._bars is None:
            if time.monotonic() - self._spoke > _LINE_EVERY:
                self._spoke = time.monotonic()
                remark(f"{label}: {done} of {total} {text}".rstrip())
            return
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(label, total=total, text="")
        short = text if len(text) <= 48 else text[:47] + "…"
        self._bars.update(self._tasks[stage], completed=done, total=total, text=short)
