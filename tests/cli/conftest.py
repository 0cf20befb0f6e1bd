"""A tiny pipeline on disk, the same quantized, and a way to call the command without a new process."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from cli_tools import QUICK, SMALL, Result

from svdquant.cli.main import run


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    # `--debug` sets the variable; this restores it.
    monkeypatch.setenv("SVDQUANT_DEBUG", "0")

    def call(*arguments: object) -> Result:
        capfd.readouterr()
        code = run([str(argument) for argument in arguments])
        return Result(code, *capfd.readouterr())

    return call


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "tiny"
    tiny.flux_pipeline().to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def quantized(source: Path) -> Path:
    folder = source.with_name("tiny-w4")
    assert run(["quantize", str(source), "-o", str(folder), *QUICK, *SMALL, "--prompt", "a cat"]) == 0
    return folder


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    """A copy of a pipeline that may be damaged."""

    def copy(folder: Path) -> Path:
        return Path(shutil.copytree(folder, tmp_path / folder.name))

    return copy
