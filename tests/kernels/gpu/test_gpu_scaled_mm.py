"""torch's fp8 product with the branch as further columns, against float64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import truth

from svdquant.kernels.gpu.arch import Arch
from svdquant.kernels.gpu.scaled_mm import ScaledMM, operands
from svdquant.kernels.gpu.types import Epilogue, HeadNorm, Reading

BRAIN = torch.bfloat16


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(11)


def layer_and_input(generator, tokens, n, k, batch=1, **spec):
    t = truth.random_layer(generator, n, k, **spec)
    return t, truth.quantized_input(truth.random_input(generator, batch, tokens, k), t, Reading("fp8"))


def product(q, layers):
    """float64 [M, N] of the operands that torch is given."""
    codes, row_scales, weight, scales, bias = operands(q, layers)
    y = codes.float().double() @ weight.float().double().T * row_scales.double()[:, None] * scales.double()
    return y if bias is None else y + bias.double()


def branch(q, t):
    return q.low.double() @ t.proj_up.double().T


@pytest.mark.parametrize(
    "rank, up, down", [(16, 1, 1), (32, 1e-3, 1), (48, 30, 1), (32, 1e3, 1e-3), (32, 1e-3, 1e3), (80, 1, 1)]
)
def test_branch_in_columns(generator, rank, up, down):
    """The branch keeps the exactness of bfloat16, alone and beside weights, however it is scaled."""
    t, q = layer_and_input(generator, 9, 32, 64, rank=rank, bias=False)
    t.proj_up = t.proj_up * up
    q.low.mul_(down)
    q.low.zero_()
    rest = product(q, [t])
    q.low.copy_(truth.random_input(generator, 1, 9, rank)[0] * down)
    whole = product(q, [t])
    wanted = branch(q, t)
    assert (whole - rest - wanted).norm() < 2e-3 * wanted.norm() + 3e-4 * rest.norm()


@pytest.mark.parametrize(
    "tokens, n, k, spec",
    [
        (1, 32, 64, {}),
        (17, 48, 320, {"rank": 48, "unsigned": ((64, 320),)}),
        (5, 32, 144, {"weights": "nvfp4", "outer_blocks": 3}),
        (5, 32, 128, {"weights": "int8", "rank": 0}),
        (130, 32, 192, {"rank": 0, "bias": False}),
    ],
)
def test_layers(generator, tokens, n, k, spec):
    t, q = layer_and_input(generator, tokens, n, k, **spec)
    out = torch.full((1, tokens, n), float("nan"), dtype=BRAIN)
    ScaledMM().multiply(q, [t], out)
    # 3 % is what e4m3 weights cost.
    assert truth.relative_error(out[0], truth.output(q, t)) < 0.03
    assert truth.relative_error(out[0], product(q, [t])) < 5e-3


def test_stack_strides_and_gelu(generator):
    layers = [truth.random_layer(generator, n, 64) for n in (32, 16)]
    layers[1].smooth_factor, layers[1].proj_down = layers[0].smooth_factor, layers[0].proj_down
    q = truth.quantized_input(truth.random_input(generator, 2, 5, 64), layers[0], Reading("fp8"))
    memory = torch.full((2, 9, 64), float("nan"), dtype=BRAIN)
    out = memory[:, 2:7, 8:56]
    ScaledMM().multiply(q, layers, out, Epilogue(gelu=True))
    wanted = torch.cat([truth.output(q, t, gelu=True) for t in layers], 1).unflatten(0, (2, 5))
    assert truth.relative_error(out, wanted) < 0.03
    assert torch.isnan(memory).sum() == memory.numel() - out.numel()


def test_rows_do_not_scale_others(generator):
    """Operands of a row, unlike torch's sums, do not depend on the other rows."""
    t, q = layer_and_input(generator, 20, 32, 64)
    part = type(q)(q.reading, 1, 3, q.codes[4:7].clone(), q.scales[4:7].clone(), q.low[4:7].clone())
    for a, b in zip(operands(part, [t])[:2], operands(q, [t])[:2], strict=True):
        assert torch.equal(a.float(), b[4:7].float())


def test_refusals(generator):
    hopper = Arch("nvidia", 90)
    t = truth.random_layer(generator, 32, 64)
    assert ScaledMM().why_not(t, "fp8", BRAIN, hopper) is None
    assert "bfloat16" in ScaledMM().why_not(t, "fp8", torch.float16, hopper)
    assert "fp8" in ScaledMM().why_not(t, "int8", BRAIN, hopper)
    assert "multiple of 16" in ScaledMM().why_not(truth.random_layer(generator, 40, 64), "fp8", BRAIN, hopper)
    assert not ScaledMM().fuses(Epilogue(norm=HeadNorm((None,), 1e-6, 64)), [t])
