"""Each verb's way through, on tiny pipelines."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cli_tools import QUICK, SMALL
from PIL import Image

import svdquant
from svdquant import LayerSpec, SVDQuantConfig
from svdquant.cli import demo
from svdquant.cli.estimate import group_work
from svdquant.cli.prompts import CALIBRATION
from svdquant.cli.quantize import calibration_prompts
from svdquant.integrations import pipeline
from svdquant.integrations.components import text_config
from svdquant.ptq import GroupPlan, LayerPlan
from svdquant.ptq.smooth import evaluation_rows, grid


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from svdquant.cli.main import run; run(['quantize', '--help']); "
        "print([m for m in ('torch', 'diffusers', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--group-size" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_version_and_help_of_every_verb(command: Callable) -> None:
    assert command("--version").out == f"svdquant {svdquant.__version__}\n"
    for verb in ("demo", "plan", "quantize", "generate", "inspect", "doctor"):
        shown = command(verb, "--help")
        assert (shown.code, shown.err) == (0, "") and f"svdquant {verb}" in shown.out


def test_plan_joins_equal_blocks(command: Callable) -> None:
    shown = command("plan", "FluxTransformer2DModel")
    assert shown.code == 0 and shown.err == ""
    assert "transformer_blocks.{0-18}.attn.to_q" in shown.out and "×19" in shown.out
    assert "494 of 502 linears" in shown.out
    every = command("plan", "FluxTransformer2DModel", "--all", "--rank", 64)
    assert "transformer_blocks.7.attn.to_q" in every.out and "rank 64" in every.out
    assert len(every.out.splitlines()) > 500


def test_plan_json_takes_the_flags_of_quantize(command: Callable, source: Path) -> None:
    flags = ["--weights", "int8", "--rank", "8", "--skip", "*.attn.to_out.0", "--override", '*.ff.*={"rank": 4}']
    made = json.loads(command("plan", source, *flags, "--json").out)
    layers = {layer["name"]: layer for layer in made["layers"]}
    assert layers["transformer_blocks.0.attn.to_q"]["weights"] == "int8"
    assert layers["transformer_blocks.0.attn.to_out.0"]["kind"] == "keep"
    assert layers["transformer_blocks.0.ff.net.2"]["rank"] == 4
    assert made["minutes"] > json.loads(command("plan", source, "--data-free", "--json").out)["minutes"] > 0


def test_quantize_reports_what_it_made(command: Callable, source: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n\n a dog \n")
    arguments = ["quantize", source, "-o", tmp_path / "out", *QUICK, *SMALL, "--prompts", prompts]
    done = command(*arguments, "--activations", "int8", "--seed", 3)
    assert (done.code, done.err) == (0, "")
    assert f"saved       {tmp_path / 'out'}" in done.out and "worst" in done.out
    assert (tmp_path / "out" / "svdquant_report.txt").is_file()
    config = json.loads((tmp_path / "out" / "transformer" / "config.json").read_text())["quantization_config"]
    assert (config["activations"], config["seed"], config["rank"]) == ("int8", 3, 16)
    assert "--overwrite" in command(*arguments).refusal()


def test_quantize_data_free_as_json(command: Callable, source: Path, tmp_path: Path) -> None:
    done = command(
        "quantize", source, "-o", tmp_path / "out", "--rank", 16, "--weights", "nvfp4", "--data-free", "--json"
    )
    report = json.loads(done.out)
    assert report["output"] == str(tmp_path / "out") and report["bytes_after"] < report["bytes_before"]
    assert {layer["error_of"] for layer in report["layers"]} == {"weight"}


def test_calibration_prompts(source: Path, tmp_path: Path) -> None:
    assert calibration_prompts(str(source), None, [], None) == list(CALIBRATION)
    assert calibration_prompts(str(source), None, ["a", "b"], 3) == ["a", "b", "a"]
    (tmp_path / "prompts.json").write_text('{"calibration": ["own"]}')
    assert calibration_prompts(str(tmp_path), None, [], None) == ["own"]
    # A single file has those of its pipeline.
    assert calibration_prompts(str(source), None, [], None, str(tmp_path)) == ["own"]
    assert len(set(CALIBRATION)) == len(CALIBRATION) == 32


def test_generate_one_file(command: Callable, quantized: Path, tmp_path: Path) -> None:
    done = command("generate", quantized, "a cat", "-o", tmp_path / "new" / "cat.png", *SMALL, "--activations", "int4")
    assert (done.code, done.err) == (0, "")
    assert [f.name for f in (tmp_path / "new").iterdir()] == ["cat.png"]
    assert Image.open(tmp_path / "new" / "cat.png").size == (8, 8)


def test_generate_without_output(
    command: Callable, quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command("generate", quantized, "a cat", *SMALL).code == 0
    assert command("generate", quantized, "a cat", "--seed", 1, "--seed", 2, *SMALL).code == 0
    assert sorted(str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*.png")) == [
        "picture.png",
        "pictures/a-cat-1.png",
        "pictures/a-cat-2.png",
    ]


def test_generate_with_a_single_16_bit_file(command: Callable, source: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes((source / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes())
    pictures = [tmp_path / "whole.png", tmp_path / "file.png"]
    command("generate", source, "a cat", "-o", pictures[0], *SMALL)
    done = command("generate", file, "a cat", "-o", pictures[1], *SMALL, "--base", source)
    assert done.code == 0, done.err
    assert pictures[0].read_bytes() == pictures[1].read_bytes()


@pytest.mark.parametrize("name", ["PixArtTransformer2DModel", "QwenImageTransformer2DModel"])
def test_plan_of_classes_whose_defaults_cannot_run(command: Callable, name: str) -> None:
    shown = command("plan", name, "--data-free")
    assert shown.code == 0 and name in shown.out, shown.err


@pytest.mark.parametrize(("n", "k"), [(256, 256), (3072, 3072), (18432, 3072)])
def test_the_estimate_scores_as_many_rows_as_the_search(n: int, k: int) -> None:
    config = SVDQuantConfig(smooth=4, gptq=False)
    spec = LayerSpec("svdquant", "int4", 64, 0, "int4", (), False, True)
    layer = LayerPlan("a", "svdquant", k, n, False, 2, "", "a", "", spec=spec)
    rows = config.calibration_rows
    problem: Any = SimpleNamespace(inputs=torch.empty(rows, k), weight=torch.empty(n, k, device="meta"), columns=k)
    scored = len(evaluation_rows(problem, torch.Generator()))
    quantized = group_work(GroupPlan("a", (layer,)), config)[1]
    assert quantized == pytest.approx((len(grid(4)) * scored + rows) * k, rel=0.01)


def test_the_estimate_counts_what_calibrating_weights_alone_costs() -> None:
    """Seconds on one core of the machine whose rates the estimate has, without and with calibration, GPTQ or not."""
    spec = LayerSpec("w4a16", "int4", 64, 0, "none", (), False, False)
    layers = tuple(LayerPlan(name, "w4a16", 1024, 1024, False, 2, "", "a", "", spec=spec) for name in "abc")
    seconds = []
    for gptq, calibrated in ((True, False), (False, True), (True, True)):
        flops, quantized = group_work(GroupPlan("a", layers), text_config(gptq=gptq), calibrated)
        seconds.append(flops / 5.0e10 + quantized / 3.6e7)
    assert seconds == pytest.approx([0.12, 1.03, 1.33], rel=0.05)


def test_generate_several_and_compare(command: Callable, quantized: Path, source: Path, tmp_path: Path) -> None:
    arguments = ["a cat", "a dog", "-o", tmp_path / "pictures", "--seed", 1, "--seed", 2, *SMALL, "--json"]
    drawn = json.loads(command("generate", quantized, *arguments, "--compare", source).out)
    names = [Path(picture["file"]).name for picture in drawn["pictures"]]
    assert names == ["a-cat-1.png", "a-cat-2.png", "a-dog-1.png", "a-dog-2.png"]
    assert all(picture["psnr"] > 30 for picture in drawn["pictures"])
    assert drawn["sheet"] == str(tmp_path / "pictures" / "compare.png") and Path(drawn["sheet"]).is_file()


def test_generate_from_a_model_and_its_base(command: Callable, quantized: Path, source: Path, tmp_path: Path) -> None:
    pictures = [tmp_path / "whole.png", tmp_path / "part.png"]
    command("generate", quantized, "a cat", "-o", pictures[0], *SMALL)
    done = command("generate", quantized / "transformer", "a cat", "-o", pictures[1], *SMALL, "--base", source)
    assert done.code == 0, done.err
    assert pictures[0].read_bytes() == pictures[1].read_bytes()


def test_inspect(command: Callable, quantized: Path, source: Path) -> None:
    shown = command("inspect", quantized, "--layers")
    assert shown.code == 0 and "svdquant, version 1" in shown.out
    assert "transformer_blocks.0.attn.to_q" in shown.out
    data = json.loads(command("inspect", quantized, "--json").out)
    assert data["layers"] == {"svdquant": {"int4": 17}, "w4a16": {"int4": 3}}
    assert "unquantized" in command("inspect", source).out


def test_doctor(command: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVDQUANT_BACKEND", "reference")
    data = json.loads(command("doctor", "--json").out)
    assert data["versions"]["svdquant"] == svdquant.__version__
    cpu = data["devices"][0]
    assert cpu["device"] == "cpu" and cpu["activations"]["int4"] == "int8" and cpu["backend"] == "reference"
    assert any("SVDQUANT_BACKEND" in warning for warning in data["warnings"])
    assert "int4   weights → int8 activations" in command("doctor").out


def test_demo(command: Callable, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"calibration": ["a cat"], "demo": ["a dog", "a house"], "height": 8, "width": 8}
    settings |= {"num_inference_steps": 1, "guidance_scale": 1.0, "max_sequence_length": 16}
    (source / "prompts.json").write_text(json.dumps(settings))
    monkeypatch.setattr(pipeline, "embedded_model", lambda: source)
    monkeypatch.setattr(demo, "_CALIBRATION_ROWS", 64)
    try:
        done = command("demo", "-o", tmp_path / "demo")
    finally:
        (source / "prompts.json").unlink()
    assert done.code == 0, done.err
    rows = {line.split("  ")[0]: line.split() for line in done.out.splitlines()[:5]}
    assert list(rows) == ["precision", "16 bit", "W4A4", "W4A8", "W8A8"]
    assert float(rows["W4A4"][1]) < float(rows["W8A8"][1]) < float(rows["16 bit"][2])
    assert {f.name for f in (tmp_path / "demo").iterdir()} == {"w4", "w8", "pictures", "comparison.png"}
    assert len(list((tmp_path / "demo" / "pictures").rglob("*.png"))) == 8
    assert f"svdquant generate {tmp_path / 'demo' / 'w4'}" in done.out
