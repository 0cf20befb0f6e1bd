"""Text encoders in W4A16 within their pipelines: from folder to folder, with options of their own, resumed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import family_videos
import numpy as np
import pytest
import standins
import tiny
import tiny_text
import torch
import transformers
from diffusers import DiffusionPipeline, FluxTransformer2DModel, QwenImageTransformer2DModel, SanaTransformer2DModel
from typer.testing import CliRunner

import svdquant
from svdquant import SVDQuantConfig, SVDQuantError
from svdquant.checkpoint import inspect
from svdquant.cli.main import app
from svdquant.integrations import components, on_disk
from svdquant.integrations.on_disk import quantize_pipeline
from svdquant.integrations.pipeline import PipelineOptions, draw, load_pipeline
from svdquant.nn import W4A16Linear, quantized_layers

PROMPTS = ["a cat", "a dog on a mat"]


def config(**fields: Any) -> SVDQuantConfig:
    return SVDQuantConfig(**({"rank": 16, "smooth": 2, "calibration_rows": 128} | fields))


def weights_of(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*.safetensors"))}


def flux() -> Any:
    return standins.flux()


def sana() -> Any:
    """With a Gemma wide enough to be quantized."""
    pipe = standins.sana()
    with tiny._seeded(3):
        fields = dict(pipe.transformer.config) | {"caption_channels": tiny_text.WIDTH}
        pipe.register_modules(
            text_encoder=tiny_text.text_encoder("Gemma2Model"),
            transformer=SanaTransformer2DModel.from_config(fields).eval(),
        )
    return pipe


def qwen_image() -> Any:
    pipe = standins.qwen_image()
    with tiny._seeded(3):
        fields = dict(pipe.transformer.config) | {"joint_attention_dim": tiny_text.WIDTH}
        pipe.register_modules(
            text_encoder=tiny_text.text_encoder("Qwen2_5_VLForConditionalGeneration"),
            transformer=QwenImageTransformer2DModel.from_config(fields).eval(),
        )
    return pipe


PIPELINES = {
    "flux": (flux, "text_encoder_2"),
    "sana": (sana, "text_encoder"),
    "qwen_image": (qwen_image, "text_encoder"),
}
# What the stand-ins' tokenizers allow.
EXTRA: dict[str, dict[str, Any]] = {"sana": {"complex_human_instruction": None, "use_resolution_binning": False}}


def options(name: str) -> PipelineOptions:
    length = {"flux": 32, "sana": 32}.get(name)
    return PipelineOptions(2, height=32, width=32, max_sequence_length=length, extra=EXTRA.get(name, {}))


def picture(pipe: Any, name: str) -> np.ndarray:
    return np.asarray(draw(tiny.quiet(pipe), ["a cat"], [0], options(name))[0], float)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("sources")

    def source(name: str) -> Path:
        if not (root / name).exists():
            PIPELINES[name][0]().to(torch.bfloat16).save_pretrained(root / name)
        return root / name

    return source


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("prompts", [None, PROMPTS], ids=["data-free", "calibrated"])
def test_pipelines(sources: Any, tmp_path: Path, name: str, prompts: list[str] | None) -> None:
    """Written by one call, loaded by diffusers alone, drawn with, saved again."""
    source, part = sources(name), PIPELINES[name][1]
    out = tmp_path / "out"
    report = quantize_pipeline(
        source, out, config(), prompts=prompts, options=options(name), text_encoders="int4", shard_bytes=200_000
    )
    pipe = DiffusionPipeline.from_pretrained(out, torch_dtype=torch.bfloat16)
    encoder, denoiser = getattr(pipe, part), pipe.transformer
    assert encoder.is_quantized and denoiser.is_quantized
    assert {type(layer) for layer in quantized_layers(encoder).values()} == {W4A16Linear}
    held = json.loads((out / part / "config.json").read_text())["quantization_config"]
    assert (held["activations"], held["rank"], held["smooth"], held["components"]) == ("none", 0, False, {})
    named = [layer for layer in report.layers if layer.name.startswith(f"{part}.")]
    assert len(named) == len(quantized_layers(encoder)) and {layer.kind for layer in named} == {"w4a16"}
    assert {layer.error_of for layer in named} == {"weight" if prompts is None else "output"}
    assert inspect(out, part).quantized_layers == len(named)
    original = DiffusionPipeline.from_pretrained(source, torch_dtype=torch.bfloat16)
    drawn = picture(pipe, name)
    assert 0 < np.abs(drawn - picture(original, name)).mean() < 16
    pipe.save_pretrained(tmp_path / "again")
    again = load_pipeline(tmp_path / "again")
    assert tiny.state_equal(getattr(again, part), encoder)
    assert (picture(again, name) == drawn).all()


def test_only_large_text_encoders_by_themselves(sources: Any, tmp_path: Path) -> None:
    """FLUX' CLIP stays. What a recipe says of one is added to the flag."""
    source = sources("flux")
    sizes = {part: sum(f.stat().st_size for f in (source / part).glob("*.safetensors")) for part in os.listdir(source)}
    assert 0 < sizes["text_encoder"] < components.SMALLEST_SHARE * sum(sizes.values()) < sizes["text_encoder_2"]
    named = {"text_encoder_2": {"skip": ["wo"]}}
    quantize_pipeline(source, tmp_path / "out", config(components=named), text_encoders="int8")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "text_encoder" / "config.json").read_text())
    held = json.loads((tmp_path / "out" / "text_encoder_2" / "config.json").read_text())["quantization_config"]
    assert held["weights"] == "int8" and held["skip"] == ["wo"]


