"""Conversions: bit for bit where the format holds the numbers, else with the error that an independent reader finds."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import nunchaku64
import nunchaku_files as files
import pytest
import reference64
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import svdquant
from svdquant import LayerSpec, SVDQuantError
from svdquant.integrations.convert import ConvertReport, convert
from svdquant.nn import quantized_layers
from svdquant.ptq import requantize

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def contents(family: str, precision: str = "int4", half: torch.dtype = BF16, **options: Any) -> dict[str, Tensor]:
    """A random file whose informational factors are those in use, as most published ones have them."""
    # Writers fill up the groups of a text encoder; those of the other models come in multiples.
    tensors = files.make(family, files.CONFIGS[family], precision, half, padded_groups=family == "t5", **options)
    return tensors | {n: tensors[n.removesuffix("_orig")] for n in tensors if n.endswith("_orig")}


def write(path: Path, family: str, tensors: Mapping[str, Tensor], precision: str = "int4", **options: Any) -> Path:
    skip = options.get("skip_refiners", False)
    return files.write_single(path, tensors, files.metadata(family, files.CONFIGS[family], precision, 16, skip))


def differing(left: Path, right: Path) -> set[str]:
    """Names of the tensors that two files do not share bit for bit."""
    a, b = load_file(left), load_file(right)
    return {
        name
        for name in a.keys() | b.keys()
        if name not in a
        or name not in b
        or (a[name].dtype, a[name].shape) != (b[name].dtype, b[name].shape)
        or not torch.equal(a[name].view(-1).view(torch.uint8), b[name].view(-1).view(torch.uint8))
    }


def change(report: ConvertReport, part: str) -> Any:
    """The only change whose sentence contains `part`."""
    (found,) = [c for c in report.changes if part in c.sentence()]
    return found


def stock(family: str, config: str = "") -> Any:
    """The 16-bit class as the library initialises it; what that leaves unset is zero."""
    with tiny._seeded(0):
        model = files.stock(family, files.CONFIGS[config or family])
    for name, parameter in model.named_parameters():
        if name.endswith("pad_token"):
            torch.nn.init.zeros_(parameter)
    return model


def quantized(path: Path, model: Any, dtype: torch.dtype = BF16, **config: Any) -> Path:
    """A model of 128 channels, quantized data-free, on disk."""
    model = model.to(dtype)
    svdquant.quantize(model, tiny.config(**config))
    return svdquant.save_model(model, path)


def meanings(path: Path) -> dict[str, np.ndarray]:
    """Float64 weight of each linear and 1×1 convolution, quantized or not."""
    model = svdquant.load_model(path)
    out = {}
    for name, module in model.named_modules():
        if hasattr(module, "tensors"):
            out[name] = reference64.layer(module.tensors()).dense()[0]
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            out[name] = module.weight.detach().flatten(1).double().numpy()
    return out


def errors(after: Path, before: Path) -> dict[str, float]:
    new, old = meanings(after), meanings(before)
    return {name: reference64.relative(new[name], old[name]) for name in old}


def agree(reported: Mapping[str, float], found: Mapping[str, float]) -> None:
    for name, error in reported.items():
        assert error == pytest.approx(found[name], rel=2e-3, abs=1e-9), name


# What every format holds.


@pytest.mark.parametrize(
    ("family", "precision", "half", "options"),
    [
        ("flux", "int4", BF16, {}),
        ("flux", "nvfp4", BF16, {}),
        ("flux", "nvfp4", FP16, {"outer": "wcscales"}),
        ("qwen", "int4", FP16, {}),
        ("qwen", "nvfp4", BF16, {}),
        ("sdxl", "int4", BF16, {}),
        ("zimage", "int4", BF16, {}),
        ("zimage", "nvfp4", FP16, {"skip_refiners": True}),
        ("sana", "int4", FP16, {}),
        ("sana", "nvfp4", BF16, {"out_bias": False}),
        ("t5", "int4", BF16, {}),
        ("t5", "int4", FP16, {"linears": ("q", "k", "v", "o")}),
    ],
)
@pytest.mark.parametrize("container", ["file", "folder"])
def test_nunchaku_to_svdquant_and_back(
    tmp_path: Path, family: str, precision: str, half: torch.dtype, options: dict[str, Any], container: str
) -> None:
    source = write(
        tmp_path / "source.safetensors", family, contents(family, precision, half, **options), precision, **options
    )
    ours = tmp_path / ("ours.safetensors" if container == "file" else "ours")
    there = convert(source, ours, "svdquant")
    back = convert(ours, tmp_path / "back.safetensors", "nunchaku")
    assert there.exact and back.exact and not there.changes and not there.remarks and not back.remarks
    # 320 hidden channels of SANA are stored as 384, and what fills them up means nothing. T5's embedding has two names.
    moved = differing(source, tmp_path / "back.safetensors")
    assert all(".ff.point_conv." in name or name == "encoder.embed_tokens.weight" for name in moved), sorted(moved)
    if family == "sana":
        tensors, again = load_file(source), load_file(tmp_path / "back.safetensors")
        for name in (n for n in tensors if n.endswith("point_conv.qweight")):
            layer = {
                leaf: name.replace("qweight", leaf) for leaf in ("qweight", "wscales", "smooth", "lora_down", "lora_up")
            }
            layer |= {
                leaf: name.replace("qweight", leaf)
                for leaf in ("wtscale", "bias")
                if name.replace("qweight", leaf) in tensors
            }
            a, b = ({leaf: t[full] for leaf, full in layer.items()} for t in (tensors, again))
            assert np.array_equal(nunchaku64.dense_w4a4(a, 128, 320)[0], nunchaku64.dense_w4a4(b, 128, 320)[0])


@pytest.mark.parametrize(("precision", "half"), [("int4", BF16), ("nvfp4", BF16), ("nvfp4", FP16)])
def test_lite_to_svdquant_and_back(tmp_path: Path, precision: str, half: torch.dtype) -> None:
    tensors = files.make("flux_lite", files.CONFIGS["flux"], precision, half)
    config = files.CONFIGS["flux"]
    if precision == "nvfp4":
        # Both outer scales are stored, one of them ones.
        tensors |= {n: torch.ones_like(t) for n, t in tensors.items() if n.endswith("wtscale")}
    source = files.write_lite(tmp_path / "source", tensors, config, precision, 16)
    assert convert(source, tmp_path / "ours", "svdquant").exact
    assert convert(tmp_path / "ours", tmp_path / "back", "nunchaku_lite").exact
    file = "diffusion_pytorch_model.safetensors"
    assert {n for n in differing(source / file, tmp_path / "back" / file) if not n.endswith("wtscale")} == set()


@pytest.mark.parametrize("family", ["flux", "qwen"])
def test_nunchaku_and_lite_hold_the_same_nvfp4(tmp_path: Path, family: str) -> None:
    """But for the second rank that FLUX' cut layers bring into a format that does not cut them."""
    tensors = contents(family, "nvfp4", outer="wtscale")
    source = write(tmp_path / "source.safetensors", family, tensors, "nvfp4")
    there = convert(source, tmp_path / "lite", "nunchaku_lite")
    back = convert(tmp_path / "lite", tmp_path / "back.safetensors", "nunchaku")
    # The bias of a modulation is stored with a 1 in one format and without in the other, in 16 bits.
    assert all("bias" in c.sentence() for c in there.changes) and not back.changes
    assert all("modulation" in sentence for sentence in back.losses)
    if family == "flux":
        assert any("20 layers are filled up with zeros to rank 32" in remark for remark in there.remarks)
    found = errors(tmp_path / "back.safetensors", source)
    assert len(found) > 20 and set(found.values()) == {0.0}


