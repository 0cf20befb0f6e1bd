"""`svdquant bench`: files and tables of a small run, blocks and pipelines, and refusals."""

from __future__ import annotations

import builtins
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from svdquant import SVDQuantConfig
from svdquant.bench import pipelines
from svdquant.bench.blocks import RECIPES, run_blocks
from svdquant.bench.device import CPU
from svdquant.bench.profile import kind_of
from svdquant.bench.report import markdown
from svdquant.bench.results import Results
from svdquant.bench.settings import BlockSize, PictureSize, Settings
from svdquant.cli.main import run

SMALL = ("--shape", "8x128x64", "--rounds", "1", "--rank", "8", "--threads", str(torch.get_num_threads()))


@pytest.fixture
def bench(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    monkeypatch.setenv("SVDQUANT_DEBUG", "0")

    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = run(["bench", *(str(argument) for argument in arguments)])
        return code, *capfd.readouterr()

    return call


def test_a_small_run(bench: Callable, tmp_path: Path) -> None:
    plotted = importlib.util.find_spec("matplotlib") is not None
    code, out, err = bench(*SMALL, "--peers", "none", "-o", tmp_path / "a" / "b")
    assert code == 0 and (err == "" or (not plotted and "matplotlib is not installed" in err))
    assert "layers 8x128x64" in out and "ours W4A8 rank 8" in out and "× torch bf16" in out
    folder = tmp_path / "a" / "b"
    assert {file.name for file in folder.iterdir()} <= {"results.json", "results.md", "results.png"}
    data = json.loads((folder / "results.json").read_text())
    assert data["command"].startswith("svdquant bench --suite layers --dtype bf16 --peers none --rank 8 --rounds 1")
    assert data["settings"]["shapes"] == ["8x128x64"] and data["versions"]["torch"] == torch.__version__


def test_json_and_no_matplotlib(bench: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = builtins.__import__

    def without(name: str, *arguments: Any, **more: Any) -> Any:
        if name == "matplotlib":
            raise ImportError(name)
        return plain(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    code, out, err = bench(*SMALL, "--peers", "none", "--dtype", "fp32", "--json", "-o", tmp_path)
    assert code == 0 and "matplotlib is not installed" in err
    data = json.loads(out)
    assert data["settings"]["dtype"] == "float32" and len(data["cases"]) == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["results.json", "results.md"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--shape", "64x64"], "shape '64x64' is not MxKxN"),
        (["--peers", "torchao,onnx"], "--peers 'torchao,onnx' names no peer"),
        (["--suite", "gpus"], "--suite 'gpus' is none of layers, blocks, pipeline, gpu or all"),
        (["--dtype", "int3"], "--dtype 'int3' is none of bf16, fp16, fp32"),
        (["--device", "tpu"], "--device 'tpu' has no benchmark but --suite gpu"),
        (["--rank", "300"], "rank=300 is outside 0-256"),
        (["--shape", "4x64x64", "--rank", "65"], "rank 65 exceeds a layer of shape 4x64x64"),
        (["--rounds", "0"], "--rounds"),
        (["--threads", "0"], "--threads"),
    ],
)
def test_refusals(bench: Callable, tmp_path: Path, arguments: list[str], said: str) -> None:
    code, out, err = bench("-o", tmp_path / "out", *arguments)
    assert (code, out) == (2, "") and len(err.splitlines()) == 1
    assert err.startswith("svdquant: ") and said in err


def test_a_folder_that_cannot_be(bench: Callable, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    code, _, err = bench(*SMALL, "-o", file)
    assert code == 2 and err == f"svdquant: {file}: is a file; choose a folder with --output\n"
    code, _, err = bench(*SMALL, "-o", file / "below")
    assert code == 2 and str(file) in err and len(err.splitlines()) == 1


def test_blocks() -> None:
    size = BlockSize(heads=2, head_dim=64, image_tokens=24, text_tokens=8)
    settings = Settings(block=size, rank=16, rounds=1, sample_seconds=0.0)
    cases = run_blocks(settings, CPU())
    assert [case.name.split(",")[0] for case in cases] == ["double", "single"]
    for case in cases:
        assert [row.contender for row in case.rows] == ["diffusers bf16", *(recipe.name for recipe in RECIPES)]
        errors = [row.error for row in case.rows[1:]]
        # Against their own dense weights: what is left is the rounding of activations.
        assert all(0 < error < 0.3 for error in errors) and errors[2] > 1.5 * errors[0]
        assert all(row.bytes_ratio < 0.75 for row in case.rows[1:])
        assert list(case.profiles) == [row.contender for row in case.rows]
        assert case.profiles["ours W4A8"]["linears"] > 0 and case.profiles["ours W4A8"]["attention"] > 0
    text = markdown(Results("", CPU().describe(), {}, {}, "", cases))
    assert "ours W4A8 spends: " in text and "linears" in text


def test_pipelines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipelines, "SVDQuantConfig", partial(SVDQuantConfig, smooth=2, gptq=False))
    size = PictureSize(steps=1, height=32, width=32, calibration_prompts=1)
    (case,) = pipelines.run_pipelines(Settings(picture=size, rank=16, rounds=1, sample_seconds=0.0), CPU())
    assert [row.contender for row in case.rows] == ["diffusers bf16", "ours W4A8", "ours W4A4", "ours W8A8"]
    assert case.rows[0].error == 0 and case.rows[0].more["psnr"] is None
    assert all(0 < row.error < 0.5 and row.more["psnr"] > 10 for row in case.rows[1:])
    assert all(row.more["seconds_per_picture"] > 0 for row in case.rows)
    assert "s per picture" in markdown(Results("", CPU().describe(), {}, {}, "", [case]))


@pytest.mark.parametrize(
    ("operation", "kind"),
    [
        ("aten::linear", "linears"),
        ("svdquant::w4a16_linear", "linears"),
        ("aten::scaled_dot_product_attention", "attention"),
        ("aten::conv2d", "convolutions"),
        ("aten::to", "copies and casts"),
        ("aten::layer_norm", "norms and elementwise"),
    ],
)
def test_kinds_of_operations(operation: str, kind: str) -> None:
    assert kind_of(operation) == kind


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from svdquant.cli.main import run; run(['bench', '--help']); "
        "print([m for m in ('torch', 'diffusers', 'numpy', 'openvino') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--peers" in done.stdout and done.stdout.splitlines()[-1] == "[]"