def test_none_is_large_enough(sources: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(components, "SMALLEST_SHARE", 0.9)
    with pytest.raises(SVDQuantError, match=r"text encoders \(text_encoder, text_encoder_2\) are less than"):
        quantize_pipeline(sources("flux"), tmp_path / "out", config(), text_encoders="int4")


def test_named_components_have_options_of_their_own(sources: Any, tmp_path: Path) -> None:
    """Of a text encoder, and of a denoiser, which begins with the pipeline's."""
    named = {"text_encoder_2": {"skip": ["wo"], "group_size": 128}, "transformer": {"rank": 8}}
    quantize_pipeline(sources("flux"), tmp_path / "out", config(components=named))
    pipe = load_pipeline(tmp_path / "out")
    encoder, denoiser = quantized_layers(pipe.text_encoder_2), quantized_layers(pipe.transformer)
    assert not any(name.endswith("wo") for name in encoder)
    assert {layer.spec.group_size for layer in encoder.values()} == {128}
    assert {layer.spec.rank for layer in denoiser.values() if layer.spec.kind == "svdquant"} == {8}


def test_the_second_transformer_may_differ(tmp_path: Path) -> None:
    family_videos.wan22().to(torch.bfloat16).save_pretrained(tmp_path / "wan")
    named = {"transformer_2": {"rank": 8, "weights": "nvfp4"}}
    report = quantize_pipeline(tmp_path / "wan", tmp_path / "out", config(components=named))
    found = {part: inspect(tmp_path / "out", part) for part in ("transformer", "transformer_2")}
    assert {part: set(info.ranks) for part, info in found.items()} == {"transformer": {16}, "transformer_2": {8}}
    assert found["transformer_2"].layers["svdquant"].keys() == {"nvfp4"}
    names = [layer.name for layer in report.layers]
    assert len(names) == len(set(names)) and {name.partition(".")[0] for name in names} == set(found)


def test_limits_of_the_error_hold_for_text_encoders(sources: Any, tmp_path: Path) -> None:
    """Those of the pipeline, unless the encoder has its own."""
    source = sources("flux")
    report = quantize_pipeline(source, tmp_path / "all", config(), text_encoders="int4")
    errors = {layer.name: layer.error for layer in report.layers if layer.name.startswith("text_encoder_2.")}
    limit = sorted(errors.values())[len(errors) // 2]
    bad = max(errors, key=lambda name: errors[name])
    with pytest.raises(SVDQuantError, match=rf"exceed the relative error {limit}: .*; raise --max-error"):
        quantize_pipeline(source, tmp_path / "out", config(max_error=limit), text_encoders="int4")
    own = {"text_encoder_2": {"weights": "int4", "max_error": limit}}
    with pytest.raises(SVDQuantError, match=rf"{re.escape(bad)} \({errors[bad]:.3f}\)"):
        quantize_pipeline(source, tmp_path / "out", config(components=own), restart=True)
    quantize_pipeline(source, tmp_path / "out", config(keep_16bit_above=limit), text_encoders="int4", restart=True)
    kept = {f"text_encoder_2.{name}" for name in quantized_layers(load_pipeline(tmp_path / "out").text_encoder_2)}
    assert {name for name, error in errors.items() if error <= limit} == kept and len(kept) < len(errors)
    loose = {"text_encoder_2": {"weights": "int4", "keep_16bit_above": 1.0}}
    strict = config(components=loose, keep_16bit_above=limit)
    quantize_pipeline(source, tmp_path / "loose", strict)
    assert len(quantized_layers(load_pipeline(tmp_path / "loose").text_encoder_2)) == len(errors)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"components": {"text_encoder_7": {}}}, r"has no text_encoder_7; its components are .*text_encoder_2"),
        ({"components": {"tokenizer": {}}}, "tokenizer is a CLIPTokenizer, no model of diffusers or transformers"),
        ({"components": {"scheduler": {}}}, "scheduler is a FlowMatchEulerDiscreteScheduler, no model"),
        ({"components": {"vae": {}}}, "vae is an AutoencoderKL, made of convolutions"),
        ({"components": {"text_encoder": {}}}, "CLIPTextModel has no linear left to quantize"),
        ({"components": {"text_encoder_2": {"int8_activations_above": 0.1}}}, "int8_activations_above needs"),
        ({"components": {"text_encoder_2": {"max_error": 1e-3}}}, "14 layers exceed the relative error 0.001"),
    ],
)
def test_components_that_cannot_be_quantized(sources: Any, tmp_path: Path, fields: Any, message: str) -> None:
    with pytest.raises(SVDQuantError, match=message):
        quantize_pipeline(sources("flux"), tmp_path / "out", config(**fields))
    assert not (tmp_path / "out").exists()


