"""Formats beside each other: saved over one another, loaded at the same time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import product

import nunchaku_files
import pytest
import tiny
import torch
from safetensors.torch import save_file
from torch import nn

import svdquant
from svdquant import SVDQuantConfig, SVDQuantError
from svdquant.checkpoint import inspect
from svdquant.nn import quantized_layers

FORMATS = ("svdquant", "nunchaku", "nunchaku_lite")


@pytest.fixture(scope="module")
def models():
    out = []
    for seed, precision in ((0, "int4"), (1, "nvfp4")):
        model = tiny.transformer(seed=seed).bfloat16()
        svdquant.quantize(model, SVDQuantConfig(weights=precision, rank=16, rotate=False))
        out.append(model)
    return out


@pytest.mark.parametrize(("first", "second"), list(product(FORMATS, FORMATS)))
def test_a_folder_holds_what_was_saved_last(models, tmp_path, first, second):
    folder = tmp_path / "model"
    svdquant.save_model(models[0], folder, format=first)
    (folder / "adapter.safetensors").write_bytes(b"someone else's")
    svdquant.save_model(models[1], folder, format=second)
    assert inspect(folder).format == second and inspect(folder).weights == "nvfp4"
    loaded = svdquant.load_model(folder)
    for name, layer in quantized_layers(models[1]).items():
        a, b = (m.tensors().dense()[0] for m in (loaded.get_submodule(name), layer))
        assert torch.equal(a, b), name
    assert (folder / "adapter.safetensors").read_bytes() == b"someone else's"


def test_threads_load_at_the_same_time(models, tmp_path):
    config = nunchaku_files.CONFIGS["flux"]
    paths = [tmp_path / "random.safetensors", tmp_path / "own.safetensors", tmp_path / "lite"]
    save_file(
        nunchaku_files.make("flux", config, half=torch.float16), paths[0], nunchaku_files.metadata("flux", config)
    )
    svdquant.save_model(models[0], paths[1])
    svdquant.save_model(models[1], paths[2], format="nunchaku_lite")
    register, dtype = nn.Module.register_parameter, torch.get_default_dtype()
    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(svdquant.load_model, paths * 4))
    assert not any(t.is_meta for model in loaded for t in model.state_dict().values())
    assert nn.Module.register_parameter is register and torch.get_default_dtype() == dtype
    for model in loaded[3:]:
        twin = loaded[loaded.index(model) % 3].state_dict()
        assert all(torch.equal(t.view(torch.uint8), twin[n].view(torch.uint8)) for n, t in model.state_dict().items())


def test_options_that_a_format_does_not_have(models, tmp_path):
    for options in (
        {"format": "nunchaku_lite", "blocks_only": True},
        {"format": "nunchaku", "blocks_only": True},
        {"format": "nunchaku", "max_shard_size": "1GB"},
    ):
        with pytest.raises(SVDQuantError, match=r"blocks_only|max_shard_size"):
            svdquant.save_model(models[0], tmp_path / "folder", **options)
    assert not (tmp_path / "folder").exists()


def test_the_short_suffix_is_a_file_too(models, tmp_path):
    for format in ("svdquant", "nunchaku"):
        path = svdquant.save_model(models[0], tmp_path / f"{format}.sft", format=format)
        assert path.is_file() and inspect(path).format == format
        svdquant.load_model(path)


def test_the_blocks_of_a_sana_with_its_base(tmp_path):
    """Among its blocks are tensors in 16 bits, too."""
    config = nunchaku_files.CONFIGS["sana"]
    tensors = nunchaku_files.make("sana", config)
    info = nunchaku_files.metadata("sana", config)
    whole = svdquant.load_model(nunchaku_files.write_single(tmp_path / "whole.safetensors", tensors, info))
    state = {n: t.double().numpy() for n, t in tensors.items() if n in nunchaku_files.shapes("sana", config)}
    full = nunchaku_files.random_state("sana", config, 3) | state
    base = nunchaku_files.write_base(tmp_path / "base", "sana", config, full)
    blocks = nunchaku_files.write_blocks(tmp_path / "blocks.safetensors", tensors)
    loaded = svdquant.load_model(blocks, base=base)
    again = svdquant.save_model(loaded, tmp_path / "again.safetensors", format="nunchaku", blocks_only=True)
    for model in (loaded, svdquant.load_model(again, base=base)):
        for name, tensor in whole.state_dict().items():
            assert torch.equal(model.state_dict()[name].view(torch.uint8), tensor.view(torch.uint8)), name
