"""Whole weights: scales, padding, and the error that DESIGN.md promises."""

import numpy as np
import pytest
import reference64
import torch

from svdquant.config import LayerSpec
from svdquant.kernels import reference
from svdquant.numerics import (
    FORMATS,
    SVDQuantTensors,
    dequantize_weight,
    effective_scales,
    groups_of,
    pad_columns,
    padded_columns,
    quantize_weight,
    relative_error,
)

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
GROUPS = {"int4": 64, "nvfp4": 16, "int8": 0}


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def record(weight, weights, group, dtype=torch.bfloat16, **spec):
    """Rounded to nearest, packed, without a branch."""
    spec = LayerSpec(weights=weights, group_size=group, rank=0, smooth=False, **spec)
    padded = torch.nn.functional.pad(weight, (0, padded_columns(weight.shape[1], spec) - weight.shape[1]))
    values, wscales, wcscales = quantize_weight(padded, weights, group, dtype)
    return SVDQuantTensors(spec, weight.shape[1], FORMATS[weights].pack(values), wscales, wcscales)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(1, 64), (7, 100), (33, 130), (65, 320), (128, 384)])
@pytest.mark.parametrize("weights", ["int4", "nvfp4", "int8"])
def test_weights_equal_the_second_implementation(weights, n, k, dtype):
    group = GROUPS[weights]
    weight = pad_columns(gaussian(n, k, seed=n + k) * torch.logspace(-2, 1, n)[:, None], group)
    values, wscales, wcscales = quantize_weight(weight, weights, group, dtype)
    expected, scales, outer = reference64.quantize_weight(weight.double().numpy(), weights, group, dtype)
    np.testing.assert_array_equal(reference64.array(wscales), scales)
    assert wscales.dtype == (torch.float8_e4m3fn if weights == "nvfp4" else dtype)
    assert (wcscales is None) == (weights != "nvfp4")
    if wcscales is not None:
        assert wcscales.dtype == dtype and wcscales.shape == (n,)
        np.testing.assert_array_equal(reference64.array(wcscales), outer)
    # A value at a rounding boundary may go either way; there must be next to none.
    assert (values.numpy() != expected).mean() < 1e-3

    packed = FORMATS[weights].pack(values)
    back = dequantize_weight(packed, wscales, wcscales, weights, torch.float32)
    mean = np.repeat(scales, weight.shape[1] // scales.shape[1], 1) * (1 if outer is None else outer[:, None])
    assert reference64.relative(back, values.double().numpy() * mean) < 1e-6


@pytest.mark.parametrize("weights", ["int4", "nvfp4", "int8"])
def test_zero_groups_and_a_zero_weight(weights):
    weight = gaussian(4, 128)
    weight[1, :64] = 0
    weight[2] = 0
    for w in (weight, torch.zeros(3, 128)):
        values, wscales, wcscales = quantize_weight(w, weights, GROUPS[weights], torch.bfloat16)
        scales = effective_scales(wscales, wcscales)
        assert bool((scales != 0).all()) and bool(torch.isfinite(values).all())
        back = dequantize_weight(FORMATS[weights].pack(values), wscales, wcscales, weights, torch.float32)
        assert torch.equal(back == 0, (w == 0) | (values == 0))
        assert not back[w == 0].any()


def test_a_zero_int4_group_has_scale_one():
    _, wscales, _ = quantize_weight(torch.zeros(2, 128), "int4", 64, torch.bfloat16)
    assert torch.equal(wscales, torch.ones(2, 2, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("factor", [1e-20, 1e-6, 1.0, 1e4, 1e20])
def test_nvfp4_outer_scale_absorbs_any_magnitude(factor, dtype):
    """The outer scale brings the largest group to 448, so the relative error does not depend on the magnitude."""
    weight = gaussian(16, 128)
    plain = record(weight, "nvfp4", 16, dtype).residual()
    scaled = record(weight * factor, "nvfp4", 16, dtype).residual()
    error = relative_error(scaled, weight * factor)
    assert error == pytest.approx(relative_error(plain, weight), rel=0.05)
    assert 0.07 < error < 0.12


def test_nvfp4_tiny_group_beside_a_huge_one():
    weight = gaussian(2, 64)
    weight[:, :16] *= 1e8
    back = record(weight, "nvfp4", 16).residual()
    assert bool(torch.isfinite(back).all())
    assert relative_error(back[:, :16], weight[:, :16]) < 0.12
    # The smallest e4m3 scale is all that is left for the others: they become zero.
    assert not back[:, 16:].any()


def test_nvfp4_largest_scale_is_448():
    _, wscales, wcscales = quantize_weight(gaussian(8, 64), "nvfp4", 16, torch.float32)
    assert float(wscales.float().max()) == 448
    assert torch.equal(wcscales, wcscales[:1].expand(8))


@pytest.mark.parametrize(
    ("weights", "group", "rotate", "k", "columns", "scales"),
    [
        ("int4", 64, False, 64, 64, 1),
        ("int4", 64, False, 100, 128, 2),
        ("int4", 64, False, 130, 192, 3),
        ("int4", 64, True, 130, 256, 4),
        ("int4", 128, False, 130, 256, 2),
        ("int4", 32, True, 64, 128, 4),
        ("nvfp4", 16, False, 100, 112, 7),
        ("nvfp4", 16, True, 100, 128, 8),
        ("int8", 0, False, 131, 131, 1),
        ("int8", 0, True, 131, 256, 1),
        ("int8", 64, False, 131, 192, 3),
    ],
)
def test_stored_columns(weights, group, rotate, k, columns, scales):
    spec = LayerSpec(weights=weights, group_size=group, rotate=rotate)
    assert padded_columns(k, spec) == columns
    assert groups_of(k, spec) == scales


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("weights", ["int4", "nvfp4", "int8"])
@pytest.mark.parametrize("k", [64, 100, 130, 320, 384])
def test_dense_meaning(k, weights, rotate):
    spec = LayerSpec(weights=weights, group_size=GROUPS[weights], rank=9, rotate=rotate, unsigned=((0, 64),))
    tensors = reference64.random_tensors(spec, k, 37, True, torch.bfloat16, seed=k)
    weight, bias = tensors.dense()
    expected_weight, expected_bias = reference64.layer(tensors).dense()
    assert weight.shape == (37, k) and weight.dtype == bias.dtype == torch.float32
    assert reference64.relative(weight, expected_weight) < 1e-6
    assert reference64.relative(bias, expected_bias) < 1e-6
    assert tensors.nbytes() == sum(t.numel() * t.element_size() for t in tensors.named().values())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("weights", "activations", "expected"),
    [
        # DESIGN.md, numbers that matter: round to nearest on Gaussian data.
        ("int4", "int4", 0.141),
        ("int4", "int8", 0.0925),
        ("int4", "none", 0.0925),
        # An e2m1 grid with a scale per 16: near 0.095 on each side.
        ("nvfp4", "nvfp4", 0.134),
        ("nvfp4", "none", 0.095),
        # max|w| of 512 values is 3.0-3.5 σ: a step of 0.025 σ on each side, /√12.
        ("int8", "int8", 0.0105),
        # e4m3 has 3 bits of mantissa: about 2⁻⁴/√3 · ¾.
        ("int8", "fp8", 0.0274),
    ],
)
def test_error_on_gaussian_data(weights, activations, expected, dtype):
    weight, x = gaussian(256, 512), gaussian(256, 512, seed=1)
    tensors = record(weight, weights, GROUPS[weights], dtype)
    h = reference.quantize_activation(x, tensors.spec, activations, dtype)
    assert relative_error(h @ tensors.residual().T, x @ weight.T) == pytest.approx(expected, rel=0.04)


def test_relative_error():
    assert relative_error(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 0.0])) == pytest.approx(4 / 3)
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0


def test_sixteen_codes_lose_less_than_the_published_fifteen():
    """Groups of 64, max|w|/7 and −7…7 against the signed step; no weight moves by more than half a step."""
    weight = gaussian(512, 3072)
    groups = weight.double().numpy().reshape(512, -1, 64)
    scale = np.abs(groups).max(-1, keepdims=True) / 7
    published = reference64.relative(np.clip(np.rint(groups / scale), -7, 7) * scale, groups)
    t = record(weight, "int4", 64, torch.float32)
    moved = np.abs(t.residual().double().numpy() - weight.double().numpy()).reshape(groups.shape)
    ours = float(np.linalg.norm(moved) / np.linalg.norm(groups))
    assert published == pytest.approx(0.1078, abs=2e-4) and ours == pytest.approx(0.0927, abs=2e-4)
    assert (moved <= 0.5001 * np.abs(reference64.array(t.wscales))[..., None]).all()
