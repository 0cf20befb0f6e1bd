"""Exceptions that are nobody's input: one sentence too, with the traceback on demand."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_tools import SMALL

from svdquant import SVDQuantError
from svdquant.cli.failures import doing, explain


def raised(error: BaseException, what: str = "", resumable: bool = False) -> BaseException:
    try:
        with doing(what, resumable):
            raise error
    except BaseException as caught:
        return caught


@pytest.mark.parametrize(
    ("error", "sentence", "code"),
    [
        (SVDQuantError("a: is\nwrong"), "a: is wrong", 2),
        (KeyboardInterrupt(), "interrupted while drawing", 130),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x.png"), "x.png: the disk is full; free some space", 2),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "drawing: the disk is full", 2),
        (PermissionError(errno.EACCES, "Permission denied", "x"), "x: permission denied; choose another folder", 2),
        (MemoryError(), "not enough memory while drawing", 2),
        (KeyError("x"), "drawing failed (KeyError: 'x'); add --debug for the traceback", 1),
        (RuntimeError(), "drawing failed (RuntimeError)", 1),
        (RuntimeError("first\nsecond"), "drawing failed (RuntimeError: first)", 1),
    ],
)
def test_sentences(error: BaseException, sentence: str, code: int) -> None:
    explained, number = explain(raised(error, "drawing"))
    assert explained.startswith(sentence) and number == code


def test_interrupted_run_says_that_it_resumes() -> None:
    assert "same command" in explain(raised(KeyboardInterrupt(), "quantizing x", resumable=True))[0]


def test_innermost_activity_is_named() -> None:
    assert explain(raised(raised(RuntimeError("r"), "inner"), "outer"))[0].startswith("inner failed")


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: object, **_kwargs: object) -> None:
        raise ZeroDivisionError("as it happens")

    monkeypatch.setattr("svdquant.integrations.pipeline.draw", fail)


def test_a_library_that_fails(command: Callable, source: Path, tmp_path: Path, broken: None) -> None:
    done = command("generate", source, "a cat", "-o", tmp_path / "cat.png", *SMALL)
    sentence = f"svdquant: drawing with {source} failed (ZeroDivisionError: as it happens)"
    assert done.code == 1 and done.err.startswith(sentence) and len(done.err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("first", [True, False])
def test_debug_shows_the_traceback(command: Callable, source: Path, tmp_path: Path, broken: None, first: bool) -> None:
    arguments = ["generate", source, "a cat", "-o", tmp_path / "cat.png", *SMALL]
    done = command(*(["--debug", *arguments] if first else [*arguments, "--debug"]))
    assert done.code == 1 and "Traceback" in done.err and "ZeroDivisionError" in done.err


def test_interrupt(command: Callable, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_args: object, **_kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("svdquant.integrations.calibration.draw_to_calibrate", interrupt)
    done = command("quantize", source, "-o", tmp_path / "out", "--rank", 16, "--prompt", "a cat")
    assert done.code == 130 and len(done.err.splitlines()) == 1 and "the same command goes on" in done.err
    assert not (tmp_path / "out").exists()
