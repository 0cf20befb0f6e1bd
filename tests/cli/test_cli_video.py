"""Pipelines that make videos, and pipelines that draw from pictures, on the command line."""

from __future__ import annotations

import importlib.util
import json
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import family_pipelines
import numpy as np
import pytest
import standins
import torch
from cli_tools import QUICK
from diffusers.pipelines.wan import pipeline_wan_i2v
from PIL import Image

from svdquant import SVDQuantError
from svdquant.cli.clips import save_clip, still
from svdquant.cli.pictures import IDENTICAL_DB, picture_paths, psnr
from svdquant.integrations.conditions import made_up_pictures, picture_arguments, read_picture
from svdquant.integrations.drawing import Clip, PipelineOptions

VIDEO = ["--steps", "2", "--height", "32", "--width", "32", "--num-frames", "5", "--max-sequence-length", "16"]
PICTURE = ["--steps", "2", "--height", "16", "--width", "16", "--max-sequence-length", "16"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's pipeline in bfloat16."""
    root = tmp_path_factory.mktemp("families")

    def saved(name: str) -> Path:
        if not (root / name).is_dir():
            family_pipelines.PIPELINES[name]().to(torch.bfloat16).save_pretrained(root / name)
        return root / name

    return saved


def clip(*values: int, side: int = 8, fps: float = 8.0) -> Clip:
    return Clip([Image.new("RGB", (side, side), (value,) * 3) for value in values], fps)


def read_frames(path: Path) -> tuple[list[np.ndarray], list[int]]:
    """The frames of an animation, and the milliseconds of each."""
    with Image.open(path) as animation:
        frames, durations = [], []
        for number in range(animation.n_frames):
            animation.seek(number)
            frames.append(np.asarray(animation.convert("RGB"), dtype=float))
            durations.append(animation.info["duration"])
    return frames, durations


@pytest.mark.parametrize("suffix", [".webp", ".gif"])
def test_saved_clip(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "new" / f"clip{suffix}"
    for values in ((1, 2), (10, 130, 250)):
        assert save_clip(clip(*values), path) is None
    frames, durations = read_frames(path)
    assert [round(float(frame.mean()), -1) for frame in frames] == [10, 130, 250]
    # GIF counts in hundredths of a second.
    assert durations == [125 if suffix == ".webp" else 120] * 3
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_saved_sound(tmp_path: Path) -> None:
    samples = torch.tensor([[0.0, 0.5, -1.0, 2.0], [0.25, 0.0, 0.0, -2.0]])
    sound = save_clip(Clip(clip(1, 2).frames, 8.0, samples, 16000), tmp_path / "clip.webp")
    assert sound == tmp_path / "clip.wav"
    with wave.open(str(sound)) as file:
        assert (file.getnchannels(), file.getframerate(), file.getsampwidth()) == (2, 16000, 2)
        levels = np.frombuffer(file.readframes(4), "<i2").reshape(4, 2).T / 32767
    np.testing.assert_allclose(levels, samples.clamp(-1, 1), atol=1e-4)


def test_mp4_is_written_by_diffusers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def export(frames: list[Image.Image], path: str, fps: float) -> None:
        calls.append((len(frames), fps))
        Path(path).write_bytes(b"video")

    monkeypatch.setattr("diffusers.utils.export_to_video", export)
    save_clip(clip(1, 2, 3), tmp_path / "clip.mp4")
    assert calls == [(3, 8.0)] and (tmp_path / "clip.mp4").read_bytes() == b"video"
    with pytest.raises(SVDQuantError, match=r"name a \.mp4, \.webp or \.gif file"):
        save_clip(clip(1), tmp_path / "clip.png")


def test_compared_clips() -> None:
    assert psnr(clip(3, 4), clip(3, 4)) == IDENTICAL_DB
    # The mean of the squares, not of the ratios.
    assert psnr(clip(100, 100), clip(100, 120)) == pytest.approx(10 * np.log10(255**2 / 200))
    with pytest.raises(SVDQuantError, match="2 and 3 frames"):
        psnr(clip(1, 2), clip(1, 2, 3))
    strip = np.asarray(still(clip(10, 20, 30, 40)))
    assert strip.shape == (8, 24, 3) and strip[0, ::8, 0].tolist() == [10, 30, 40]


def test_names_of_videos(tmp_path: Path) -> None:
    assert picture_paths(Path("a.gif"), ["x"], [0], clips=True) == [Path("a.gif")]
    assert picture_paths(tmp_path, ["x"], [0], clips=True) == [tmp_path / "x-0.webp"]
    assert picture_paths(Path("a.webp"), ["x", "y"], [4]) == [Path("a-1-4.webp"), Path("a-2-4.webp")]
    for name, clips, made in (("a.png", True, "makes videos"), ("a.mp4", False, "makes pictures")):
        with pytest.raises(SVDQuantError, match=made):
            picture_paths(Path(name), ["x"], [0], clips=clips)


def test_generate_videos_with_sound(command: Callable, folder: Callable[[str], Path], tmp_path: Path) -> None:
    done = command("generate", folder("ltx2"), "a cat", "-o", tmp_path / "clip.webp", *VIDEO, "--fps", 10)
    assert done.code == 0, done.err
    assert [line.split()[0] for line in done.out.splitlines()] == [str(tmp_path / f"clip.{e}") for e in ("webp", "wav")]
    frames, durations = read_frames(tmp_path / "clip.webp")
    assert frames[0].shape == (32, 32, 3) and len(frames) == 5 and durations == [100] * 5
    with wave.open(str(tmp_path / "clip.wav")) as file:
        assert file.getnchannels() == 2 and file.getnframes() > 0


def test_quantize_and_compare_videos(command: Callable, folder: Callable[[str], Path], tmp_path: Path) -> None:
    done = command("quantize", folder("ltx"), "-o", tmp_path / "w4", *QUICK, *VIDEO, "--prompt", "a cat")
    assert done.code == 0, done.err
    out = tmp_path / "out"
    done = command(
        "generate", tmp_path / "w4", "a cat", "rain", "-o", out, *VIDEO, "--compare", folder("ltx"), "--json"
    )
    assert done.code == 0, done.err
    drawn = json.loads(done.out)
    assert drawn["sheet"] == str(out / "compare.png")
    assert sorted(file.name for file in out.iterdir()) == ["a-cat-0.webp", "compare.png", "rain-0.webp"]
    for entry in drawn["pictures"]:
        assert entry["frames"] == 5 and entry["fps"] == 25 and entry["sound"] is None
        assert 20 < entry["psnr"] < IDENTICAL_DB


def test_one_frame_is_a_picture(command: Callable, folder: Callable[[str], Path], tmp_path: Path) -> None:
    arguments = [*PICTURE, "--num-frames", 1, "-o", tmp_path / "one.png"]
    done = command("generate", folder("wan"), "a cat", *arguments)
    assert done.code == 0, done.err
    assert Image.open(tmp_path / "one.png").size == (16, 16)


def test_refused_before_anything_is_loaded(
    command: Callable, folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("svdquant.integrations.pipeline.load_pipeline", None)
    find = importlib.util.find_spec
    missing = ("cv2", "imageio", "imageio_ffmpeg")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in missing else find(name, *a))
    (tmp_path / "notes.txt").write_text("mine")
    standins.picture().save(tmp_path / "picture.png")
    for family, arguments, sentence in (
        ("ltx", ["-o", "clip.mp4"], "pip install imageio imageio-ffmpeg"),
        ("ltx", ["-o", "clip.png"], "this model makes videos"),
        ("ltx", ["-o", tmp_path / "notes.txt"], "is a file and no picture"),
        ("flux_dev", ["-o", "clip.gif"], "this model makes pictures"),
        ("flux_dev", ["--num-frames", 5], "takes no num_frames"),
        ("flux_dev", ["--fps", 5], "makes no videos"),
        ("ltx", ["--fps", "inf"], "--fps inf is no number to draw with"),
        ("flux_dev", ["--guidance-scale", "inf"], "--guidance-scale inf is no number to draw with"),
        ("flux_dev", ["--seed", 10**19], "does not fit 64 bits"),
        ("flux_dev", ["--image", tmp_path / "picture.png"], "takes no image"),
        ("flux_fill", ["--image", tmp_path / "notes.txt"], "cannot be read (no picture that Pillow can read)"),
        ("flux_dev", ["--image", tmp_path / "none.png"], "does not exist"),
        ("flux_fill", [], "draws from a picture (image); name a file by --image"),
        ("flux_control", [], "draws from a picture (control_image); name a file by --image"),
        ("wan_i2v", [], "draws from a picture (image); name a file by --image"),
    ):
        assert sentence in command("generate", folder(family), "a cat", *arguments).refusal()


def test_pipelines_that_draw_from_pictures(command: Callable, folder: Callable[[str], Path], tmp_path: Path) -> None:
    """Calibrated with made-up pictures, which the user is told; drawn with given ones."""
    done = command("quantize", folder("flux_fill"), "-o", tmp_path / "w4", *QUICK, *PICTURE, "--prompt", "a cat")
    assert done.code == 0, done.err
    assert "FluxFillPipeline draws from pictures: calibrating with made-up ones" in done.err
    picture, mask = tmp_path / "picture.png", tmp_path / "mask.png"
    standins.picture(side=16).save(picture)
    standins.mask(side=16).save(mask)
    given = ["--image", picture, "--mask-image", mask]
    done = command("generate", tmp_path / "w4", "a cat", "-o", tmp_path / "out.png", *PICTURE, *given)
    assert done.code == 0, done.err
    pixels = np.asarray(Image.open(tmp_path / "out.png"))
    assert pixels.shape == (16, 16, 3) and pixels.std() > 0
    (tmp_path / "broken.png").write_bytes(b"no picture")
    given[1] = tmp_path / "broken.png"
    assert "cannot be read" in command("generate", tmp_path / "w4", "a cat", *PICTURE, *given).refusal()


def test_a_missing_package_is_named(
    command: Callable, folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(vars(pipeline_wan_i2v), "ftfy")
    standins.picture().save(tmp_path / "picture.png")
    arguments = [*PICTURE, "--num-frames", 5, "--image", tmp_path / "picture.png"]
    assert "needs ftfy; `pip install ftfy`" in command("generate", folder("wan_i2v"), "a cat", *arguments).refusal()


def test_made_up_pictures() -> None:
    from diffusers import FluxFillPipeline, FluxKontextPipeline, FluxPipeline, WanImageToVideoPipeline

    assert picture_arguments(FluxPipeline) == []
    assert picture_arguments(FluxFillPipeline) == ["image", "mask_image"]
    assert picture_arguments(WanImageToVideoPipeline) == picture_arguments(FluxKontextPipeline) == ["image"]
    pictures = made_up_pictures(FluxFillPipeline, 3, 40, 24)
    assert pictures["image"].size == pictures["mask_image"].size == (40, 24)
    assert 0 < np.asarray(pictures["mask_image"]).mean() < 255
    pixels = np.asarray(pictures["image"], dtype=float)
    # Neighbours are alike, as in photographs: twice the variance is what independent ones would differ by.
    assert (np.diff(pixels, axis=1) ** 2).mean() < pixels.var()
    assert (np.asarray(made_up_pictures(FluxFillPipeline, 3, 40, 24)["image"]) == pixels).all()
    assert (np.asarray(made_up_pictures(FluxFillPipeline, 4, 40, 24)["image"]) != pixels).any()


def test_pictures_as_cameras_store_them(tmp_path: Path) -> None:
    """Lying on their side, with a note of that."""
    lying = Image.new("RGB", (8, 4))
    exif = Image.Exif()
    exif[274] = 6
    lying.save(tmp_path / "a.jpg", exif=exif)
    assert read_picture(tmp_path / "a.jpg").size == (4, 8)


def test_what_else_a_call_needs_is_named() -> None:
    class Unusual:
        def __call__(self, labels: list[int], prompt: str = "") -> None: ...

    with pytest.raises(SVDQuantError, match="cannot draw without labels"):
        PipelineOptions().arguments(Unusual())
