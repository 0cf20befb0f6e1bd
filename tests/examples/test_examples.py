"""The example scripts on the stand-ins: unchanged, but for paths, sizes and steps given as flags."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import standins
import torch
from PIL import Image, ImageDraw
from standin_parts import save_depth_estimator

from svdquant.nn import quantized_layers

EXAMPLES = Path(__file__).parents[2] / "examples"
# script, its pipeline and checkpoint among the stand-ins, the flags it needs, the steps and guidance it defaults to
SCRIPTS = {
    "flux_schnell": ("flux", [], 4, 0.0),
    "flux_fill": ("flux_fill", ["--image", "picture.png", "--mask", "mask.png"], 50, 30.0),
    "flux_control": ("flux_control", ["canny", "--image", "picture.png"], 30, 10.0),
    "flux_2024": ("flux", [], 4, 0.0),
    "flux_t5": ("flux_dev", ["--t5", "t5.safetensors"], 50, 3.5),
    "flux_kontext": ("flux_kontext", ["--image", "picture.png", "--keep-size"], 28, 2.5),
    "flux_redux": ("flux_dev", ["--image", "picture.png", "--prior", "flux_redux", "--prompt", "a cat"], 50, 2.5),
    "sana": ("sana", [], 20, 4.5),
    "sdxl": ("sdxl", [], 50, 5.0),
    "qwen_image": ("qwen_image", [], 50, 4.0),
    "z_image": ("z_image", [], 9, 0.0),
}
SIDE = 32
SIZED = [name for name in SCRIPTS if name not in ("flux_fill", "flux_control")]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every stand-in, its checkpoint, and the pictures that scripts read."""
    folder = tmp_path_factory.mktemp("shelf")
    for name in {name for name, *_ in SCRIPTS.values()}:
        standins.save(name, folder)
        standins.save_quantized(name, folder / f"{name}.safetensors")
    standins.save("flux_redux", folder)
    standins.save_quantized("flux", folder / "flux_2024.safetensors", blocks_only=True)
    standins.save_quantized_t5(folder / "t5.safetensors")
    standins.picture(side=SIDE).save(folder / "picture.png")
    standins.mask(side=SIDE).save(folder / "mask.png")
    return folder


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    names = {"common", *SCRIPTS}

    def load(name: str) -> ModuleType:
        for module in names:
            monkeypatch.delitem(sys.modules, module, raising=False)
        return importlib.import_module(name)

    return load


def arguments(name: str, shelf: Path, output: Path, *more: str) -> list[str]:
    stand_in, flags, *_ = SCRIPTS[name]
    model = shelf / f"{'flux_2024' if name == 'flux_2024' else stand_in}.safetensors"
    given = [str(shelf / flag) if (shelf / flag).exists() else flag for flag in flags]
    size = ["--height", str(SIDE), "--width", str(SIDE)] if name in SIZED else []
    paths = ["--model", str(model), "--base", str(shelf / stand_in), "--output", str(output)]
    return [*given, *paths, *size, "--device", "cpu", *more]


