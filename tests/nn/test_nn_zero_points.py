"""Zero points, outer scales per block of columns, and biases that a cast must not touch."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import reference64
import torch
from torch import nn

from svdquant import LayerSpec, W4A16Linear
from svdquant.checkpoint.layout import spec_is_sound
from svdquant.nn import SVDQuantLinear, make_layer
from svdquant.numerics import SVDQuantTensors, quantize_weight


def w4a16(n, k, group, dtype, bias=True, seed=0):
    """(record, dense float64 weight) of random codes, scales and zero points."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (n, k), generator=g, dtype=torch.uint8)
    scales = (torch.rand(n, k // group, generator=g) * 0.02 + 0.001).to(dtype)
    zeros = (-7.3 * scales.float() + 0.003 * torch.randn(scales.shape, generator=g)).to(dtype)
    spec = LayerSpec("w4a16", group_size=group, rank=0, smooth=False, zeros=True)
    b = torch.randn(n, generator=g).to(dtype) if bias else None
    record = SVDQuantTensors(spec, k, codes[:, ::2] | codes[:, 1::2] << 4, scales, wzeros=zeros, bias=b)
    repeat = [t.double().numpy().repeat(group, 1) for t in (scales, zeros)]
    return record, codes.numpy() * repeat[0] + repeat[1]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 6e-3), (torch.float16, 1e-3), (torch.float32, 1e-6)])
@pytest.mark.parametrize("rows", [0, 1, 3, 17])
@pytest.mark.parametrize(("n", "k", "group"), [(12, 128, 64), (36, 384, 128), (8, 640, 64)])
def test_weights_with_zero_points(n, k, group, rows, dtype, tolerance):
    record, weight = w4a16(n, k, group, dtype)
    layer = make_layer(nn.Linear(k, n, device="meta", dtype=dtype), record)
    assert isinstance(layer, W4A16Linear) and layer.wzeros is not None
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = layer(x)
    assert y.shape == (rows, n) and y.dtype == dtype
    if rows:
        expected = x.double().numpy() @ weight.T + record.bias.double().numpy()
        assert reference64.relative(y.double().numpy(), expected) < tolerance
    dense, _ = layer.tensors().dense()
    assert np.allclose(dense.numpy(), weight, rtol=1e-5, atol=1e-7)


def test_gradient_and_compile_with_zero_points():
    record, weight = w4a16(12, 128, 64, torch.float32)
    layer = make_layer(nn.Linear(128, 12, device="meta"), record)
    x = torch.randn(5, 128, requires_grad=True)
    layer(x).sum().backward()
    assert np.allclose(x.grad.numpy(), weight.sum(0)[None].repeat(5, 0), rtol=1e-4, atol=1e-5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x.detach()), layer(x))


def test_a_cast_keeps_zero_points_and_the_bias():
    record, _ = w4a16(12, 128, 64, torch.bfloat16)
    record.bias = record.bias.float() + 1e-4
    layer = make_layer(nn.Linear(128, 12, device="meta", dtype=torch.bfloat16), record)
    before = {name: p.clone() for name, p in layer.named_parameters()}
    for dtype in (torch.float16, torch.float32, torch.bfloat16):
        layer.to(dtype)
        assert layer.weight.dtype == layer.compute_dtype == dtype
        for name, p in layer.named_parameters():
            assert p.dtype == before[name].dtype and torch.equal(p, before[name]), name
    assert copy.deepcopy(layer).weight.dtype == torch.bfloat16


def test_a_layer_without_bias_follows_a_cast():
    """Its scales do not, so nothing but the layer itself can say what the model computes in."""
    record, _ = w4a16(12, 128, 64, torch.bfloat16, bias=False)
    layer = make_layer(nn.Linear(128, 12, bias=False, device="meta", dtype=torch.bfloat16), record)
    assert layer.float().weight.dtype == torch.float32 and layer.wscales.dtype == torch.bfloat16
    assert layer(torch.randn(2, 128)).dtype == torch.float32


@pytest.mark.parametrize("blocks", [2, 3, 6])
def test_outer_scales_per_block_of_columns(blocks):
    k, n = 192 * 2, 24
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(blocks))
    values, wscales, _ = quantize_weight(weight, "nvfp4", 16, torch.float32)
    outer = torch.rand(n, blocks) + 0.5
    from svdquant.numerics import FORMATS

    spec = LayerSpec(weights="nvfp4", group_size=16, rank=0, smooth=False, outer_blocks=blocks)
    record = SVDQuantTensors(spec, k, FORMATS["nvfp4"].pack(values), wscales, wcscales=outer)
    expected = values.double().numpy() * wscales.double().numpy().repeat(16, 1)
    expected *= outer.double().numpy().repeat(k // blocks, 1)
    assert np.allclose(record.dense()[0].numpy(), expected, rtol=1e-6)
    layer = SVDQuantLinear.from_tensors(record)
    layer.activations = "none"
    x = torch.randn(5, k)
    assert reference64.relative(layer(x).numpy(), x.double().numpy() @ expected.T) < 1e-6


@pytest.mark.parametrize(
    "fields",
    [
        {"zeros": True},
        {"kind": "w4a16", "weights": "int8", "group_size": 0, "zeros": True},
        {"outer_blocks": 2},
        {"weights": "nvfp4", "group_size": 16, "outer_blocks": 0},
        {"rank": 2000},
        {"rank": True},
    ],
)
def test_specs_that_cannot_be(fields):
    with pytest.raises(ValueError):
        spec_is_sound(LayerSpec(**fields))
