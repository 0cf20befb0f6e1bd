"""`inspect` of every format and container, against what was put into the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nunchaku_files as files
import pytest
import tiny
import torch

import svdquant
from svdquant.checkpoint import inspect
from svdquant.checkpoint.info import stored_layers
from svdquant.checkpoint.layout import open_checkpoint

LOW_RANK = ("lora_down", "lora_up", "proj_down", "proj_up")


@pytest.mark.parametrize(
    ("family", "precision", "half", "rank", "name"),
    [
        ("flux", "int4", torch.bfloat16, 32, "FluxTransformer2DModel"),
        ("flux", "nvfp4", torch.float16, 16, "FluxTransformer2DModel"),
        ("qwen", "nvfp4", torch.bfloat16, 128, "QwenImageTransformer2DModel"),
        ("sdxl", "int4", torch.float16, 32, "UNet2DConditionModel"),
        ("zimage", "int4", torch.bfloat16, 16, "ZImageTransformer2DModel"),
        ("sana", "nvfp4", torch.bfloat16, 32, "SanaTransformer2DModel"),
        ("t5", "int4", torch.bfloat16, 16, "T5EncoderModel"),
    ],
)
def test_single_files(tmp_path: Path, family: str, precision: str, half: torch.dtype, rank: int, name: str) -> None:
    config = files.CONFIGS[family]
    tensors = files.make(family, config, precision, half, rank)
    path = files.write_single(tmp_path / "m.safetensors", tensors, files.metadata(family, config, precision, rank))
    info = inspect(path)
    layers = files.plan(family, config, precision).layers
    w4a4 = [layer.name for layer in layers if layer.kind == "w4a4"]
    w4a16 = [layer.name for layer in layers if layer.kind != "w4a4"]
    assert (info.format, info.container, info.model_class, info.format_version) == ("nunchaku", "file", name, None)
    assert info.library == ("transformers" if family == "t5" else "diffusers")
    assert info.half == str(half).removeprefix("torch.") and info.weights == precision
    expected = {"svdquant": {precision: len(w4a4)}, "w4a16": {"int4": len(w4a16)}}
    assert info.layers == {kind: by for kind, by in expected.items() if sum(by.values())}
    assert info.ranks == ({rank: len(w4a4)} if w4a4 else {}) and info.rotated == 0 and info.activations == {}
    assert info.quantized_layers == len(layers)
    size = sum(t.nbytes for t in tensors.values())
    branch = sum(t.nbytes for n, t in tensors.items() if n.endswith(LOW_RANK))
    plain = sum(t.nbytes for n, t in tensors.items() if n.rpartition(".")[0] not in {*w4a4, *w4a16})
    bias = sum(t.nbytes for n, t in tensors.items() if n.endswith(".bias") and n.rpartition(".")[0] in {*w4a4, *w4a16})
    assert (info.total_bytes, info.low_rank_bytes, info.other_bytes) == (size, branch, plain + bias)
    assert info.quantized_bytes == size - branch - plain - bias
    specs = stored_layers(open_checkpoint(path))
    assert set(specs) == {*w4a4, *w4a16}
    assert all(specs[n].weights == precision and specs[n].rank == rank for n in w4a4)
    assert {specs[n].group_size for n in w4a16} <= {64, 128}


def test_containers(tmp_path: Path) -> None:
    config = files.CONFIGS["flux"]
    tensors = files.make("flux", config, "nvfp4")
    whole = files.write_folder(tmp_path / "whole", tensors, files.full_config("flux", config))
    old = files.write_folder(tmp_path / "old", tensors, None)
    blocks = files.write_blocks(tmp_path / "blocks.safetensors", tensors)
    found = {path.name: inspect(path) for path in (whole, old, blocks)}
    assert {name: info.container for name, info in found.items()} == {
        "whole": "folder",
        "old": "folder",
        "blocks.safetensors": "file, blocks only",
    }
    assert {info.model_class for info in found.values()} == {"FluxTransformer2DModel"}
    assert {info.weights for info in found.values()} == {"nvfp4"} and found["old"].files == 2
    (old / "unquantized_layers.safetensors").unlink()
    assert inspect(old).container == "folder, blocks only"


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
def test_lite(tmp_path: Path, precision: str) -> None:
    config = files.CONFIGS["flux"]
    tensors = files.make("flux_lite", config, precision, rank=32)
    info = inspect(files.write_lite(tmp_path / "lite", tensors, config, precision, 32))
    assert (info.format, info.container, info.model_class) == ("nunchaku_lite", "folder", "FluxTransformer2DModel")
    assert info.weights == precision and info.ranks == {32: info.layers["svdquant"][precision]}


def test_our_own(tmp_path: Path) -> None:
    model = tiny.transformer().half()
    svdquant.quantize(model, tiny.config(weights="nvfp4"))
    for path in (tmp_path / "folder", tmp_path / "model.safetensors"):
        info = inspect(svdquant.save_model(model, path))
        kind = "file" if path.suffix else "folder"
        assert (info.format, info.container, info.weights, info.half) == ("svdquant", kind, "nvfp4", "float16")
        data: dict[str, Any] = info.to_dict()
        assert data["activations"] == {"auto": 17} and data["layers"] == {
            "svdquant": {"nvfp4": 17},
            "w4a16": {"int4": 3},
        }


def test_only_headers_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = files.CONFIGS["qwen"]
    path = files.write_single(tmp_path / "m.safetensors", files.make("qwen", config), files.metadata("qwen", config))
    monkeypatch.setattr("svdquant.checkpoint.mapped.MappedTensors.get", lambda *_: pytest.fail("read"))
    assert inspect(path).quantized_layers == 20
