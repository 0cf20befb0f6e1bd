"""The operations between products in Triton's interpreter, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

import truth

from svdquant.kernels.gpu.elementwise import gate_add, norm_modulate, norm_rotate, specializations
from svdquant.kernels.gpu.types import HeadNorm

BF16, FP16 = torch.bfloat16, torch.float16
# One rounding to the type of the result.
BOUND = {BF16: 2.0**-8, FP16: 2.0**-11}


@pytest.fixture
def g():
    return torch.Generator().manual_seed(0)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    error = (actual.double() - expected).abs()
    assert (error <= BOUND[actual.dtype] * expected.abs() * 1.01 + 1e-5).all()


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(("batch", "tokens", "k", "rows"), [(2, 5, 320, 2), (1, 1, 3072, 1), (3, 4, 100, 1)])
def test_norm_modulate(g, dtype, batch, tokens, k, rows):
    x = truth.random_input(g, batch, tokens, k + 9, dtype)[..., 9:]
    factor, offset = (torch.randn(rows, 2 * k, generator=g)[:, i * k : (i + 1) * k] for i in range(2))
    expected = F.layer_norm(x.double(), (k,), eps=1e-6) * factor.double()[:, None] + offset.double()[:, None]
    y = norm_modulate(x, factor, offset, 1e-6)
    assert y.is_contiguous() and y.dtype == dtype
    close(y, expected)
    wide = torch.zeros(batch, tokens, k + 4, dtype=dtype)
    assert torch.equal(norm_modulate(x, factor, offset, 1e-6, out=wide[..., 4:]), y)
    assert torch.equal(wide[..., 4:], y) and not wide[..., :4].any()


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(("heads", "d"), [(3, 128), (24, 64), (2, 80)])
@pytest.mark.parametrize("rotary", [False, True])
def test_norm_rotate(g, dtype, heads, d, rotary):
    batch, tokens = 2, 3
    storage = torch.randn(batch, tokens, 3 * heads * d, generator=g).to(dtype)
    x = storage[..., heads * d : 2 * heads * d].unflatten(-1, (heads, d))
    weight = torch.rand(d, generator=g).to(dtype) if rotary else None
    cosine, sine = (torch.randn(tokens, d, generator=g) if rotary else None for _ in range(2))
    norm = HeadNorm((weight,), 1e-5, d, cosine, sine)
    expected = truth.head_norm(x.flatten(-2), norm, [heads * d]).unflatten(-1, (heads, d))
    out = torch.zeros(batch, heads, tokens, d, dtype=dtype).transpose(1, 2)
    norm_rotate(x, weight, 1e-5, cosine, sine, out)
    close(out, expected)
    before = storage.clone()
    norm_rotate(x, weight, 1e-5, cosine, sine, x)
    assert torch.equal(x, out)
    assert torch.equal(storage[..., : heads * d], before[..., : heads * d])


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(("batch", "rows", "k"), [(2, 2, 320), (2, 1, 1100)])
def test_gate_add(g, dtype, batch, rows, k):
    residual, x = (torch.randn(batch, 5, k + 8, generator=g).to(dtype)[..., :k] for _ in range(2))
    gate = torch.randn(rows, k, generator=g)
    expected = residual.double() + gate.double()[:, None] * x.double()
    out = torch.zeros_like(x)
    gate_add(residual, gate, x, out)
    # Terms that cancel leave float32's error of the larger.
    assert (out.double() - expected).abs().max() <= BOUND[dtype] * expected.abs().max() + 1e-5
    assert truth.relative_error(out, expected) < BOUND[dtype]
    for target in (residual.clone(), x.clone()):
        r = target if torch.equal(target, residual) else residual
        v = target if torch.equal(target, x) else x
        gate_add(r, gate, v, target)
        assert torch.equal(target, out)


def test_gate_add_limits_float16(g):
    residual = torch.tensor([60000.0, -60000.0, float("nan"), 1.0]).to(FP16).view(1, 1, 4)
    gate = torch.tensor([[1.0, 1.0, 1.0, float("inf")]])
    out = torch.empty_like(residual)
    gate_add(residual, gate, residual, out)
    assert out[0, 0, 0] == 65504 and out[0, 0, 1] == -65504
    assert out[0, 0, 2].isnan() and out[0, 0, 3] == 65504


def test_rows_do_not_depend_on_the_batch(g):
    x = truth.random_input(g, 2, 9, 256)
    factor, offset = torch.randn(2, 256, generator=g), torch.randn(2, 256, generator=g)
    whole = norm_modulate(x, factor, offset, 1e-6)
    assert torch.equal(norm_modulate(x[1:, 7:8], factor[1:], offset[1:], 1e-6), whole[1:, 7:8])


def test_nothing():
    x = torch.empty(2, 0, 64, dtype=BF16)
    ones = torch.ones(1, 64)
    assert norm_modulate(x, ones, ones, 1e-6).shape == x.shape
    gate_add(x, ones, x, x)
    norm_rotate(x.unflatten(-1, (2, 32)), None, 1e-6, None, None, x.unflatten(-1, (2, 32)))


def test_specializations_name_every_argument():
    for s in specializations():
        assert set(s.signature) | set(s.constants) == set(s.kernel.arg_names)
        assert not set(s.signature) & set(s.constants)
