"""Exports of every family: what a file says, read by index formulas in float64 and by diffusers' own loader.

`nunchaku_lite` is loaded and run by stock diffusers, its two kernels written in float64 (`stock_lite`); `nunchaku` is
read by `nunchaku_files`. What a format cannot hold is named with its error, or refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import family_pipelines
import numpy as np
import nunchaku64
import nunchaku_files as files
import pytest
import reference64
import standins
import stock_lite
import tiny
import tiny_text
import torch
from diffusers import CosmosTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import svdquant
from svdquant import SVDQuantError
from svdquant.integrations.convert import ConvertReport, convert
from svdquant.nn import quantized_layers

WEIGHTS = "diffusion_pytorch_model.safetensors"
GROUPS = {"int4": 64, "nvfp4": 16}
LITE = [
    ("flux_dev", "int4"), ("flux_dev", "nvfp4"), ("flux2_klein", "int4"), ("flux2_klein", "nvfp4"),
    ("sd35_medium", "int4"), ("pixart_sigma", "nvfp4"), ("sdxl", "int4"), ("qwen_image", "nvfp4"), ("wan", "int4"),
    ("wan_i2v", "nvfp4"), ("ltx", "int4"), ("ltx2", "nvfp4"), ("hunyuan_video", "int4"), ("sana", "int4"),
]  # fmt: skip
# That model takes what precedes 512 tokens of text for the picture.
CALLS = {"wan_i2v": {"max_sequence_length": 512}}


def quantized(pipe: Any, name: str, calibrated: bool = True, **config: Any) -> tuple[str, Any]:
    """(component, its quantized model) of a miniature pipeline in bfloat16, calibrated by drawing with it."""
    pipe.to(torch.bfloat16)
    part, model = next(iter(family_pipelines.denoisers(pipe).items()))
    settings = tiny.config(**({"rotate": False, "smooth": 2, "gptq": False, "calibration_rows": 32} | config))
    svdquant.quantize(model, settings, (lambda _: draw(name, pipe)) if calibrated else None)
    return part, model


def draw(name: str, pipe: Any) -> np.ndarray:
    return family_pipelines.draw(name, pipe, **CALLS.get(name, {}))


def meaning(layer: Any) -> tuple[np.ndarray, np.ndarray]:
    """Float64 weight and bias of a layer, in 16 bits or quantized."""
    if hasattr(layer, "tensors"):
        record = layer.tensors()
        if record.spec.weights == "int8":
            return record.dense()[0].double().numpy(), np.zeros(record.out_features)
        return reference64.layer(record).dense()
    bias = np.zeros(layer.weight.shape[0]) if layer.bias is None else layer.bias.detach().double().numpy()
    return layer.weight.detach().flatten(1).double().numpy(), bias


def changed(report: ConvertReport) -> dict[str, float]:
    return {name: e for change in report.changes if change.what == "layer" for name, e in change.errors.items()}


def leaves(tensors: dict[str, Tensor], layer: str) -> dict[str, Tensor]:
    found = {name: t for name, t in tensors.items() if name.rpartition(".")[0] == layer}
    return {name.rpartition(".")[2]: t for name, t in found.items()}


def check_layout(layer: dict[str, Tensor], n: int, k: int, kind: str, precision: str, rank: int, bias: bool) -> None:
    """Names, shapes and types as the layout of stock diffusers has them."""
    half = torch.bfloat16
    if kind == "awq_w4a16":
        wanted = {"qweight": ((n // 4, k // 2), torch.int32)}
        wanted |= dict.fromkeys(("wscales", "wzeros"), ((k // 64, n), half))
    else:
        scale = half if precision == "int4" else torch.float8_e4m3fn
        wanted = {"qweight": ((n, k // 2), torch.int8), "wscales": ((k // GROUPS[precision], n), scale)}
        wanted |= {"smooth_factor": ((k,), half), "proj_down": ((k, rank), half), "proj_up": ((n, rank), half)}
        if precision == "nvfp4":
            wanted |= {"wcscales": ((n,), half), "wtscale": ((1,), half)}
    wanted |= {"bias": ((n,), half)} if bias else {}
    assert {leaf: (tuple(t.shape), t.dtype) for leaf, t in layer.items()} == wanted


@pytest.mark.parametrize(("name", "precision"), LITE)
def test_stock_diffusers_reads_and_draws(name: str, precision: str, tmp_path: Path) -> None:
    pipe = family_pipelines.PIPELINES[name]()
    part, model = quantized(pipe, name, weights=precision, text_kv="int8")
    dense = type(model).from_config({k: v for k, v in model.config.items() if k != "quantization_config"})
    report = convert(svdquant.save_model(model, tmp_path / "ours"), tmp_path / "lite", "nunchaku_lite")
    written, tensors = (
        json.loads((tmp_path / "lite" / "config.json").read_text()),
        load_file(tmp_path / "lite" / WEIGHTS),
    )
    method = written.pop("quantization_config")
    assert method["quant_method"] == "nunchaku_lite" and method["compute_dtype"] == "bfloat16"
    assert written["_class_name"] == type(model).__name__
    sections = {key: method[key] for key in ("svdq_w4a4", "awq_w4a16") if key in method}
    assert sections["svdq_w4a4"]["precision"] == precision
    assert all(entry["group_size"] == GROUPS[entry["precision"]] for entry in sections.values())
    kind_of = {target: key for key, entry in sections.items() for target in entry["targets"]}
    sent_back = {n for c in report.changes if c.after == "16 bits" for n in c.errors}
    assert set(kind_of) == set(quantized_layers(model)) - sent_back and len(kind_of) == report.layers > 0
    errors = changed(report)
    for target, kind in kind_of.items():
        original, layer = dense.get_submodule(target), leaves(tensors, target)
        n, k = original.weight.shape
        check_layout(layer, n, k, kind, precision, sections["svdq_w4a4"]["rank"], original.bias is not None)
        read = nunchaku64.dense_awq(layer, n, k, 64) if kind == "awq_w4a16" else nunchaku64.dense_w4a4(layer, n, k)
        weight, bias = meaning(model.get_submodule(target))
        # An int4 layer that is kept is kept to the bit; the report says what the others lost.
        error = reference64.relative(read[0], weight)
        assert error == pytest.approx(errors[target], rel=5e-3) if target in errors else error < 1e-6, target
        if read[1] is not None and target not in errors:
            assert np.abs(read[1] - bias).max() <= 2.0**-7 * max(np.abs(bias).max(), 1.0), target
    with stock_lite.stock_lite() as kernels:
        stock = stock_lite.load(tmp_path / "lite", type(model), torch.float32)
        assert set(stock.state_dict()) == set(tensors)
        ours = svdquant.set_activations(svdquant.load_model(tmp_path / "lite", torch_dtype=torch.float32), "none")
        pictures = []
        for each in (ours, stock):
            pipe.register_modules(**{part: each})
            for module in pipe.components.values():
                if isinstance(module, nn.Module) and module is not each:
                    module.float()
            pictures.append(draw(name, pipe))
    assert kernels.calls["w4a4"] >= len(sections["svdq_w4a4"]["targets"])
    assert reference64.relative(pictures[1], pictures[0]) < 1e-4 and np.ptp(pictures[0]) > 0


NUNCHAKU = {
    "flux": ("flux_dev", lambda: standins.flux(guidance=True)),
    "sana": ("sana", lambda: standins.sana(odd=True)),
    "sdxl": ("sdxl", standins.sdxl),
    "qwen": ("qwen_image", standins.qwen_image),
    "zimage": ("z_image", standins.z_image),
}


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
@pytest.mark.parametrize("family", NUNCHAKU)
def test_nunchaku_files_mean_what_was_quantized(family: str, precision: str, tmp_path: Path) -> None:
    """Calibrated as by default, but for the rotation; text keys and values in 8 bits where the model has any."""
    name, make = NUNCHAKU[family]
    _, model = quantized(make(), name, weights=precision, text_kv="int8")
    meant = {n: meaning(m) for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    layers, stored = quantized_layers(model), "int4" if family == "sdxl" else precision
    report = convert(svdquant.save_model(model, tmp_path / "ours"), tmp_path / "n.safetensors", "nunchaku")
    with safe_open(tmp_path / "n.safetensors", "pt") as file:
        info = {key: file.metadata()[key] for key in ("config", "quantization_config", "model_class")}
    config = {k: v for k, v in json.loads(info["config"]).items() if not k.startswith("_")}
    assert json.loads(info["quantization_config"]) | {"skip_refiners": False} == (
        files.quantization(stored, tiny.RANK) | {"skip_refiners": False}
    )
    assert info["model_class"] == files.MODEL_CLASS[family]
    tensors = load_file(tmp_path / "n.safetensors")
    state = files.stock_state(family, tensors, config, stored)
    errors = changed(report)
    # All of an SDXL becomes int4.
    assert bool(set(layers) - set(errors)) == (stored == precision)
    for layer, (weight, bias) in meant.items():
        read = state[f"{layer}.weight"].reshape(weight.shape)
        error = reference64.relative(read, weight)
        assert error == pytest.approx(errors[layer], rel=5e-3) if layer in errors else error < 1e-6, layer
        if f"{layer}.bias" in state and layer not in errors:
            # A modulation's has its 1 in it, another's the shift.
            off = np.abs(state[f"{layer}.bias"] - bias).max()
            assert off <= 2.0**-7 * max(np.abs(bias).max(), 1.0), layer
    if family == "sdxl":
        (kept,) = [c for c in report.changes if c.before == "W8A16 in whole rows" or "int8" in c.before]
        assert kept.after == "16 bits" and "Nunchaku keeps them in 16 bits" in kept.why
        assert all(n.endswith(("attn2.to_k", "attn2.to_v")) for n in kept.errors) and kept.worst[1] < 2.0**-8


def test_sana_of_5600_hidden_channels(tmp_path: Path) -> None:
    """No multiple of 64 or 128: a Nunchaku file fills it up, one of diffusers keeps it in 16 bits."""
    config = files.CONFIGS["sana"] | {"mlp_ratio": 5600 / 128, "num_layers": 1}
    with tiny._seeded(0):
        model = files.stock("sana", config).to(torch.bfloat16)
    svdquant.quantize(model, tiny.config(rotate=False))
    point = "transformer_blocks.0.ff.conv_point"
    weight, _ = meaning(model.get_submodule(point))
    assert weight.shape == (128, 5600)
    ours = svdquant.save_model(model, tmp_path / "ours")
    report = convert(ours, tmp_path / "n.safetensors", "nunchaku")
    layer = leaves(load_file(tmp_path / "n.safetensors"), "transformer_blocks.0.ff.point_conv")
    assert (
        layer["qweight"].shape == (128, 5632 // 2)
        and layer["wscales"].shape == (88, 128)
        and point not in changed(report)
    )
    read, _ = nunchaku64.dense_w4a4(layer, 128, 5600)
    assert reference64.relative(read, weight) < 1e-6
    # The runtime multiplies what fills the inputs up as well: it has to be zero.
    filled, _ = nunchaku64.dense_w4a4(layer, 128, 5632)
    assert not filled[:, 5600:].any()
    lite = convert(ours, tmp_path / "lite", "nunchaku_lite")
    (kept,) = [c for c in lite.changes if point in c.errors]
    assert kept.after == "16 bits" and "convolutions" in kept.why and kept.errors[point] < 2.0**-8


def cosmos() -> CosmosTransformer3DModel:
    """Its feed-forward follows a GELU and has no bias."""
    with tiny._seeded(0):
        return CosmosTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=64, num_layers=1,
            text_embed_dim=64, adaln_lora_dim=64, max_size=(4, 16, 16), concat_padding_mask=False,
            extra_pos_embed_type=None,
        ).eval()  # fmt: skip


def run_cosmos(model: Any) -> Tensor:
    make = {"generator": torch.Generator().manual_seed(1)}
    inputs = {
        "hidden_states": torch.randn(1, 4, 1, 8, 8, **make),
        "encoder_hidden_states": torch.randn(1, 8, 64, **make),
    }
    with torch.no_grad():
        inputs = {name: value.to(model.dtype) for name, value in inputs.items()}
        return model(timestep=torch.full((1,), 0.5, dtype=model.dtype), fps=16, return_dict=False, **inputs)[0]


@pytest.mark.parametrize("rank", [0, 16])
def test_shifted_layers_whose_stock_class_has_no_bias(rank: int, tmp_path: Path) -> None:
    """What holds the shift is zero once that is taken out: nothing is lost. Every layer has a branch there."""
    model = cosmos().to(torch.bfloat16)
    svdquant.quantize(model, tiny.config(rotate=False, rank=rank, gptq=False, smooth=2), run_cosmos)
    down = "transformer_blocks.0.ff.net.2"
    assert model.get_submodule(down).spec.unsigned and model.get_submodule(down).bias is not None
    meant = meaning(model.get_submodule(down))[0]
    report = convert(svdquant.save_model(model, tmp_path / "ours"), tmp_path / "lite", "nunchaku_lite")
    tensors = load_file(tmp_path / "lite" / WEIGHTS)
    layer = leaves(tensors, down)
    assert "bias" not in layer and layer["proj_down"].shape == (512, 16) and not report.losses
    assert reference64.relative(nunchaku64.dense_w4a4(layer, 128, 512)[0], meant) < 1e-6
    with stock_lite.stock_lite():
        stock = stock_lite.load(tmp_path / "lite", type(model), torch.float32)
        theirs = run_cosmos(stock)
    ours = run_cosmos(
        svdquant.set_activations(svdquant.load_model(tmp_path / "lite", torch_dtype=torch.float32), "none")
    )
    assert reference64.relative(theirs, ours) < 1e-5


def test_a_bias_that_diffusers_has_no_place_for(tmp_path: Path) -> None:
    """As an adapter with differences of biases leaves it."""
    model = cosmos().to(torch.bfloat16)
    svdquant.quantize(model, tiny.config(rotate=False))
    up = model.transformer_blocks[0].ff.net[0].proj
    up.bias = nn.Parameter(torch.full((512,), 0.5, dtype=torch.bfloat16), requires_grad=False)
    with pytest.raises(SVDQuantError, match=r"transformer_blocks\.0\.ff\.net\.0\.proj has a bias"):
        svdquant.save_model(model, tmp_path / "lite", format="nunchaku_lite")
    assert not (tmp_path / "lite").exists()


def test_text_keys_in_8_bits_are_refused_by_name(tmp_path: Path) -> None:
    _, model = quantized(family_pipelines.PIPELINES["sdxl"](), "sdxl", text_kv="int8")
    for format, path in (("nunchaku_lite", tmp_path / "lite"), ("nunchaku", tmp_path / "n.safetensors")):
        with pytest.raises(SVDQuantError, match=r"attn2\.to_[kv] .*`svdquant convert`"):
            svdquant.save_model(model, path, format=format)
        assert not path.exists()


@pytest.mark.parametrize("name", ["CLIPTextModel", "Gemma2Model", "Qwen3Model"])
def test_text_encoders_that_nunchaku_does_not_have(name: str, tmp_path: Path) -> None:
    """A file says that it is a T5: of anything else it would be another model."""
    model = tiny_text.text_encoder(name, dtype=torch.bfloat16)
    svdquant.quantize(model, tiny.config(rank=0, smooth=False, activations="none"))
    cls = type(model).__name__
    with pytest.raises(SVDQuantError, match=f"Nunchaku has no {cls}"):
        svdquant.save_model(model, tmp_path / "t.safetensors", format="nunchaku")
    ours = svdquant.save_model(model, tmp_path / "ours")
    with pytest.raises(SVDQuantError, match=f"Nunchaku has no {cls}; convert it to svdquant"):
        convert(ours, tmp_path / "t.safetensors", "nunchaku")
    with pytest.raises(SVDQuantError, match=f"no {cls}; convert it to svdquant"):
        convert(ours, tmp_path / "lite", "nunchaku_lite")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours"]


def test_a_t5_of_weights_only(tmp_path: Path) -> None:
    """Ours has groups of 64, Nunchaku's text encoders 128."""
    model = standins.t5().to(torch.bfloat16)
    svdquant.quantize(model, tiny.config(rank=0, smooth=False, activations="none"))
    layers = quantized_layers(model)
    assert {layer.spec.kind for layer in layers.values()} == {"w4a16"}
    report = convert(svdquant.save_model(model, tmp_path / "ours"), tmp_path / "t5.safetensors", "nunchaku")
    tensors, errors = load_file(tmp_path / "t5.safetensors"), changed(report)
    assert set(errors) == set(layers)
    for name, layer in layers.items():
        n, k = layer.out_features, layer.in_features
        stored = leaves(tensors, name)
        assert stored["qweight"].shape == (n // 4, k) and stored["qweight"].dtype == torch.int16
        assert stored["scales"].shape == stored["scaled_zeros"].shape == (8, n)
        read, _ = nunchaku64.dense_awq(stored, n, k, 128)
        assert reference64.relative(read, meaning(layer)[0]) == pytest.approx(errors[name], rel=5e-3)