def test_a_pipelines_configuration_is_not_a_models(sources: Any, tmp_path: Path) -> None:
    folder, whole = sources("flux") / "text_encoder_2", config(components={"text_encoder_2": {}})
    for call in (
        lambda: svdquant.quantize(tiny_text.text_encoder("T5EncoderModel"), whole),
        lambda: transformers.T5EncoderModel.from_pretrained(folder, quantization_config=whole),
        lambda: FluxTransformer2DModel.from_pretrained(folder.parent / "transformer", quantization_config=whole),
    ):
        with pytest.raises(SVDQuantError, match="names text_encoder_2 of a pipeline, and this quantizes one model"):
            call()
    with pytest.raises(SVDQuantError, match="is a model without its pipeline, so it has no text_encoder_2"):
        quantize_pipeline(folder, tmp_path / "out", whole)
    with pytest.raises(SVDQuantError, match="is a model without its pipeline, so it has no text encoders"):
        quantize_pipeline(folder, tmp_path / "out", text_encoders="int4")
    with pytest.raises(SVDQuantError, match="text_encoders='int3' is not one of none, int4, int8"):
        quantize_pipeline(folder.parent, tmp_path / "out", text_encoders="int3")
    quantize_pipeline(folder.parent, tmp_path / "out", whole)
    with pytest.raises(SVDQuantError, match="quantized already"):
        quantize_pipeline(tmp_path / "out", tmp_path / "twice", whole)


