"""Dynamic quantization of activations, per token, and the rotation."""

import numpy as np
import pytest
import reference64
import torch

from svdquant.config import LayerSpec
from svdquant.kernels import reference
from svdquant.numerics import GELU_SHIFT, int4, int8, nvfp4
from svdquant.numerics.hadamard import rotate

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [64, 100, 130, 320, 384])
@pytest.mark.parametrize("activations", ["int4", "int8", "fp8", "nvfp4"])
def test_activations_equal_the_second_implementation(activations, k, dtype):
    h = gaussian(32, k, seed=k) * torch.logspace(-3, 3, 32)[:, None]
    actual = reference.quantize_activation(h, LayerSpec(weights="int8", group_size=0), activations, dtype)
    group = {"int4": 64, "nvfp4": 16}.get(activations, 0)
    rounded = reference64.own_type(h.double().numpy(), activations, dtype)
    codes, scales = reference64.quantize_activation(rounded, activations, group, None, dtype)
    expected = (codes * scales).reshape(32, -1)[:, :k]
    assert actual.shape == h.shape
    differs = ~np.isclose(actual.double().numpy(), expected, rtol=1e-6, atol=0)
    assert differs.mean() < 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
def test_unsigned_int4(dtype):
    h = torch.nn.functional.gelu(gaussian(16, 256)) + GELU_SHIFT
    assert float(h.min()) >= 0
    unsigned = torch.tensor([True, False, True, False])
    actual = int4.fake_quantize_activation(h, 64, unsigned, dtype)
    codes, scales = reference64.quantize_activation(h.double().numpy(), "int4", 64, unsigned.numpy(), dtype)
    assert codes[:, 0].max() == 15 and codes[:, 0].min() >= 0 and codes[:, 1].max() == 7
    assert (~np.isclose(actual.double().numpy(), (codes * scales).reshape(16, -1), rtol=1e-6, atol=0)).mean() < 1e-3
    # Twice the codes for the same range: half the error.
    signed = int4.fake_quantize_activation(h, 64, None, dtype)
    ratio = (actual - h)[:, :64].norm() / (signed - h)[:, :64].norm()
    assert float(ratio) == pytest.approx(7 / 15, rel=0.1)


def test_gelu_never_falls_below_the_shift():
    x = torch.linspace(-3, 0, 100001, dtype=torch.float64)
    assert float(torch.nn.functional.gelu(x).min()) > -GELU_SHIFT
    assert float(torch.nn.functional.gelu(x, approximate="tanh").min()) > -GELU_SHIFT
    for dtype in DTYPES:
        assert float(torch.tensor(GELU_SHIFT, dtype=dtype)) == GELU_SHIFT == reference64.SHIFT


@pytest.mark.parametrize("activations", ["int4", "int8", "fp8", "nvfp4"])
def test_zero_tokens_stay_zero(activations):
    h = gaussian(4, 128)
    h[1] = 0
    h[2, :64] = 0
    out = reference.quantize_activation(h, LayerSpec(), activations, torch.bfloat16)
    assert bool(torch.isfinite(out).all()) and not out[h == 0].any()


@pytest.mark.parametrize("activations", ["int4", "int8", "fp8", "nvfp4"])
def test_a_token_depends_on_itself_alone(activations):
    h = gaussian(9, 192)
    whole = reference.quantize_activation(h, LayerSpec(), activations, torch.bfloat16)
    h[1:] *= 100
    assert torch.equal(reference.quantize_activation(h, LayerSpec(), activations, torch.bfloat16)[0], whole[0])


def test_nvfp4_activation_scale_saturates_and_underflows():
    h = torch.full((1, 32), 1e-5)
    h[0, 16:] = 1e5
    out = nvfp4.fake_quantize_activation(h)
    assert not out[0, :16].any()
    assert torch.equal(out[0, 16:], torch.full((16,), 448.0 * 6))


def test_int8_activation_by_hand():
    h = torch.tensor([[127.0, -63.4, 0.6, -0.4]])
    assert int8.fake_quantize_activation(h).tolist() == [[127, -63, 1, 0]]


@pytest.mark.parametrize("columns", [128, 384])
def test_rotation_is_scipys_hadamard(columns):
    x = gaussian(5, columns)
    assert reference64.relative(rotate(x), x.double().numpy() @ reference64.rotation(columns)) < 1e-6


def test_rotation_is_orthonormal_and_its_own_inverse():
    matrix = rotate(torch.eye(256, dtype=torch.float64))
    assert torch.allclose(matrix @ matrix.T, torch.eye(256, dtype=torch.float64), atol=1e-14)
    assert torch.equal(matrix, matrix.T)
    assert set((matrix[:128, :128] * 128**0.5).round().flatten().tolist()) == {-1.0, 1.0}
    assert not matrix[:128, 128:].any()
    x = gaussian(2, 3, 256)
    assert torch.allclose(rotate(rotate(x)), x, atol=1e-5)


def test_rotation_gives_a_row_the_same_bits_in_any_company():
    x = gaussian(67, 256)
    whole = rotate(x)
    for i in range(67):
        assert torch.equal(rotate(x[i : i + 1])[0], whole[i])


def test_rotation_spreads_an_outlier():
    x = gaussian(64, 128)
    x[:, 3] *= 50
    error = [
        float((int4.fake_quantize_activation(h, 64, None, torch.bfloat16) - h).norm() / h.norm())
        for h in (x, rotate(x))
    ]
    # One channel dominates the norm, so compare what the other 127 keep.
    plain = int4.fake_quantize_activation(x, 64, None, torch.bfloat16)
    rotated = rotate(int4.fake_quantize_activation(rotate(x), 64, None, torch.bfloat16))
    rest = [c for c in range(64) if c != 3]
    assert float((rotated - x)[:, rest].norm()) < 0.8 * float((plain - x)[:, rest].norm())
    assert all(e < 0.25 for e in error)


def test_unsigned_codes_end_at_zero_and_signed_ones_at_seven():
    h = torch.full((1, 128), -1.0)
    h[0, 0] = h[0, 64] = 15.0
    out = int4.fake_quantize_activation(h, 64, torch.tensor([True, False]), torch.float32)
    assert out[0, :64].tolist() == [15.0] + [0.0] * 63
    scale = 15 / 7
    assert torch.allclose(out[0, 64:], torch.tensor([15.0] + [round(-1 / scale) * scale] * 63))
