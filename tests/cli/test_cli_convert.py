"""`svdquant convert` and `svdquant inspect` of other formats: what they say, and what they refuse."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nunchaku_files as files
import pytest
import tiny
import torch

import svdquant


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`flux.safetensors`, `blocks.safetensors` without the rest, `base`, which has it, and our `ours`, rotated."""
    here = tmp_path_factory.mktemp("convert")
    config = files.CONFIGS["flux"]
    tensors = files.make("flux", config, padded_groups=False)
    files.write_single(here / "flux.safetensors", tensors, files.metadata("flux", config))
    files.write_blocks(here / "blocks.safetensors", tensors)
    files.write_base(here / "base", "flux", config, files.random_state("flux", config, 1))
    model = tiny.transformer().to(torch.bfloat16)
    svdquant.quantize(model, tiny.config())
    svdquant.save_model(model, here / "ours")
    return here


def test_without_loss(command: Callable, folder: Path, tmp_path: Path) -> None:
    done = command("convert", folder / "flux.safetensors", tmp_path / "ours", "--to", "svdquant")
    assert done.code == 0 and "numbers  bit-exact" in done.out
    assert "nunchaku → svdquant, FluxTransformer2DModel, int4" in done.out
    # Published files carry a second smooth factor that nothing computes with.
    assert done.err.splitlines() == [
        "smooth_orig of 16 layers, a second smooth factor that nothing computes with: left out"
    ]
    assert "convert" in command("--help").out and "--blocks-only" in command("convert", "--help").out


def test_what_it_costs_is_said_aloud(command: Callable, folder: Path, tmp_path: Path) -> None:
    done = command("convert", folder / "ours", tmp_path / "n.safetensors", "--to", "nunchaku", "--weights", "nvfp4")
    assert done.code == 0 and "numbers  changed in 17 layers" in done.out
    first, second = (line for line in done.err.splitlines() if "--weights nvfp4" in line)
    assert first.startswith("14 layers: int4 in groups of 64, rotated → nvfp4 in groups of 16")
    assert second.startswith("3 layers: int4 in groups of 64 → nvfp4") and "at worst (single_transformer" in second
    data = json.loads(command("convert", folder / "ours", tmp_path / "lite", "--to", "nunchaku_lite", "--json").out)
    (change,) = data["changes"]
    assert not data["exact"] and (change["count"], change["after"]) == (14, "int4 in groups of 64")
    assert 0.05 < change["mean_error"] <= change["worst_error"] < 0.12 and "transformer_blocks.0." in change["worst"]
    assert any("unsigned" in loss for loss in data["losses"])


def test_blocks_alone(command: Callable, folder: Path, tmp_path: Path) -> None:
    source, out = folder / "blocks.safetensors", tmp_path / "blocks.safetensors"
    assert "as base" in command("convert", source, out, "--to", "nunchaku", "--blocks-only").refusal()
    done = command("convert", source, out, "--to", "nunchaku", "--blocks-only", "--base", folder / "base")
    assert done.code == 0 and out.stat().st_size < (folder / "flux.safetensors").stat().st_size
    assert "file, blocks only" in command("inspect", out).out
    for more in (["--to", "svdquant"], ["--to", "nunchaku_lite"]):
        assert "--blocks-only" in command("convert", folder / "ours", tmp_path / "x", "--blocks-only", *more).refusal()
    assert (
        "--blocks-only"
        in command("convert", folder / "ours", tmp_path / "x", "--blocks-only", "--to", "nunchaku").refusal()
    )


def test_pipelines_and_components(
    command: Callable, folder: Path, source: Path, copy_of: Callable, tmp_path: Path
) -> None:
    pipeline = copy_of(source)
    shutil.rmtree(pipeline / "transformer")
    shutil.copytree(folder / "ours", pipeline / "transformer")
    done = command("convert", pipeline, tmp_path / "n.safetensors", "--to", "nunchaku")
    assert done.code == 0 and "FluxTransformer2DModel" in done.out
    refused = command(
        "convert", pipeline, tmp_path / "t5", "--to", "svdquant", "--component", "text_encoder_2"
    ).refusal()
    assert "unquantized" in refused
    assert (
        "no model 'nothing'"
        in command("convert", pipeline, tmp_path / "t5", "--to", "svdquant", "--component", "nothing").refusal()
    )


