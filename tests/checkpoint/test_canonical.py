"""Saving, loading and inspecting our own format, and an independent reading of it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import independent
import numpy as np
import pytest
import tiny
import torch
from diffusers import FluxTransformer2DModel
from torch import nn

import svdquant
from svdquant import SVDQuantError
from svdquant.checkpoint import inspect
from svdquant.nn import FIXED_DTYPE, quantized_layers


@pytest.fixture(scope="module")
def model():
    model = tiny.transformer().to(torch.bfloat16)
    svdquant.quantize(model, tiny.config())
    return model


@pytest.fixture(scope="module")
def file(model, tmp_path_factory):
    return svdquant.save_model(model, tmp_path_factory.mktemp("file") / "model.safetensors")


class Plain(nn.Module):
    """Of neither library."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(128, 128), nn.ReLU()) for _ in range(2))
        self.head = nn.Linear(128, 8)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_file_round_trip(model, file):
    loaded = svdquant.load_model(file)
    assert isinstance(loaded, FluxTransformer2DModel) and not loaded.training
    assert loaded.is_quantized and loaded.dtype == torch.bfloat16
    assert tiny.state_equal(loaded, model)
    assert torch.equal(tiny.run(loaded), tiny.run(model))
    assert [p.name for p in file.parent.iterdir()] == [file.name]
    again = svdquant.save_model(loaded, file.parent / "again.safetensors")
    assert again.read_bytes() == file.read_bytes()
    again.unlink()


def test_folder_round_trip(model, tmp_path):
    svdquant.save_model(model, tmp_path / "new" / "model", max_shard_size="300KB")
    loaded = svdquant.load_model(tmp_path / "new" / "model")
    assert tiny.state_equal(loaded, model) and loaded.dtype == torch.bfloat16
    (tmp_path / "new" / "model" / "README.md").write_text("mine")
    svdquant.save_model(loaded, str(tmp_path / "new" / "model"))
    names = sorted(p.name for p in (tmp_path / "new" / "model").iterdir())
    assert names == ["README.md", "config.json", "diffusion_pytorch_model.safetensors"]
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["model"]
    assert tiny.state_equal(svdquant.load_model(tmp_path / "new" / "model"), model)


def test_pipeline_folder(model, tmp_path):
    tiny.flux_pipeline(transformer=model).save_pretrained(tmp_path)
    assert tiny.state_equal(svdquant.load_model(tmp_path), model)
    assert tiny.state_equal(svdquant.load_model(tmp_path, component="transformer"), model)
    assert inspect(tmp_path).path.endswith("transformer")
    assert inspect(tmp_path, component="vae").format == "unquantized"
    with pytest.raises(SVDQuantError, match="unquantized"):
        svdquant.load_model(tmp_path, component="vae")
    with pytest.raises(SVDQuantError, match="no model 'unet'"):
        svdquant.load_model(tmp_path, component="unet")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_file_in_another_type(model, file, dtype):
    loaded = svdquant.load_model(file, torch_dtype=dtype, device="cpu")
    assert loaded.dtype == dtype
    for name, layer in quantized_layers(loaded).items():
        for leaf in FIXED_DTYPE:
            stored = getattr(model.get_submodule(name), leaf)
            assert stored is None or getattr(layer, leaf).dtype == stored.dtype
    assert tiny.run(loaded).isfinite().all()


def test_text_encoder_as_a_file(tmp_path):
    model = tiny.t5(width=128)
    svdquant.quantize(model, tiny.config(activations="none"))
    svdquant.save_model(model, tmp_path / "t5.safetensors")
    loaded = svdquant.load_model(tmp_path / "t5.safetensors")
    tokens = torch.arange(8)[None]
    assert quantized_layers(loaded).keys() == quantized_layers(model).keys()
    with torch.no_grad():
        assert torch.equal(loaded(tokens).last_hidden_state, model(tokens).last_hidden_state)


def test_plain_module(tmp_path):
    model = Plain()
    x = torch.randn(3, 128)
    svdquant.quantize(model, tiny.config(), calibrate=lambda m: m(x))
    path = svdquant.save_model(model, tmp_path / "plain.safetensors")
    loaded = svdquant.load_model(path, model=Plain())
    assert torch.equal(loaded(x), model(x))
    with pytest.raises(SVDQuantError, match="model="):
        svdquant.load_model(path)
    with pytest.raises(SVDQuantError, match=r"\.safetensors"):
        svdquant.save_model(model, tmp_path / "folder")
    other = nn.Sequential(nn.Linear(128, 128))
    with pytest.raises(SVDQuantError, match="has no linear of that name"):
        svdquant.load_model(path, model=other)
    assert type(other[0]) is nn.Linear


def test_failed_load_leaves_the_given_module_alone(tmp_path):
    model = Plain()
    svdquant.quantize(model, tiny.config())
    path = svdquant.save_model(model, tmp_path / "plain.safetensors")
    wider = Plain()
    wider.head = nn.Linear(128, 9)
    before = {name: t.clone() for name, t in wider.state_dict().items()}
    with pytest.raises(SVDQuantError, match=r"head\.(weight|bias) has the shape"):
        svdquant.load_model(path, model=wider)
    assert all(torch.equal(t, before[name]) for name, t in wider.state_dict().items())