def test_blocks_alone(tmp_path: Path) -> None:
    config = files.CONFIGS["flux"]
    tensors = contents("flux")
    source = files.write_blocks(tmp_path / "source.safetensors", tensors)
    base = files.write_base(tmp_path / "base", "flux", config, files.random_state("flux", config, 1))
    with pytest.raises(SVDQuantError, match="base"):
        convert(source, tmp_path / "ours", "svdquant")
    assert convert(source, tmp_path / "ours", "svdquant", base=base).exact
    assert convert(tmp_path / "ours", tmp_path / "back.safetensors", "nunchaku", blocks_only=True).exact
    assert differing(source, tmp_path / "back.safetensors") == set()
    wide = {name: a + 2.0**-20 for name, a in files.random_state("flux", config, 1).items()}
    other = files.write_base(tmp_path / "wide", "flux", config, wide)
    file = other / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: torch.from_numpy(a).float() for name, a in wide.items()}, file, {"format": "pt"})
    lost = convert(source, tmp_path / "rounded", "svdquant", base=other)
    plain = [name for name in wide if not name.startswith(("transformer_blocks.", "single_transformer_blocks."))]
    assert not lost.exact and lost.losses[0].startswith(f"{len(plain)} tensors of another type")
    report = convert(tmp_path / "ours", tmp_path / "folder", "nunchaku")
    assert report.exact and differing(source, tmp_path / "folder" / "transformer_blocks.safetensors") == set()


