"""Names, comparisons, sheets and tables."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from svdquant import SVDQuantError
from svdquant.cli.console import Stages, size, table
from svdquant.cli.pictures import IDENTICAL_DB, picture_paths, psnr, save_picture, slug
from svdquant.cli.sheet import contact_sheet
from svdquant.ptq.names import ranges


def picture(value: int, side: int = 8) -> Image.Image:
    return Image.new("RGB", (side, side), (value, value, value))


def test_psnr() -> None:
    assert psnr(picture(100), picture(110)) == pytest.approx(20 * np.log10(255 / 10))
    assert psnr(picture(3), picture(3)) == IDENTICAL_DB
    with pytest.raises(SVDQuantError, match="cannot be compared"):
        psnr(picture(3), picture(3, 4))


def test_names(tmp_path: Path) -> None:
    assert slug("A cat, on a — mat!") == "a-cat-on-a-mat"
    assert slug("?!") == "picture"
    assert picture_paths(Path("a.png"), ["x"], [0]) == [Path("a.png")]
    assert picture_paths(Path("a.jpg"), ["x", "y"], [4]) == [Path("a-1-4.jpg"), Path("a-2-4.jpg")]
    assert picture_paths(tmp_path, ["x", "x"], [1, 2]) == [
        tmp_path / name for name in ("1-x-1.png", "1-x-2.png", "2-x-1.png", "2-x-2.png")
    ]
    # A prompt that is called as a numbered one would be.
    found = picture_paths(tmp_path, ["2 x", "x", "x"], [0])
    assert found == [tmp_path / name for name in ("1-2-x-0.png", "2-x-0.png", "3-x-0.png")]


def test_saved_picture_replaces_the_old_one(tmp_path: Path) -> None:
    for value in (10, 20):
        save_picture(picture(value), tmp_path / "new" / "a.png")
    assert [f.name for f in (tmp_path / "new").iterdir()] == ["a.png"]
    assert Image.open(tmp_path / "new" / "a.png").getpixel((0, 0)) == (20, 20, 20)


def test_sheet_holds_every_picture_enlarged() -> None:
    colours = [[(200, 0, 0), (0, 200, 0)], [(0, 0, 200), (200, 200, 0)]]
    cells = [[(Image.new("RGB", (64, 64), colour), "20.0 dB") for colour in row] for row in colours]
    sheet = np.asarray(contact_sheet(["one", "a long caption " * 20], ["16 bit", "W4A4"], cells))
    for row in colours:
        for colour in row:
            assert (sheet == colour).all(-1).sum() >= 192 * 192


def test_table_and_sizes() -> None:
    assert table(["a", "b"], [["long", "1"], ["x", "22"]], "<>") == "a      b\nlong   1\nx     22"
    assert [size(n) for n in (512, 2048, 3 * 2**20, 5 * 2**30, 3 * 2**40)] == [
        "512 B", "2.0 KiB", "3.0 MiB", "5.00 GiB", "3072.00 GiB"
    ]  # fmt: skip
    assert ranges([0, 1, 2, 5]) == "0-2,5"


def test_progress_without_a_terminal_is_silent_at_first(capsys: pytest.CaptureFixture[str]) -> None:
    with Stages({}) as progress:
        progress("solve", 1, 2, "layer")
        progress._spoke -= 60
        progress("solve", 2, 2, "layer")
        progress("note", 0, 0, "half of it stays on disk")
    assert capsys.readouterr().err == "solve: 2 of 2 layer\nhalf of it stays on disk\n"


def test_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with Stages({"solve": "solving"}) as progress:
        progress("solve", 1, 2, "transformer_blocks.0")
        progress("note", 0, 0, "half of it stays on disk")
        progress._bars.refresh()
    assert "half of it stays on disk\n" in terminal.getvalue()
    assert "solving" in terminal.getvalue() and "1/2" in terminal.getvalue()