def check_picture(file: Path) -> np.ndarray:
    pixels = np.asarray(Image.open(file))
    assert pixels.shape == (SIDE, SIDE, 3)
    assert pixels.std() > 4
    return pixels.astype(np.float64)


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_draws_what_its_weights_mean(
    name: str,
    shelf: Path,
    script: Callable[[str], ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With 16-bit activations the picture is that of the dense model with the same weights, but for bfloat16."""
    module = script(name)
    steps = [] if SCRIPTS[name][2] <= 4 else ["--steps", "2"]
    usual, exact, dense = (tmp_path / f"{kind}.png" for kind in ("usual", "exact", "dense"))
    module.main(arguments(name, shelf, usual, *steps))
    assert f"saved {usual}" in capsys.readouterr().out
    check_picture(usual)
    module.main(arguments(name, shelf, exact, "--activations", "none", *steps))
    monkeypatch.setattr(module, "draw", dequantized(sys.modules["common"].draw))
    module.main(arguments(name, shelf, dense, *steps))
    assert np.abs(check_picture(exact) - check_picture(dense)).mean() < (2 if name == "sdxl" else 0.6)


def dequantized(draw: Callable[..., Image.Image]) -> Callable[..., Image.Image]:
    """`draw` with every quantized model of the pipeline turned into a dense one first."""

    def drawn(pipe: Any, args: argparse.Namespace, **inputs: Any) -> Image.Image:
        models = [c for c in pipe.components.values() if isinstance(c, torch.nn.Module) and quantized_layers(c)]
        assert len(models) == (2 if hasattr(args, "t5") else 1)
        for model in models:
            model.dequantize()
        assert not any(quantized_layers(model) for model in models)
        return draw(pipe, args, **inputs)

    return drawn


def test_redux_without_a_prompt_loads_no_text_encoder(
    script: Callable[[str], ModuleType], shelf: Path, tmp_path: Path
) -> None:
    """The prior then stands for them, with embeddings of the published width."""
    for name in ("flux_wide", "flux_redux_wide"):
        standins.save(name, tmp_path)
    model = standins.save_quantized("flux_wide", tmp_path / "flux_wide.safetensors")
    paths = {"model": model, "base": tmp_path / "flux_wide", "prior": tmp_path / "flux_redux_wide"}
    paths |= {"image": shelf / "picture.png", "output": tmp_path / "out.png"}
    given = [argument for name, path in paths.items() for argument in (f"--{name}", str(path))]
    size = ["--steps", "2", "--height", str(SIDE), "--width", str(SIDE)]
    script("flux_redux").main([*given, *size, "--device", "cpu"])
    check_picture(tmp_path / "out.png")


@pytest.mark.parametrize("source", ["a depth map", "a picture"])
def test_depth(source: str, script: Callable[[str], ModuleType], shelf: Path, tmp_path: Path) -> None:
    how = ["--ready"] if source == "a depth map" else ["--depth-model", str(save_depth_estimator(tmp_path))]
    flags = arguments("flux_control", shelf, tmp_path / "out.png", "--steps", "2", *how)
    script("flux_control").main(["depth", *flags[1:]])
    check_picture(tmp_path / "out.png")


def test_edges_of_a_square(script: Callable[[str], ModuleType]) -> None:
    """They lie on its border, are closed, and a faint step beside it is none."""
    picture = Image.new("RGB", (32, 32), (60, 60, 60))
    pen = ImageDraw.Draw(picture)
    pen.rectangle((24, 0, 31, 31), fill=(80, 80, 80))
    pen.rectangle((8, 8, 19, 19), fill=(255, 255, 255))
    control = script("flux_control").edges(picture)
    found = np.asarray(control)[..., 0] > 0
    assert control.size == (32, 32) and control.mode == "RGB"
    assert not found[10:18, 10:18].any() and not found[:, 22:].any() and not found[:6].any()
    assert found[7:9, 12].any() and found[18:21, 12].any() and found[12, 7:9].any() and found[12, 18:21].any()
    assert (found[12].sum(), found[:, 12].sum()) == (2, 2)


@pytest.mark.parametrize("name", SCRIPTS)
def test_defaults(name: str, script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps and guidance that the model was made for, and Hub paths."""
    module = script(name)
    parsed: list[argparse.Namespace] = []

    def stop(parser: argparse.ArgumentParser, argv: Any = None, namespace: Any = None) -> argparse.Namespace:
        parsed.append(original(parser, argv, namespace))
        if hasattr(module, "parse"):
            return parsed[-1]
        raise KeyboardInterrupt

    original = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    flags = [flag for flag in SCRIPTS[name][1] if flag != "--keep-size"]
    if hasattr(module, "parse"):
        module.parse(flags)
    else:
        with pytest.raises(KeyboardInterrupt):
            module.main(flags)
    args = parsed[0]
    assert (args.steps, args.guidance) == SCRIPTS[name][2:]
    assert args.model.endswith(".safetensors") and args.model.count("/") == 2 and args.base.count("/") == 1
    assert "KIND" not in args.model and "Kind" not in args.base