def test_a_converted_model_computes_the_same(tmp_path: Path) -> None:
    source = quantized(tmp_path / "ours", tiny.transformer(), rotate=False)
    convert(source, tmp_path / "n.safetensors", "nunchaku")
    convert(tmp_path / "n.safetensors", tmp_path / "back", "svdquant")
    models = [svdquant.load_model(tmp_path / name, torch_dtype=FP32) for name in ("ours", "n.safetensors", "back")]
    ours, theirs, back = (tiny.run(svdquant.set_activations(model, "none")) for model in models)
    assert torch.equal(theirs, back)
    # Only biases of the modulations were rounded, to 8 bits of 1 + b.
    assert 0 < reference64.relative(theirs, ours) < 0.01


def test_lite_computes_the_same(tmp_path: Path) -> None:
    """With nvfp4 and 128 channels nothing is lost on the way there and back."""
    source = quantized(tmp_path / "ours", tiny.transformer(), weights="nvfp4")
    assert convert(source, tmp_path / "lite", "nunchaku_lite").exact
    assert convert(tmp_path / "lite", tmp_path / "back.safetensors", "svdquant").exact
    models = [svdquant.load_model(tmp_path / name, torch_dtype=FP32) for name in ("ours", "lite", "back.safetensors")]
    ours, lite, back = (tiny.run(svdquant.set_activations(model, "none")) for model in models)
    assert torch.equal(ours, lite) and torch.equal(ours, back)


# What is requantized, and at what cost.


