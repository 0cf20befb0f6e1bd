"""Layers and inputs that the compiled products must hand on, refuse, or read with care."""

from __future__ import annotations

import cpu_truth
import pytest
import torch
from cpu_truth import BF16, FP32

from svdquant.errors import SVDQuantError
from svdquant.kernels import reference, svdquant_linear, w4a16_linear

native = pytest.mark.skipif(cpu_truth.PATHS == ["dequantize"], reason="no code of ours reads memory there")


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize(("weights", "bits"), [("int4", 4), ("int8", 8)])
@pytest.mark.parametrize("group", [16, 32, 48, 64, 96, 128, 160, 192, 256, 320, 384])
@pytest.mark.parametrize("rows", [1, 7])
def test_weight_only_groups_of_any_size(path, weights, bits, group, rows):
    generator = torch.Generator().manual_seed(group)
    k, n = 960 * group // 32, 24
    codes = torch.randint(-7, 8, (n, k), generator=generator).float()
    wscales = torch.rand(n, k // group, generator=generator) + 0.1
    packed = codes.to(torch.int8)
    if bits == 4:
        nibbles = packed.view(torch.uint8) & 15
        packed = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
    x = torch.randn(rows, k, generator=generator)
    dense = codes.double() * wscales.double().repeat_interleave(group, 1)
    assert error(w4a16_linear(x, packed, wscales, None, weights), x.double() @ dense.T) < 1e-5


@pytest.mark.parametrize("kind", ["linear", "weights only"])
def test_subnormal_scales_where_subnormals_are_flushed(path, kind):
    """e4m3 scales below 2^-6 are subnormal there and must not pass through a subnormal float32."""
    t = cpu_truth.layer(128, 40, dtype=FP32, weights="nvfp4", rank=0, smooth=False)
    t.wscales = (torch.arange(1, 8).repeat(t.wscales.numel())[: t.wscales.numel()] * 2.0**-9).view_as(t.wscales.float())
    t.wscales = t.wscales.to(torch.float8_e4m3fn)
    t.wcscales = torch.ones_like(t.wcscales)
    x = cpu_truth.inputs(5, 128, FP32)
    if kind == "weights only":
        expected = reference.w4a16_linear(x, t.qweight, t.wscales, "nvfp4", t.bias, FP32)
    else:
        expected = reference.svdquant_linear(x, t, "int8", FP32)
    try:
        if not torch.set_flush_denormal(True):
            pytest.skip("this processor does not flush")
        if kind == "weights only":
            y = w4a16_linear(x, t.qweight, t.wscales, t.bias, "nvfp4")
        else:
            y = svdquant_linear(x, t, "int8")
    finally:
        torch.set_flush_denormal(False)
    assert error(y, expected) < 1e-3


def test_a_rank_beyond_what_is_stored(path):
    t = cpu_truth.layer(64, 16, dtype=FP32, rank=1100)
    x = cpu_truth.inputs(3, 64, FP32)
    assert error(svdquant_linear(x, t, "int8"), reference.svdquant_linear(x, t, "int8", FP32)) < 1e-3


@native
@pytest.mark.parametrize("name", ["bias", "wscales", "smooth_factor", "proj_down", "proj_up"])
def test_a_tensor_that_is_not_in_memory(path, name):
    t = cpu_truth.layer(128, 32, dtype=BF16)
    setattr(t, name, getattr(t, name).to("meta"))
    with pytest.raises(SVDQuantError, match="not in memory"):
        svdquant_linear(cpu_truth.inputs(3, 128, BF16), t, "int8")


@pytest.mark.parametrize("name", ["proj_up", "bias"])
@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.float64])
def test_parts_that_are_converted_at_every_call(path, name, dtype):
    """A converted copy dies with its call; nothing may remember its address."""
    t = cpu_truth.layer(128, 32, dtype=FP32)
    setattr(t, name, getattr(t, name).to(dtype))
    x = cpu_truth.inputs(3, 128, FP32)
    expected = reference.svdquant_linear(x, t, "int8", FP32)
    for _ in range(4):
        rubbish = [torch.full((n,), 1e6) for n in (32, 1024, 4096)]
        assert error(svdquant_linear(x, t, "int8"), expected) < 1e-3
        del rubbish


def test_inputs_that_are_views_of_something_else(path):
    t = cpu_truth.layer(128, 32, dtype=FP32)
    x = cpu_truth.inputs(4, 128, FP32)
    assert error(svdquant_linear(torch._neg_view(-x), t, "int8"), svdquant_linear(x, t, "int8")) < 1e-6
    zeros = torch._efficientzerotensor((4, 128))
    assert error(svdquant_linear(zeros, t, "int8"), svdquant_linear(torch.zeros(4, 128), t, "int8")) < 1e-6


def test_out_that_overlaps(path):
    t = cpu_truth.layer(64, 64, dtype=FP32)
    x = cpu_truth.inputs(6, 64, FP32)
    expected = svdquant_linear(x.clone(), t, "int8")
    both = x.clone()
    assert torch.equal(svdquant_linear(both, t, "int8", out=both), expected)
    version = expected._version
    svdquant_linear(x, t, "int8", out=expected)
    assert expected._version > version
    with pytest.raises(SVDQuantError, match="out is"):
        svdquant_linear(x, t, "int8", out=torch.empty(5, 64))


def test_weights_only_of_another_width(path):
    from svdquant.config import LayerSpec
    from svdquant.nn import W4A16Linear

    layer = W4A16Linear(128, 16, spec=LayerSpec(kind="w4a16", rank=0, smooth=False))
    with pytest.raises(SVDQuantError, match="100 features, the layer takes 128"):
        layer(torch.zeros(1, 100, dtype=BF16))
