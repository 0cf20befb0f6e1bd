"""From one file of a fine-tune to a picture, by the command alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import fine_tunes as ft
import pytest
import torch
from cli_tools import QUICK, SMALL
from original_layouts import ORIGINAL
from safetensors.torch import load_file

from svdquant import SVDQuantConfig, SVDQuantError
from svdquant.integrations.on_disk import quantize_pipeline

WEIGHTS = Path("transformer") / "diffusion_pytorch_model.safetensors"


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS)


def assert_same(first: Path, second: Path) -> None:
    one, two = stored(first), stored(second)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_scaled_fp8_in_original_names(command: Callable, source: Path, tmp_path: Path) -> None:
    """The same bits as of the weights that the file means, and a picture."""
    fp8, meant = ft.scaled_fp8(ORIGINAL["flux"](stored(source)), "scalar")
    file = ft.write(tmp_path / "tune.safetensors", fp8, "model.diffusion_model.")
    plain = ft.write(tmp_path / "plain.safetensors", meant)
    out, flags = tmp_path / "out", [*QUICK, *SMALL, "--base", source, "--prompt", "a cat"]
    result = command("quantize", file, "-o", out, *flags)
    assert result.code == 0, result.err
    assert command("quantize", plain, "-o", tmp_path / "same", *flags).code == 0
    assert_same(out, tmp_path / "same")
    assert command("generate", out, "a cat", "-o", tmp_path / "cat.png", *SMALL).code == 0
    assert (tmp_path / "cat.png").is_file() and not (tmp_path / "out.partial").exists()


def test_comfyui_checkpoint_with_more_inside(command: Callable, source: Path, tmp_path: Path) -> None:
    """Float32 under diffusers' names, in an all-in-one file: what else is in it is named; the base's is kept."""
    inside = {f"model.diffusion_model.{name}": value.float() for name, value in stored(source).items()}
    file = ft.write(tmp_path / "tune.safetensors", inside | {"vae.decoder.conv_in.weight": torch.zeros(2, 2)})
    result = command("quantize", file, "-o", tmp_path / "out", "--base", source, "--data-free", "--rank", "16")
    assert result.code == 0 and "vae (1 tensors) are left out for those of" in result.err
    assert command("quantize", source, "-o", tmp_path / "same", "--data-free", "--rank", "16").code == 0
    assert_same(tmp_path / "out", tmp_path / "same")
    for name in ("vae", "text_encoder"):
        kept = [(folder / name / "config.json").read_text() for folder in (source, tmp_path / "out")]
        assert kept[0] == kept[1]


def test_plan_of_a_file(command: Callable, source: Path, tmp_path: Path) -> None:
    file = ft.write(tmp_path / "tune.safetensors", ORIGINAL["flux"](stored(source)))
    plans = [command("plan", *model, "--json") for model in ([file], [file, "--base", source], [source])]
    assert [plan.code for plan in plans] == [0, 0, 0]
    layers = [json.loads(plan.out)["layers"] for plan in plans]
    assert layers[0] == layers[1] == layers[2]


def test_the_pipeline_is_not_overwritten(command: Callable, copy_of: Callable, source: Path, tmp_path: Path) -> None:
    file = ft.write(tmp_path / "tune.safetensors", ORIGINAL["flux"](stored(source)))
    base = copy_of(source)
    for model, flags in ((file, ["--base", base]), (base, [])):
        for out, sentence in (
            (base, f"{base}: holds the model that is read ({base})"),
            (base / "w4", f"is inside {base}"),
        ):
            refusal = command("quantize", model, "-o", out, "--data-free", "--overwrite", *flags).refusal()
            assert sentence in refusal
    assert_same(base, source)
    assert sorted(path.name for path in base.iterdir()) == sorted(path.name for path in source.iterdir())


def test_what_a_recipe_or_picture_lacks_is_found_before_the_copy(
    command: Callable, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = ft.write(tmp_path / "tune.safetensors", ORIGINAL["flux"](stored(source)))
    monkeypatch.setattr("svdquant.integrations.on_disk.unpack", None)
    recipe, picture, out = tmp_path / "recipe.toml", tmp_path / "broken.png", tmp_path / "out"
    recipe.write_text("[components.text_encoder_9]\nrank = 8")
    picture.write_bytes(b"\x89PNG\r\n\x1a\nno picture")
    flags = ["-o", out, "--base", source]
    refusal = command("quantize", file, *flags, "--data-free", "--recipe", recipe).refusal()
    assert f"{recipe}: [components.text_encoder_9]: {source}: the pipeline has no text_encoder_9" in refusal
    refusal = command("quantize", file, *flags, "--prompt", "a cat", "--image", picture).refusal()
    assert f"{picture}: cannot be read" in refusal
    with pytest.raises(SVDQuantError, match="has no text_encoder_9; its components are"):
        quantize_pipeline(file, out, SVDQuantConfig(components={"text_encoder_9": {}}), base=str(source))
    assert not list(tmp_path.glob("out*"))


def test_drawing_says_what_a_file_is_taken_for(command: Callable, source: Path, tmp_path: Path) -> None:
    inside = {f"model.diffusion_model.{name}": value for name, value in ORIGINAL["flux"](stored(source)).items()}
    file = ft.write(tmp_path / "tune.safetensors", inside | {"vae.decoder.conv_in.weight": torch.zeros(2, 2)})
    done = command("generate", file, "a cat", "-o", tmp_path / "a.png", *SMALL, "--base", source)
    assert done.code == 0 and "vae (1 tensors) are left out for those of" in done.err


def test_refusals_leave_nothing(command: Callable, source: Path, tmp_path: Path) -> None:
    lora = ft.write(tmp_path / "lora.safetensors", {"transformer.x_embedder.lora_A.weight": torch.zeros(2, 2)})
    for model in (lora, tmp_path / "model.gguf"):
        if model != lora:
            model.write_bytes(b"GGUF")
        refusal = command("quantize", model, "-o", tmp_path / "out", "--base", source, "--data-free").refusal()
        assert str(model) in refusal
    file = ft.write(tmp_path / "tune.safetensors", ORIGINAL["flux"](stored(source)))
    refusal = command("quantize", file, "-o", tmp_path / "out", "--data-free").refusal()
    assert "seems to be made from black-forest-labs/FLUX.1-schnell, which could not be loaded" in refusal
    assert "--base" in refusal
    assert not list(tmp_path.glob("out*"))