@pytest.mark.parametrize("half", [BF16, FP16])
def test_int4_to_nvfp4_and_back(tmp_path: Path, half: torch.dtype) -> None:
    """Against codes, scales and errors that are computed from the file's bytes in float64."""
    tensors = contents("qwen", "int4", half)
    source = write(tmp_path / "source.safetensors", "qwen", tensors)
    report = convert(source, tmp_path / "nvfp4.safetensors", "nunchaku", weights="nvfp4")
    made = load_file(tmp_path / "nvfp4.safetensors")
    only = change(report, "int4 in groups of 64 → nvfp4 in groups of 16")
    assert report.changes == [only] and only.count == 24 and "--weights nvfp4" in only.why and not report.exact
    found = {}
    for name in ("attn.to_out.0", "img_mlp.net.0.proj", "img_mlp.net.2"):
        full = f"transformer_blocks.0.{name}"
        n, k = files.shapes("qwen", files.CONFIGS["qwen"])[f"{full}.weight"]
        old, new = (
            {leaf.removeprefix(f"{full}."): t for leaf, t in all_.items() if leaf.startswith(f"{full}.")}
            for all_ in (tensors, made)
        )
        residual = nunchaku64.w4a4_residual(old, n, k)
        values, scales, outer = reference64.quantize_weight(residual, "nvfp4", 16, half)
        wanted = values * np.repeat(scales, 16, 1) * outer[:, None]
        assert reference64.relative(nunchaku64.w4a4_residual(new, n, k), wanted) < 1e-3
        (before, b), (after, c) = (
            nunchaku64.dense_w4a4(old, n, k, name == "img_mlp.net.2"),
            nunchaku64.dense_w4a4(new, n, k),
        )
        found[full] = reference64.relative(after, before)
        assert np.abs(b - c).max() < 2.0 ** (-7 if half == BF16 else -10) * np.abs(b).max()
    agree({name: only.errors[name] for name in found}, found)
    assert 0.03 < only.mean_error < 0.12 and only.worst[1] < 0.15
    again = convert(tmp_path / "nvfp4.safetensors", tmp_path / "int4", "svdquant", weights="int4")
    second = change(again, "nvfp4 in groups of 16 → int4 in groups of 64")
    agree(second.errors, errors(tmp_path / "int4", tmp_path / "nvfp4.safetensors"))
    assert 0.03 < second.mean_error < 0.12
    # What follows a GELU is unsigned again, as it is in an int4 file.
    specs = {name: layer.spec for name, layer in quantized_layers(svdquant.load_model(tmp_path / "int4")).items()}
    assert {name for name, spec in specs.items() if spec.unsigned} == {
        f"transformer_blocks.{i}.{stream}_mlp.net.2" for i in range(2) for stream in ("img", "txt")
    }


@pytest.mark.parametrize("to", ["nunchaku", "nunchaku_lite"])
def test_rotated_layers(tmp_path: Path, to: str) -> None:
    source = quantized(tmp_path / "ours", tiny.transformer())
    out = tmp_path / ("n.safetensors" if to == "nunchaku" else "n")
    report = convert(source, out, to)
    only = change(report, "no published format holds a rotation")
    assert report.changes == [only] and only.count == 14 and not report.exact
    found = errors(out, source)
    agree(only.errors, found)
    assert 0.05 < only.mean_error < 0.12
    assert all(error == 0 for name, error in found.items() if name not in only.errors)


def test_groups_and_int8(tmp_path: Path) -> None:
    """Groups of 128 are two of 64 with one scale; of 32 or a whole row they are not."""
    flux = quantized(
        tmp_path / "ours",
        tiny.transformer(),
        rotate=False,
        overrides={
            "*.attn.to_q": {"group_size": 128},
            "*.attn.to_out.0": {"group_size": 32},
            "*.ff.net.0.proj": {"weights": "int8"},
        },
    )
    report = convert(flux, tmp_path / "lite", "nunchaku_lite")
    found = errors(tmp_path / "lite", flux)
    changed = {name: error for c in report.changes for name, error in c.errors.items()}
    agree(changed, found)
    block = "transformer_blocks.0."
    assert set(changed) == {f"{block}attn.to_out.0", f"{block}ff.net.0.proj"}
    assert all(0.02 < error < 0.12 for error in changed.values())
    assert all(error == 0 for name, error in found.items() if name not in changed)
    assert "nunchaku_lite has no int8" in change(report, "int8 in whole rows").why


def test_several_outer_scales_per_row(tmp_path: Path) -> None:
    source = write(tmp_path / "source.safetensors", "flux", contents("flux", "nvfp4", outer="wcscales"), "nvfp4")
    assert convert(source, tmp_path / "ours", "svdquant").exact
    report = convert(tmp_path / "ours", tmp_path / "lite", "nunchaku_lite")
    only = change(report, "one outer scale per row")
    assert set(only.errors) == {f"single_transformer_blocks.{i}.proj_out" for i in range(2)}
    made, held = (
        svdquant.load_model(tmp_path / name).get_submodule(only.worst[0]).tensors() for name in ("lite", "ours")
    )
    blocks = np.repeat(held.wcscales.double().numpy(), 128, 1)
    exact = reference64.layer(replace(held, wcscales=None)).residual * blocks
    exact = exact / held.smooth_factor.double().numpy() + (held.proj_up.double() @ held.proj_down.double()).numpy()
    assert only.worst[1] == pytest.approx(reference64.relative(reference64.layer(made).dense()[0], exact), rel=2e-3)
    assert 0.005 < only.worst[1] < 0.06


