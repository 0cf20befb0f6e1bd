"""Stored weights as 8-bit ones: what rounding costs, that nothing clips, stacks, and the bias of shifted inputs."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import truth

from svdquant.kernels.gpu import unpack
from svdquant.kernels.gpu.expand import effective_bias, expand
from svdquant.numerics import effective_scales

HALF, BRAIN = torch.float16, torch.bfloat16
LAYERS = [
    {"k": 192},
    {"k": 192, "group": 16},
    {"k": 192, "group": 48},
    {"k": 144, "weights": "nvfp4"},
    {"k": 288, "weights": "nvfp4", "outer_blocks": 3},
    {"k": 160, "weights": "int8", "group": 32},
    {"k": 100, "weights": "int8"},
    {"k": 96, "rotate": True},
]


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(3)


def values(e):
    return e.weight.float().double() * e.scales.double()[:, None]


@pytest.mark.parametrize("dtype", [HALF, BRAIN])
@pytest.mark.parametrize("precision, bound", [("int8", 0.01), ("fp8", 0.03)])
@pytest.mark.parametrize("spec", LAYERS)
def test_close_to_stored(generator, spec, precision, bound, dtype):
    t = truth.random_layer(generator, 37, dtype=dtype, **spec)
    exact = truth.weight(t)
    e = expand([t], precision)
    assert e.weight.dtype == (torch.int8 if precision == "int8" else torch.float8_e4m3fn)
    assert e.weight.shape == (37, -(-exact.shape[1] // 128) * 128)
    assert truth.relative_error(values(e)[:, : exact.shape[1]], exact) < bound
    assert not e.weight.float()[:, exact.shape[1] :].any()


@pytest.mark.parametrize("weights", ["int4", "nvfp4"])
def test_int8_codes(generator, weights):
    """The documented formula, for all codes and scales of every size."""
    t = truth.random_layer(generator, 40, 256, weights)
    if weights == "int4":
        t.wscales = torch.exp2(torch.rand(t.wscales.shape, generator=generator) * 20 - 20).to(BRAIN)
    e = expand([t], "int8")
    scales = effective_scales(t.wscales, t.wcscales)
    top = scales.amax(1, keepdim=True)
    limit = torch.tensor(unpack.TOP[weights, "int8"], dtype=torch.float32)
    ratio = (scales * (limit / top)).half()
    codes = truth.nibbles(t.qweight)
    code = (truth.INT4 if weights == "int4" else truth.E2M1)[codes].float()
    wanted = (code * ratio.float().repeat_interleave(256 // scales.shape[1], 1)).round()
    assert torch.equal(e.weight.float(), wanted)
    assert torch.equal(e.scales, (top / limit).flatten())
    assert wanted.abs().max() <= 127


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_the_lowest_code_does_not_clip(generator, precision):
    t = truth.random_layer(generator, 20, 128)
    t.qweight.fill_(0x88)
    assert truth.relative_error(values(expand([t], precision)), truth.weight(t)) < 0.03
    t.wscales.fill_(0.01)
    assert truth.relative_error(values(expand([t], precision)), truth.weight(t)) < 1e-6


def test_scales_of_zero(generator):
    t = truth.random_layer(generator, 8, 128)
    t.wscales[:3] = 0
    t.wscales[4, 1] = 0
    e = expand([t], "int8")
    assert torch.isfinite(e.scales).all()
    assert not e.weight[:3].any() and not e.weight[4, 64:].any()
    assert truth.relative_error(values(e), truth.weight(t)) < 0.01


@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("weights", ["int4", "nvfp4", "int8"])
def test_stacks(generator, weights, precision):
    layers = [truth.random_layer(generator, n, 192, weights, rank=33, bias=n != 5) for n in (33, 5, 20)]
    stack = expand(layers, precision)
    alone = [expand([t], precision) for t in layers]
    assert torch.equal(stack.weight.view(torch.int8), torch.cat([e.weight.view(torch.int8) for e in alone]))
    assert torch.equal(stack.scales, torch.cat([e.scales for e in alone]))
    assert torch.equal(stack.up, torch.cat([t.proj_up for t in layers]))
    biases = [torch.zeros(5) if t.bias is None else t.bias.float() for t in layers]
    assert torch.equal(stack.bias, torch.cat(biases))


def test_rows_of_int8_are_not_copied(generator):
    t = truth.random_layer(generator, 16, 256, "int8")
    e = expand([t], "int8")
    assert e.weight.data_ptr() == t.qweight.data_ptr()
    assert e.bias is t.bias and e.up is t.proj_up
    assert truth.relative_error(values(e), truth.weight(t)) == 0
    odd = truth.random_layer(generator, 16, 192, "int8")
    assert torch.equal(expand([odd], "int8").weight[:, :192], odd.qweight)


@pytest.mark.parametrize(
    "spec",
    [
        {"unsigned": ((64, 320),)},
        {"unsigned": ((0, 64), (192, 320)), "smooth": False, "bias": False},
        {"unsigned": ((16, 320),), "weights": "nvfp4"},
        {"unsigned": ((0, 320),), "weights": "int8"},
        {"unsigned": (), "bias": False},
    ],
)
def test_bias_of_shifted_inputs(generator, spec):
    t = truth.random_layer(generator, 21, 320, **spec)
    shift = truth.shift_of(t).double()
    shift = shift if t.smooth_factor is None else shift / t.smooth_factor.double()
    wanted = truth.weight(t)[:, :320] @ shift + (0 if t.bias is None else t.bias.double())
    assert torch.allclose(effective_bias(t).double(), wanted, rtol=1e-6, atol=1e-7)
    if t.bias is not None or t.spec.unsigned:
        assert torch.equal(expand([t], "int8").bias.float(), effective_bias(t))


def test_refused(generator):
    with pytest.raises(ValueError, match="groups of 24"):
        expand([truth.random_layer(generator, 8, 96, group=24)], "int8")