def test_an_existing_output(command: Callable, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    arguments = ["convert", folder / "flux.safetensors", out, "--to", "svdquant"]
    assert command(*arguments).code == 0
    before = out.read_bytes()
    assert "--overwrite" in command(*arguments).refusal() and out.read_bytes() == before
    assert command(*arguments, "--overwrite").code == 0 and out.read_bytes() == before
    own = tmp_path / "own"
    own.mkdir()
    (own / "thesis.txt").write_text("")
    for flags in ([], ["--overwrite"]):
        refused = command("convert", folder / "ours", own, "--to", "nunchaku_lite", *flags).refusal()
        assert str(own) in refused
    assert [f.name for f in own.iterdir()] == ["thesis.txt"]


def test_the_input_is_not_overwritten(command: Callable, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "flux.safetensors"
    file.write_bytes((folder / "flux.safetensors").read_bytes())
    link = tmp_path / "link.safetensors"
    link.symlink_to(file)
    for out in (file, link):
        assert "is the input" in command("convert", file, out, "--to", "svdquant", "--overwrite").refusal()
    assert file.read_bytes() == (folder / "flux.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/none", "{tmp}/out", "--to", "svdquant"], "does not exist"),
        (["{folder}/none.safetensors", "{tmp}/out", "--to", "svdquant"], "does not exist"),
        (["{folder}/ours", "{tmp}/out", "--to", "gguf"], "'gguf' is not one of svdquant, nunchaku, nunchaku_lite"),
        (["{folder}/ours", "{tmp}/out"], "Missing option '--to'"),
        (["{folder}/ours", "--to", "nunchaku"], "Missing argument 'OUT'"),
        (["{folder}/ours", "{tmp}/out", "--to", "svdquant", "--weights", "int8"], "'int8' is not one of int4, nvfp4"),
        (["{folder}/ours", "{tmp}/out", "--to", "svdquant", "--dtype", "float12"], "'float12' is not one of"),
        (
            ["{folder}/ours", "{tmp}/o.safetensors", "--to", "nunchaku", "--dtype", "float32"],
            "leave out --dtype float32",
        ),
        (["{folder}/ours", "{tmp}/o.safetensors", "--to", "nunchaku_lite"], "is a folder; leave out .safetensors"),
        (["{folder}/flux.safetensors/below", "{tmp}/out", "--to", "svdquant"], "flux.safetensors"),
        (["{folder}/ours", "{folder}/flux.safetensors/out", "--to", "svdquant"], "no folder that can be written"),
        (["{folder}/ours", "{folder}/ours/n.safetensors", "--to", "nunchaku"], "is the input, or in it"),
        (["{folder}/base", "{tmp}/out", "--to", "svdquant"], "quantize it first"),
        (["{folder}/blocks.safetensors", "{tmp}/out", "--to", "svdquant", "--base", "{tmp}/none"], "does not exist"),
        (["{folder}/blocks.safetensors", "{tmp}/out", "--to", "svdquant", "--base", "{folder}/ours"], "is quantized"),
    ],
)
def test_bad_input(command: Callable, folder: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    filled = [a.format(tmp=tmp_path, folder=folder) for a in arguments]
    before = sorted(f.name for f in folder.rglob("*"))
    assert message in command("convert", *filled).refusal()
    assert list(tmp_path.iterdir()) == [] and sorted(f.name for f in folder.rglob("*")) == before


def test_pickles_and_damage(command: Callable, folder: Path, tmp_path: Path) -> None:
    torch.save({}, tmp_path / "model.pt")
    assert "pickle" in command("convert", tmp_path / "model.pt", tmp_path / "out", "--to", "svdquant").refusal()
    data = (folder / "flux.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(data[: len(data) // 2])
    assert (
        "truncated" in command("convert", tmp_path / "cut.safetensors", tmp_path / "out", "--to", "svdquant").refusal()
    )
    length = struct.unpack("<Q", data[:8])[0]
    text = data[8 : 8 + length].replace(b"qkv_proj.qweight", b"qkv_proj.qweighs", 1)
    (tmp_path / "odd.safetensors").write_bytes(data[:8] + text + data[8 + length :])
    refused = command("convert", tmp_path / "odd.safetensors", tmp_path / "out", "--to", "svdquant").refusal()
    assert "qweight is missing" in refused and "odd.safetensors" in refused
    assert not (tmp_path / "out").exists()


def test_a_family_that_nunchaku_does_not_have(command: Callable, folder: Path, tmp_path: Path) -> None:
    """Only the class in its config.json is looked at."""
    shutil.copytree(folder / "ours", tmp_path / "pixart")
    config = json.loads((tmp_path / "pixart" / "config.json").read_text())
    (tmp_path / "pixart" / "config.json").write_text(json.dumps(config | {"_class_name": "PixArtTransformer2DModel"}))
    refused = command("convert", tmp_path / "pixart", tmp_path / "n.safetensors", "--to", "nunchaku").refusal()
    assert "Nunchaku has no PixArtTransformer2DModel" in refused
    (tmp_path / "pixart" / "config.json").write_text(json.dumps(config | {"_class_name": "ZImageTransformer2DModel"}))
    refused = command("convert", tmp_path / "pixart", tmp_path / "n", "--to", "nunchaku").refusal()
    assert "as one whole file; end it in .safetensors" in refused


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(command: Callable, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    refused = command("convert", folder / "ours", tmp_path / "locked" / "out", "--to", "svdquant").refusal()
    assert "no folder that can be written" in refused


def test_a_full_disk(command: Callable, folder: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    try:
        assert "of disk" in command("convert", folder / "flux.safetensors", disk / "out", "--to", "svdquant").refusal()
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_inspect(command: Callable, folder: Path) -> None:
    shown = command("inspect", folder / "flux.safetensors", "--layers")
    assert (shown.code, shown.err) == (0, "")
    lines: dict[str, Any] = dict(line.split(maxsplit=1) for line in shown.out.splitlines() if line)
    assert lines["format"] == "nunchaku; file" and lines["model"] == "FluxTransformer2DModel (diffusers), bfloat16"
    assert lines["rank"] == "16 (×16)" and "activations" not in lines
    assert lines["single_transformer_blocks.1.mlp_fc2"].split()[:4] == ["svdquant", "int4", "64", "16"]
    data = json.loads(command("inspect", folder / "flux.safetensors", "--json", "--layers").out)
    assert data["layers"] == {"w4a16": {"int4": 4}, "svdquant": {"int4": 16}} and len(data["layer_specs"]) == 20
    assert (data["weights"], data["half"], data["container"]) == ("int4", "bfloat16", "file")