def test_members_that_are_not_alike(tmp_path: Path) -> None:
    """One linear of the file from a 16-bit and two quantized ones, and one from two that are smoothed differently."""
    model = tiny.transformer().to(BF16)
    svdquant.quantize(model, tiny.config(skip=["transformer_blocks.0.attn.to_k"], rotate=False), lambda m: tiny.run(m))
    odd = model.transformer_blocks[0].attn.add_v_proj
    with torch.no_grad():
        odd.smooth_factor.mul_(2)
    svdquant.save_model(model, tmp_path / "ours")
    report = convert(tmp_path / "ours", tmp_path / "n.safetensors", "nunchaku")
    attn = "transformer_blocks.0.attn."
    mixed = [c for c in report.changes if "solved anew" in c.why]
    assert {c.before for c in mixed} == {"16 bits", "int4 in groups of 64"}
    smoothed = change(report, "with one smoothing")
    assert set(smoothed.errors) == {f"{attn}add_{x}_proj" for x in "qkv"}
    changed = {name: error for c in report.changes for name, error in c.errors.items()}
    assert {name for c in mixed for name in c.errors} == {f"{attn}to_{x}" for x in "qkv"}
    agree(changed, errors(tmp_path / "n.safetensors", tmp_path / "ours"))
    assert all(0.03 < error < 0.15 for error in changed.values())
    made = svdquant.load_model(tmp_path / "n.safetensors").transformer_blocks[0].attn
    for names in (("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")):
        records = [getattr(made, name).tensors() for name in names]
        assert all(torch.equal(r.smooth_factor, records[0].smooth_factor) for r in records)
        assert all(torch.equal(r.proj_down, records[0].proj_down) for r in records) and records[0].spec.rank == 16
        # The quantized layers' own smoothing is not thrown away.
        assert float(records[0].smooth_factor.float().std()) > 0.01


def test_layers_that_the_format_keeps_or_needs(tmp_path: Path) -> None:
    source = quantized(tmp_path / "z", stock("zimage"), rotate=False)
    report = convert(source, tmp_path / "z.safetensors", "nunchaku")
    kept = change(report, "Nunchaku keeps them in 16 bits")
    assert kept.before == "W4A16 int4 in groups of 64" and all("adaLN_modulation" in name for name in kept.errors)
    agree(kept.errors, errors(tmp_path / "z.safetensors", source))
    assert 1e-4 < kept.worst[1] < 2.0**-8
    flux = quantized(tmp_path / "f", tiny.transformer(), modulation="none", rotate=False)
    report = convert(flux, tmp_path / "f.safetensors", "nunchaku")
    made = change(report, "16 bits → W4A16 int4 in groups of 64")
    agree(made.errors, errors(tmp_path / "f.safetensors", flux))
    assert made.count == 3 and 0.05 < made.mean_error < 0.15


def test_sdxl_has_no_nvfp4(tmp_path: Path) -> None:
    source = quantized(tmp_path / "u", stock("sdxl"), weights="nvfp4", modulation="none")
    report = convert(source, tmp_path / "u.safetensors", "nunchaku")
    assert "Nunchaku has no nvfp4 UNet2DConditionModel" in change(report, "→ int4 in groups of 64").why
    changed = {name: error for c in report.changes for name, error in c.errors.items()}
    agree(changed, errors(tmp_path / "u.safetensors", source))
    with pytest.raises(SVDQuantError, match="leave out --weights nvfp4"):
        convert(source, tmp_path / "v.safetensors", "nunchaku", weights="nvfp4")