_KILLED = """
import os, signal, sys
sys.path[:0] = {paths!r}
from pathlib import Path
import test_text_encoder_pipelines as tests
def progress(stage, done, total, text):
    if stage == "solve" and text.endswith("block.1.layer.0.SelfAttention.q"):
        os.kill(os.getpid(), signal.SIGKILL)
tests.quantized(Path({source!r}), Path(sys.argv[1]), progress=progress)
"""


def quantized(source: Path, out: Path, **arguments: Any) -> Any:
    return quantize_pipeline(
        source, out, config(), prompts=PROMPTS, options=options("flux"), text_encoders="int4", **arguments
    )


def test_killed_and_continued_is_bit_identical(sources: Any, tmp_path: Path) -> None:
    """Stopped while the denoiser is calibrated, after the text encoder; killed between layers of that."""
    source, out = sources("flux"), tmp_path / "killed"
    quantized(source, tmp_path / "whole")
    calls: list[str] = []

    def stop(stage: str, _done: int, _total: int, text: str) -> None:
        calls.append(text)
        if calls.count(PROMPTS[1]) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantized(source, out, progress=stop)
    inputs = tmp_path / "killed.partial" / "inputs"
    assert (inputs / "text_encoder_2" / "inputs.json").is_file()
    assert not (inputs / "transformer" / "inputs.json").is_file()

    script = tmp_path / "run.py"
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1]), str(Path(svdquant.__file__).parents[1])]
    script.write_text(_KILLED.format(paths=paths, source=str(source)))
    run = subprocess.run([sys.executable, str(script), str(out)], capture_output=True, env=os.environ)
    assert run.returncode == -signal.SIGKILL, run.stderr.decode()
    solved = sorted((tmp_path / "killed.partial" / "solved" / "text_encoder_2").glob("*.safetensors"))
    assert not out.exists() and len(solved) >= 4
    with pytest.raises(SVDQuantError, match="begun with other components; repeat"):
        quantize_pipeline(source, out, config(), prompts=PROMPTS, options=options("flux"))
    stamps = {file: file.stat().st_mtime_ns for file in solved}

    def progress(stage: str, done: int, total: int, _text: str) -> None:
        if stage == "solve" and done == total:
            assert all(file.stat().st_mtime_ns == stamp for file, stamp in stamps.items())

    quantized(source, out, progress=progress)
    assert weights_of(out) == weights_of(tmp_path / "whole")


def test_the_disk_estimate_counts_text_encoders(sources: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, found, publish = [], [], on_disk.publish

    def measured(*folders: Path) -> None:
        found.append(sum(f.stat().st_size for f in tmp_path.rglob("*") if f.is_file()))
        publish(*folders)

    monkeypatch.setattr(on_disk, "check_disk", lambda _folder, needed: wanted.append(needed))
    monkeypatch.setattr(on_disk, "publish", measured)
    quantized(sources("flux"), tmp_path / "out")
    assert found[0] <= wanted[0] < 1.4 * found[0], (wanted, found)


def test_the_command(sources: Any, tmp_path: Path) -> None:
    def run(*arguments: str) -> Any:
        return CliRunner().invoke(app, list(arguments))

    out = str(tmp_path / "out")
    made = run("quantize", str(sources("flux")), "-o", out, "--data-free", "--rank", "16", "--text-encoders", "int4")
    assert made.exit_code == 0, made.output
    assert "models      FluxTransformer2DModel+T5EncoderModel: " in made.output
    text = run("inspect", out, "--component", "text_encoder_2").output
    assert "T5EncoderModel" in text and "int4" in text
    drawn = run(
        "generate", out, "a cat", "-o", str(tmp_path / "a.png"), "--steps", "1", "--height", "16", "--width", "16"
    )
    assert drawn.exit_code == 0 and (tmp_path / "a.png").is_file()
    wrong = run("quantize", str(sources("flux")), "-o", f"{out}2", "--data-free", "--text-encoders", "fp8")
    assert wrong.exit_code != 0
