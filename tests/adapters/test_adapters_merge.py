"""Adapters baked into a checkpoint."""

from __future__ import annotations

import adapter_tools as tools
import pytest
import torch
from adapter_tools import BF16, FP32
from safetensors.torch import load_file, save_file

import svdquant
from svdquant import SVDQuantError
from svdquant.integrations.merge import MergeReport, merge_adapters, merge_into
from svdquant.nn import quantized_layers


@pytest.fixture
def files(tmp_path):
    model = tools.quantized_flux(BF16, "auto")
    svdquant.save_model(model, tmp_path / "flux.safetensors")
    states = [tools.lora(model, seed, dtype=BF16) for seed in (1, 2)]
    paths = [tmp_path / f"style-{seed}.safetensors" for seed in (1, 2)]
    for state, path in zip(states, paths, strict=True):
        save_file(state, path)
    return model, states, paths, tmp_path


@pytest.mark.parametrize(
    "config", [{}, {"weights": "nvfp4"}, {"weights": "int8"}, {"rank": 0}, {"rotate": True}], ids=str
)
def test_merged_weights(config):
    """Every touched layer means W + ΔW as closely as a data-free solution of its rank does; smoothing stays."""
    model = tools.quantized_flux(FP32, "none", **config)
    state = tools.lora(model, 1)
    deltas = {name: 0.7 * delta for name, delta in tools.deltas(state).items()}
    before = {name: layer.tensors() for name, layer in quantized_layers(model).items()}
    embedder = model.x_embedder.weight.clone()
    wanted = tools.output(tools.dense(model, [(deltas, 1.0)]))
    untouched = tools.output(model)
    model.load_lora_adapter(dict(state), adapter_name="style")
    model.set_adapters("style", 0.7)
    report = MergeReport("", "", {})
    merge_into(model, report)
    assert report.errors.keys() == deltas.keys() - {"x_embedder"} and report.dense == 1
    assert torch.allclose(model.x_embedder.weight, embedder + deltas["x_embedder"], atol=1e-6)
    bound = 0.05 if config.get("weights") == "int8" else 0.25
    for name, layer in quantized_layers(model).items():
        old, new = before[name], layer.tensors()
        if name not in deltas:
            assert new.qweight is old.qweight or torch.equal(new.qweight, old.qweight)
            continue
        error = tools.relative(new.dense()[0], old.dense()[0] + deltas[name])
        assert error == pytest.approx(report.errors[name], rel=1e-3) and error < bound
        assert new.spec == old.spec and new.qweight.shape == old.qweight.shape
        assert old.smooth_factor is None or torch.equal(new.smooth_factor, old.smooth_factor)
        meant, stands = old.dense()[1], new.dense()[1]
        assert meant is None or torch.allclose(meant, stands, atol=1e-4)
    error, far = tools.relative(tools.output(model), wanted), tools.relative(untouched, wanted)
    assert error < (0.03 if config.get("weights") == "int8" else 0.6 * far)


def test_biases_of_an_adapter_join_the_layers():
    """PEFT's `lora_bias`: what an adapter adds behind its up-projection."""
    model = tools.quantized_flux(FP32, "none")
    names = [name for name in tools.LAYERS if name != "x_embedder"]
    state = tools.lora(model, 1, names=names)
    generator = torch.Generator().manual_seed(5)
    added = {name: torch.randn(tools.linears(model)[name].out_features, generator=generator) for name in names}
    state |= {f"{tools.PREFIX}{name}.lora_B.bias": bias for name, bias in added.items()}
    before = {name: layer.tensors().dense()[1] for name, layer in quantized_layers(model).items()}
    model.load_lora_adapter(dict(state), adapter_name="style")
    model.set_adapters("style", 0.7)
    wanted = tools.output(model)
    report = MergeReport("", "", {})
    merge_into(model, report)
    assert report.errors.keys() == set(names)
    for name, layer in quantized_layers(model).items():
        expected = before[name] + (0.7 * added[name] if name in added else 0)
        assert torch.allclose(layer.tensors().dense()[1], expected, atol=1e-4), name
    assert tools.relative(tools.output(model), wanted) < 0.1


def test_layers_that_shared_a_branch_still_do():
    model = tools.quantized_flux(BF16, "auto")
    attention = model.transformer_blocks[0].attn
    names = [f"transformer_blocks.0.attn.{part}" for part in ("to_q", "to_k", "to_v")]
    assert torch.equal(attention.to_q.proj_down, attention.to_k.proj_down)
    model.load_lora_adapter(tools.lora(model, 1, names=names), adapter_name="style")
    merge_into(model, MergeReport("", "", {}))
    assert torch.equal(attention.to_q.proj_down, attention.to_k.proj_down)
    assert torch.equal(attention.to_q.proj_down, attention.to_v.proj_down)


@pytest.mark.parametrize("grow", [False, True])
def test_checkpoints(files, grow):
    model, states, paths, folder = files
    out = folder / ("grown" if grow else "merged.safetensors")
    report = merge_adapters(folder / "flux.safetensors", [(paths[0], 0.5), (paths[1], -0.5)], out, grow=grow)
    merged = svdquant.load_model(out)
    for i, state in enumerate(states):
        model.load_lora_adapter(dict(state), adapter_name=f"style_{i}")
    model.set_adapters(["style_0", "style_1"], [0.5, -0.5])
    wanted = tools.output(model)
    model.disable_lora()
    off = tools.relative(tools.output(model), wanted)
    assert tools.relative(tools.output(merged), wanted) < 0.6 * off
    layers = quantized_layers(merged)
    touched = {name for name in tools.LAYERS if name in layers}
    assert report.errors.keys() == ({n for n in touched if "norm" in n} if grow else touched)
    kept = {name.replace(".base_layer", ""): layer for name, layer in quantized_layers(model).items()}
    for name, layer in layers.items():
        if name not in touched or (grow and "norm" not in name):
            assert torch.equal(layer.qweight, kept[name].qweight), name
        if grow and name in touched and "norm" not in name:
            assert layer.spec.rank == layer.proj_down.shape[0] == 16 + 32
    again = merge_adapters(
        folder / "flux.safetensors", [(paths[0], 0.5), (paths[1], -0.5)], folder / "b.safetensors", grow=grow
    )
    assert again.errors == report.errors
    if not grow:
        one, two = load_file(out), load_file(folder / "b.safetensors")
        assert all(torch.equal(one[key].view(torch.uint8), two[key].view(torch.uint8)) for key in one)


def test_mistakes(files):
    _, _, paths, folder = files
    with pytest.raises(SVDQuantError, match="is the input"):
        merge_adapters(folder / "flux.safetensors", [(paths[0], 1.0)], folder / "flux.safetensors")
    with pytest.raises(SVDQuantError, match="no adapter is loaded"):
        merge_adapters(folder / "flux.safetensors", [], folder / "c.safetensors")
    save_file({f"transformer.x.lora_{half}.weight": torch.ones(2, 2) for half in "AB"}, folder / "foreign.safetensors")
    with pytest.raises(SVDQuantError, match="none of its 2 tensors"):
        merge_adapters(folder / "flux.safetensors", [(folder / "foreign.safetensors", 1.0)], folder / "c.safetensors")
    assert not (folder / "c.safetensors").exists()