def test_lite_without_convolutions_and_odd_sizes(tmp_path: Path) -> None:
    source = write(tmp_path / "source.safetensors", "sana", contents("sana"))
    report = convert(source, tmp_path / "lite", "nunchaku_lite")
    only = change(report, "no quantized convolutions")
    assert only.count == 4 and 0 < only.worst[1] < 2.0**-8
    agree(only.errors, errors(tmp_path / "lite", source))
    with pytest.raises(SVDQuantError, match="is a convolution"):
        svdquant.save_model(svdquant.load_model(source), tmp_path / "direct", "nunchaku_lite")
    odd = quantized(tmp_path / "odd", stock("sana", "sana_padded"), modulation="none", rotate=False)
    with pytest.raises(SVDQuantError, match="none of the model's quantized layers"):
        convert(odd, tmp_path / "odd-lite", "nunchaku_lite")
    assert not (tmp_path / "odd-lite").exists()


def test_float32_and_dtype(tmp_path: Path) -> None:
    source = quantized(tmp_path / "ours", tiny.transformer(), FP32, rotate=False)
    report = convert(source, tmp_path / "n.safetensors", "nunchaku")
    layers, rest = change(report, "scales and branch in float32 → bfloat16"), change(report, "unquantized tensors")
    found = errors(tmp_path / "n.safetensors", source)
    agree(layers.errors, found)
    assert 2.0**-11 < layers.mean_error < 2.0**-8 and 2.0**-11 < rest.mean_error < 2.0**-8
    narrow = convert(source, tmp_path / "half", "svdquant", dtype="float16")
    assert not narrow.exact and svdquant.load_model(tmp_path / "half").dtype == FP16
    half = quantized(tmp_path / "bf16", tiny.transformer(), rotate=False)
    assert convert(half, tmp_path / "wide", "svdquant", dtype="float32").exact
    assert svdquant.load_model(tmp_path / "wide").dtype == FP32
    with pytest.raises(SVDQuantError, match="float32"):
        convert(half, tmp_path / "x.safetensors", "nunchaku", dtype="float32")
    report = convert(half, tmp_path / "f16.safetensors", "nunchaku", dtype="float16")
    assert {t.dtype for n, t in load_file(tmp_path / "f16.safetensors").items() if t.is_floating_point()} == {FP16}


def test_outer_scales_that_are_products(tmp_path: Path) -> None:
    source = write(tmp_path / "source.safetensors", "qwen", contents("qwen", "nvfp4", outer="both"), "nvfp4")
    assert convert(source, tmp_path / "ours", "svdquant").exact
    report = convert(source, tmp_path / "n.safetensors", "nunchaku")
    only = change(report, "scales in float32 → bfloat16")
    agree(only.errors, errors(tmp_path / "n.safetensors", source))
    assert not report.exact and 2.0**-12 < only.mean_error < 2.0**-8


def test_tensors_wider_than_the_model(tmp_path: Path) -> None:
    tensors = contents("qwen")
    tensors["proj_out.weight"] = torch.randn(tensors["proj_out.weight"].shape)
    tensors["img_in.weight"] = tensors["img_in.weight"].float()
    source = write(tmp_path / "source.safetensors", "qwen", tensors)
    report = convert(source, tmp_path / "ours", "svdquant")
    assert not report.exact and "1 tensors of another type, such as proj_out.weight" in report.losses[0]


def test_text_encoders(tmp_path: Path) -> None:
    source = quantized(tmp_path / "ours", stock("t5"), rotate=False)
    report = convert(source, tmp_path / "t5.safetensors", "nunchaku")
    only = change(report, "→ W4A16 int4 in groups of 128")
    agree(only.errors, errors(tmp_path / "t5.safetensors", source))
    assert 0.03 < only.mean_error < 0.15
    assert {t.dtype for n, t in load_file(tmp_path / "t5.safetensors").items() if n.endswith("qweight")} == {
        torch.int16
    }
    asked = convert(tmp_path / "t5.safetensors", tmp_path / "same", "svdquant", weights="nvfp4")
    assert asked.exact and "--weights nvfp4 changes nothing" in asked.remarks[0]
    with pytest.raises(SVDQuantError, match="nunchaku_lite holds models of diffusers"):
        convert(source, tmp_path / "lite", "nunchaku_lite")


# What is said, and what is refused.


