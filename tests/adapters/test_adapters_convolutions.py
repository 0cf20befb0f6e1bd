"""LyCORIS' kinds on convolutions: 16-bit ones with kernels (SDXL), quantized ones of one pixel (SANA)."""

from __future__ import annotations

import copy
from typing import Any

import adapter_tools as tools
import lycoris_kinds as kinds
import pytest
import standins
import tiny
import torch
from torch import Tensor

import svdquant
from svdquant import SVDQuantError
from svdquant.integrations.merge import MergeReport, merge_into
from svdquant.nn import SVDQuantConv2d, quantized_layers

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`", "ignore:.*became LoRAs of at most")
EVERY = {
    "LoCon in Tucker form": kinds.locon_tucker,
    "LoHa": kinds.loha,
    "LoHa in Tucker form": kinds.loha_tucker,
    "LoKr": kinds.lokr,
    "LoKr as products": kinds.lokr_product,
    "LoKr in Tucker form": kinds.lokr_tucker,
    "GLoRA": kinds.glora,
    "OFT": kinds.limited_oft,
    "BOFT": kinds.boft,
    "IA3": kinds.ia3,
    "IA3 of inputs": kinds.ia3_of_inputs,
    "difference": kinds.difference,
}
# 3×3 with and without stride, 1×1, and a linear beside them.
SDXL = (
    "down_blocks.0.resnets.0.conv1",
    "down_blocks.0.downsamplers.0.conv",
    "down_blocks.1.resnets.0.conv_shortcut",
    "mid_block.resnets.0.conv2",
)
# As SDXL's authors call the same convolutions.
ORIGINAL = (
    "lora_unet_input_blocks_1_0_in_layers_2",
    "lora_unet_input_blocks_2_0_op",
    "lora_unet_input_blocks_3_0_skip_connection",
    "lora_unet_middle_block_0_out_layers_3",
)


@pytest.fixture(scope="module")
def original() -> Any:
    pipe = standins.sdxl()
    svdquant.quantize(pipe.unet, tiny.config())
    svdquant.set_activations(pipe.unet, "none")
    return pipe


@pytest.fixture
def sdxl(original) -> Any:
    yield original
    if hasattr(original.unet, "peft_config"):
        original.unet.unload_lora()


@pytest.fixture(scope="module")
def sana() -> Any:
    pipe = standins.sana()
    svdquant.quantize(pipe.transformer, tiny.config())
    svdquant.set_activations(pipe.transformer, "none")
    return pipe


def check(model: Any, changes: dict[str, Tensor], load: Any, bound: float, strengths: Any = (0.8, -0.5, 0.0)) -> None:
    """Every convolution alone, at two strengths and none, against one with W + strength · ΔW."""
    layers = {name: model.get_submodule(name) for name in changes}
    plain = {n: tools.dense(layer) if hasattr(layer, "spec") else copy.deepcopy(layer) for n, layer in layers.items()}
    inputs = {
        name: torch.randn(2, layer.in_channels, 9, 7, generator=torch.Generator().manual_seed(i))
        for i, (name, layer) in enumerate(layers.items())
    }
    before = {name: layer(inputs[name]) for name, layer in layers.items()}
    load("style")
    for strength in strengths:
        model.set_adapters("style", strength)
        for name, change in changes.items():
            wanted = copy.deepcopy(plain[name])
            wanted.weight.data += strength * change.reshape(wanted.weight.shape)
            with torch.no_grad():
                y, expected = model.get_submodule(name)(inputs[name]), wanted(inputs[name])
            if not strength:
                assert torch.equal(y, before[name])
                continue
            assert tools.relative(before[name], expected) > 0.02
            assert tools.relative(y, expected) < bound, name
    model.unload_lora()
    assert all(torch.equal(model.get_submodule(name)(inputs[name]), before[name]) for name in changes)


@pytest.mark.parametrize(
    ("kind", "names"),
    [(kind, "ours") for kind in EVERY]
    + [(kind, "original") for kind in ("LoHa", "LoKr in Tucker form", "GLoRA", "OFT", "difference")],
)
def test_kernels(sdxl, kind, names):
    with torch.no_grad():
        weights = {name: sdxl.unet.get_submodule(name).weight.data for name in SDXL}
        state, changes = kinds.adapter(EVERY[kind], weights, 1, "lora_unet_")
        if names == "original":
            for ours, theirs in zip(SDXL, ORIGINAL, strict=True):
                stem = f"lora_unet_{ours.replace('.', '_')}"
                state = {key.replace(f"{stem}.", f"{theirs}."): value for key, value in state.items()}
        load = lambda name: sdxl.load_lora_weights(dict(state), adapter_name=name)  # noqa: E731
        check(sdxl.unet, changes, load, 5e-3)


@pytest.mark.parametrize("kind", EVERY)
def test_quantized_ones(sana, kind):
    names = [name for name, m in quantized_layers(sana.transformer).items() if isinstance(m, SVDQuantConv2d)][:2]
    assert names
    with torch.no_grad():
        weights = {name: tools.dense(sana.transformer.get_submodule(name)).weight.data for name in names}
        state, changes = kinds.adapter(EVERY[kind], weights, 1)
        load = lambda name: sana.load_lora_weights(dict(state), adapter_name=name)  # noqa: E731
        check(sana.transformer, changes, load, 5e-3)


@pytest.mark.parametrize("quantized", [False, True])
def test_dora(sdxl, sana, quantized):
    """At strength 1, which is what its lengths are for."""
    pipe, model = (sana, sana.transformer) if quantized else (sdxl, sdxl.unet)
    names = [n for n, m in quantized_layers(model).items() if isinstance(m, SVDQuantConv2d)][:2] if quantized else SDXL
    with torch.no_grad():
        layers = {name: model.get_submodule(name) for name in names}
        weights = {n: (tools.dense(layer) if quantized else layer).weight.data for n, layer in layers.items()}
        state, changes = kinds.adapter(kinds.row_dora, weights, 1, "lora_unet_")
        load = lambda name: pipe.load_lora_weights(dict(state), adapter_name=name)  # noqa: E731
        check(model, changes, load, 1e-3, (1.0,))


def test_quantized_ones_merged(sana):
    model = copy.deepcopy(sana.transformer)
    name = next(name for name, m in quantized_layers(model).items() if isinstance(m, SVDQuantConv2d))
    weight = tools.dense(model.get_submodule(name)).weight.data
    state, changes = kinds.adapter(kinds.oft, {name: weight}, 1, "transformer.")
    sana_copy = copy.copy(sana)
    sana_copy.transformer = model
    sana_copy.register_modules(transformer=model)
    sana_copy.load_lora_weights(state, adapter_name="style")
    report = MergeReport("", "", {})
    merge_into(model, report)
    meant = tools.dense(model.get_submodule(name)).weight.data
    error = tools.relative(meant, weight + changes[name])
    assert error == pytest.approx(report.errors[name], rel=1e-3) and error < 0.5 * tools.relative(weight, meant)


def test_wrong_shapes(sdxl):
    name = SDXL[0]
    weight = sdxl.unet.get_submodule(name).weight.data
    stem = f"lora_unet_{name.replace('.', '_')}"
    for kind, said in (
        (kinds.loha, r"is for a weight of \[60, 576\], which does not fit the convolution's \[64, 64, 3, 3\]"),
        (kinds.difference, r"has the shape \[60, 64, 3, 3\]"),
        (kinds.glora, r"do not fit .*conv1 \[64, 576\]"),
    ):
        state, _ = kinds.adapter(kind, {name: weight[:60]}, 1, "lora_unet_")
        with pytest.raises(SVDQuantError, match=said):
            sdxl.load_lora_weights(state, adapter_name="bad")
    state, _ = kinds.adapter(kinds.peft_oft, {name: weight[:, :, 0, 0].repeat(1, 2)}, 1, "lora_unet_")
    with pytest.raises(SVDQuantError, match=rf"{stem} is for 128 inputs, and the layer has 64"):
        sdxl.load_lora_weights(state, adapter_name="bad")
    assert sdxl.get_list_adapters() in ({}, {"unet": []})