def test_inspect(model, file, tmp_path):
    info = inspect(file)
    state = model.state_dict()
    assert (info.format, info.format_version, info.model_class) == ("svdquant", 1, "FluxTransformer2DModel")
    assert info.quantized_layers == len(quantized_layers(model))
    assert info.layers["w4a16"] == {"int4": 3} and info.ranks == {tiny.RANK: info.layers["svdquant"]["int4"]}
    assert info.tensors == len(state)
    assert info.total_bytes == sum(t.nbytes for t in state.values())
    assert info.total_bytes == info.quantized_bytes + info.low_rank_bytes + info.other_bytes
    assert info.low_rank_bytes == sum(t.nbytes for n, t in state.items() if ".proj_down" in n or ".proj_up" in n)
    assert info.dtypes == {"BF16": len(state) - info.quantized_layers, "U8": info.quantized_layers}
    assert json.loads(info.to_json())["quantized_layers"] == info.quantized_layers
    tiny.transformer().save_pretrained(tmp_path, max_shard_size="300KB")
    plain = inspect(tmp_path)
    assert plain.format == "unquantized" and plain.quantized_layers == 0 and plain.files > 2
    assert plain.other_bytes == plain.total_bytes > info.total_bytes
    one = inspect(next(iter(sorted(tmp_path.glob("*.safetensors")))))
    assert one.format == "unquantized" and 0 < one.total_bytes < plain.total_bytes


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_save_changes_nothing(model, tmp_path, monkeypatch, failure):
    import safetensors.torch

    svdquant.save_model(model, tmp_path / "m.safetensors")
    before = (tmp_path / "m.safetensors").read_bytes()

    def fail(tensors, path, metadata=None):
        with open(path, "wb") as out:
            out.write(b"half")
        raise failure

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    for target in ("m.safetensors", "folder", "new.safetensors"):
        with pytest.raises(SVDQuantError if isinstance(failure, OSError) else KeyboardInterrupt) as caught:
            svdquant.save_model(model, tmp_path / target)
        if isinstance(failure, OSError):
            assert "No space left" in str(caught.value) and target in str(caught.value)
    assert (tmp_path / "m.safetensors").read_bytes() == before
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_a_full_disk_is_one_sentence(model):
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    with pytest.raises(SVDQuantError, match=r"could not be saved|cannot be written"):
        svdquant.save_model(model, "/dev/full/model.safetensors")


def test_save_refuses(model, tmp_path):
    with pytest.raises(SVDQuantError, match="no quantized layers"):
        svdquant.save_model(tiny.transformer(), tmp_path / "a.safetensors")
    with pytest.raises(SVDQuantError, match="pipeline"):
        svdquant.save_model(tiny.flux_pipeline(), tmp_path / "a")
    with pytest.raises(SVDQuantError, match="format='gguf'"):
        svdquant.save_model(model, tmp_path / "a", format="gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options",
    [
        {"rotate": True},
        {"rotate": False},
        {"rotate": False, "smooth": False, "rank": 0},
        {"weights": "nvfp4"},
        {"weights": "int8"},
        {"group_size": 32, "rotate": False},
    ],
    ids=str,
)
def test_an_independent_reader_agrees(tmp_path, options):
    """A dense model rebuilt in float64 from the documented bytes equals the quantized one with exact activations."""
    model = tiny.transformer().to(torch.bfloat16)
    shapes = ({"side": 4}, {"side": 3, "text": 5})

    def calibrate(m):
        for shape in shapes:
            tiny.run(m, **shape)

    svdquant.quantize(model, tiny.config(**options), calibrate=calibrate)
    path = svdquant.save_model(model, tmp_path / "m.safetensors")
    tensors, metadata = independent.read(path)
    quantization = json.loads(metadata["svdquant"])["quantization_config"]

    loaded = svdquant.set_activations(svdquant.load_model(path, torch_dtype=torch.float32), "none")
    rebuilt = tiny.transformer().double()
    state = rebuilt.state_dict()
    for name in quantization["layers"]:
        linear = rebuilt.get_submodule(name)
        weight, bias = independent.dense(
            tensors, name, independent.layer_fields(quantization, name), linear.in_features
        )
        tensors |= {f"{name}.weight": weight, f"{name}.bias": bias}
    rebuilt.load_state_dict({name: torch.from_numpy(np.array(tensors[name])) for name in state})
    expected = tiny.run(rebuilt)
    actual = tiny.run(loaded).double()
    assert float((actual - expected).norm() / expected.norm()) < 1e-5


def test_saving_leaves_what_is_not_the_models_alone(tmp_path: Path) -> None:
    """A folder may hold an adapter; only the weights of an earlier save are replaced."""
    model = tiny.transformer()
    svdquant.quantize(model, tiny.config())
    svdquant.save_model(model, tmp_path)
    for name in ("my_lora.safetensors", "diffusion_pytorch_model-00001-of-00002.safetensors"):
        (tmp_path / name).write_bytes(b"x")
    svdquant.save_model(model, tmp_path)
    assert (tmp_path / "my_lora.safetensors").exists()
    assert not (tmp_path / "diffusion_pytorch_model-00001-of-00002.safetensors").exists()
    assert svdquant.load_model(tmp_path) is not None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "w4a16", "weights": "nvfp4", "group_size": 16}, "w4a16"),
        ({"rotate": True, "unsigned": [[0, 64]]}, "exclude each other"),
    ],
)
def test_a_layer_that_no_version_has_is_refused(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    model = tiny.transformer()
    svdquant.quantize(model, tiny.config())
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    layers = config["quantization_config"]["layers"]
    layers[next(iter(layers))] |= fields
    file.write_text(json.dumps(config))
    with pytest.raises(SVDQuantError, match=message):
        svdquant.load_model(tmp_path)