def test_what_is_left_out(tmp_path: Path) -> None:
    tensors = files.make("sana", files.CONFIGS["sana"], pag=True) | {"surprise": torch.zeros(3)}
    source = write(tmp_path / "source.safetensors", "sana", tensors)
    remarks = convert(source, tmp_path / "ours", "svdquant").remarks
    assert any("smooth_orig of 14 layers" in remark for remark in remarks)
    assert any("attn.pag_to_v of 2 blocks" in remark for remark in remarks)
    assert any("surprise" in remark for remark in remarks)


def test_families_that_nunchaku_does_not_have(tmp_path: Path) -> None:
    from diffusers import PixArtTransformer2DModel

    model = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=64, num_layers=1, cross_attention_dim=128, caption_channels=32,
        sample_size=8, in_channels=4, out_channels=8,
    )  # fmt: skip
    source = quantized(tmp_path / "p", model, rotate=False)
    with pytest.raises(SVDQuantError, match="Nunchaku has no PixArtTransformer2DModel"):
        convert(source, tmp_path / "p.safetensors", "nunchaku")
    convert(source, tmp_path / "lite", "nunchaku_lite")
    assert svdquant.checkpoint.inspect(tmp_path / "lite").format == "nunchaku_lite"


def test_a_failed_write_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "source.safetensors", "qwen", contents("qwen"))
    convert(source, tmp_path / "out", "svdquant")
    before = {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()}

    def full(*_args: object, **_kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("svdquant.checkpoint.mapped.StreamedFile.add", full)
    with pytest.raises(SVDQuantError, match="No space left on device"):
        convert(source, tmp_path / "out", "nunchaku_lite", overwrite=True)
    with pytest.raises(SVDQuantError, match="No space left on device"):
        convert(source, tmp_path / "n.safetensors", "nunchaku")
    assert {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()} == before
    assert sorted(f.name for f in tmp_path.iterdir()) == ["out", "source.safetensors"]


def test_replacing_a_folder_leaves_none_of_it(tmp_path: Path) -> None:
    source = write(tmp_path / "source.safetensors", "flux", contents("flux"))
    convert(source, tmp_path / "out", "nunchaku")
    with pytest.raises(SVDQuantError, match="--overwrite"):
        convert(source, tmp_path / "out", "nunchaku_lite")
    convert(source, tmp_path / "out", "nunchaku_lite", overwrite=True)
    assert {f.name for f in (tmp_path / "out").iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    with pytest.raises(SVDQuantError, match="is the input"):
        convert(tmp_path / "out", tmp_path / "out", "svdquant", overwrite=True)
    with pytest.raises(SVDQuantError, match="is the input, or in it"):
        convert(tmp_path / "out", tmp_path / "out" / "new.safetensors", "svdquant")
    with pytest.raises(SVDQuantError, match="holds the input"):
        convert(tmp_path / "out" / "diffusion_pytorch_model.safetensors", tmp_path / "out", "svdquant", overwrite=True)


def test_progress(tmp_path: Path) -> None:
    source = write(tmp_path / "source.safetensors", "qwen", contents("qwen"))
    seen: list[tuple[str, int, int]] = []
    convert(
        source,
        tmp_path / "ours",
        "svdquant",
        progress=lambda stage, done, total, _text: seen.append((stage, done, total)),
    )
    assert [stage for stage, done, total in seen if done == total] == ["load", "convert", "write"]


# One record at a time.


@pytest.mark.parametrize("weights", ["int4", "nvfp4"])
@pytest.mark.parametrize(
    "spec",
    [
        LayerSpec(rotate=True, rank=8),
        LayerSpec(unsigned=((64, 320),), rank=0),
        LayerSpec(group_size=32, smooth=False, rank=8),
        LayerSpec(group_size=32, unsigned=((64, 320),), rank=8),
        LayerSpec("svdquant", "nvfp4", 16, 8),
        LayerSpec("svdquant", "int8", 0, 8),
    ],
    ids=["rotated", "unsigned", "groups of 32", "groups of 32, unsigned", "nvfp4", "int8"],
)
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_requantized_records(spec: LayerSpec, weights: str, dtype: torch.dtype) -> None:
    """320 inputs: no multiple of 128, and in groups of 64 none that was padded for a rotation."""
    old = reference64.random_tensors(spec, 320, 48, True, dtype)
    group = {"int4": 64, "nvfp4": 16}[weights]
    new = requantize.requantize(old, weights, group)
    before, after = reference64.layer(old), reference64.layer(new)
    assert (new.spec.weights, new.spec.group_size, new.spec.rotate) == (weights, group, False)
    assert new.spec.unsigned == (spec.unsigned if weights == "int4" else ())
    assert new.proj_down is old.proj_down and new.smooth_factor is old.smooth_factor
    natural = (before.residual @ reference64.rotation(384) if spec.rotate else before.residual)[:, :320]
    if (weights, group) == (spec.weights, spec.group_size) == ("int4", 64) and not spec.rotate:
        wanted = natural
    else:
        values, scales, outer = reference64.quantize_weight(natural, weights, group, dtype)
        wanted = values * np.repeat(scales, group, 1) * (1 if outer is None else outer[:, None])
    # Codes in the middle between two others may go either way.
    off = np.abs(after.residual[:, :320] - natural) - np.abs(wanted - natural)
    assert np.abs(off).max() < 1e-5 * np.abs(natural).max()
    (weight, bias), (new_weight, new_bias) = before.dense(), after.dense()
    assert requantize.dense_error(new, old) == pytest.approx(
        reference64.relative(new_weight, weight), rel=1e-3, abs=1e-6
    )
    # The bias means what it meant, to the precision of its type.
    scale = max(np.abs(bias).max(), float(new.bias.abs().max()))
    assert np.abs(new_bias - bias).max() < {BF16: 2.0**-8, FP32: 1e-5}[dtype] * scale


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_a_cast_layer_keeps_its_meaning(dtype: torch.dtype) -> None:
    """The bias still takes back what the shift adds to the product, whose factors are other numbers now."""
    old = reference64.random_tensors(LayerSpec(unsigned=((64, 320),), rank=8), 320, 48, True, FP32)
    new = requantize.cast(old, dtype)
    assert {t.dtype for t in new.named().values()} == {dtype, torch.uint8}
    (weight, bias), (new_weight, new_bias) = reference64.layer(old).dense(), reference64.layer(new).dense()
    step = 2.0**-9 if dtype == BF16 else 2.0**-12
    assert 0.1 * step < requantize.dense_error(new, old) < 2 * step
    assert requantize.dense_error(new, old) == pytest.approx(reference64.relative(new_weight, weight), rel=1e-2)
    # Half the distance of neighbours below 1.
    assert np.abs(new.bias.float().numpy()).max() < 1 and np.abs(new_bias - bias).max() < 1.01 * step


def test_the_shift_can_be_put_in() -> None:
    old = reference64.random_tensors(LayerSpec("svdquant", "nvfp4", 16, 8), 320, 48, True, FP32)
    new = requantize.requantize(old, "int4", 64, unsigned=((64, 320),))
    bias, meant = reference64.layer(new).dense()[1], reference64.layer(old).dense()[1]
    assert new.spec.unsigned == ((64, 320),) and np.abs(bias - meant).max() < 1e-5 * np.abs(new.bias.numpy()).max()


def test_casting_refuses_what_does_not_fit() -> None:
    record = reference64.random_tensors(LayerSpec(rank=8), 128, 64, True, FP32)
    record.wscales = record.wscales * 1e9
    with pytest.raises(SVDQuantError, match="wscales that do not fit into float16"):
        requantize.cast(record, FP16)


def test_a_file_of_an_unquantized_model(tmp_path: Path) -> None:
    tiny.transformer().save_pretrained(tmp_path / "dense")
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    for name in ("dense", "other.safetensors"):
        with pytest.raises(SVDQuantError, match="quantize it first"):
            convert(tmp_path / name, tmp_path / "out", "svdquant")
