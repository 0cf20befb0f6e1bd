"""Numbers at the ends of their types, and those that are none."""

from __future__ import annotations

from typing import Any

import cpu_truth
import numpy as np
import pytest
import torch
from cpu_truth import BF16, DTYPES, FP16, FP32

from svdquant.kernels import svdquant_linear, w4a16_linear

KINDS: dict[str, Any] = {
    "plain": {},
    "no branch": {"rank": 0},
    "rotated": {"rotate": True},
    "unsigned": {"unsigned": ((64, 192),)},
    "nvfp4": {"weights": "nvfp4"},
    "int8": {"weights": "int8"},
    "group of 6": {"group": 6},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activations", ["int8", "int4"])
@pytest.mark.parametrize("name", KINDS, ids=lambda n: n.replace(" ", "-"))
def test_a_bad_token_is_lost_and_no_other(path, name, activations, dtype):
    """A NaN or an infinity makes its token's scale one; the rows beside it keep their bits."""
    t = cpu_truth.layer(200, 70, dtype=dtype, **KINDS[name])
    x = cpu_truth.inputs(70, 200, dtype, 1, t.spec.unsigned)
    whole = svdquant_linear(x, t, activations)
    for rows in ([3], [0, 1, 69], [5, 15, 16, 17, 31, 32, 63, 64]):
        for column in (0, 63, 64, 127, 199):
            for bad in (float("nan"), float("inf"), -float("inf")):
                spoiled = x.clone()
                spoiled[rows, column] = bad
                y = svdquant_linear(spoiled, t, activations)
                good = [row for row in range(70) if row not in rows]
                assert torch.equal(y[good], whole[good]), (rows, column, bad)
                assert bool(y[rows].isnan().all()), (rows, column, bad, y[rows])
    assert np.isnan(cpu_truth.output(spoiled, t, activations)[rows]).all()


@pytest.mark.parametrize("activations", ["int8", "int4"])
def test_a_token_of_nothing_but_nan(path, activations):
    for dtype in DTYPES:
        t = cpu_truth.layer(200, 70, dtype=dtype)
        for bad in (float("nan"), float("inf"), -float("inf")):
            x = torch.full((3, 200), bad, dtype=dtype)
            assert bool(svdquant_linear(x, t, activations).isnan().all())
        negative_nan = torch.full((2, 200), float("nan"), dtype=dtype).neg()
        assert bool(svdquant_linear(negative_nan, t, activations).isnan().all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"zeros": True}, {"weights": "nvfp4"}, {"weights": "int8"}], ids=str)
def test_bad_tokens_without_quantized_activations(path, options, dtype):
    """Nothing scales by the largest there: what a dense linear gives, which is not finite."""
    t = cpu_truth.layer(200, 70, dtype=dtype, rank=0, kind="w4a16", smooth=False, **options)
    x = cpu_truth.inputs(33, 200, dtype)

    def run(x: torch.Tensor) -> torch.Tensor:
        return w4a16_linear(x, t.qweight, t.wscales, t.bias, t.spec.weights, t.wzeros)

    for rows in (1, 33):
        whole = run(x[:rows])
        for column in (0, 63, 64, 199):
            for bad in (float("nan"), float("inf"), -float("inf")):
                spoiled = x[:rows].clone()
                spoiled[rows - 1, column] = bad
                y = run(spoiled)
                assert torch.equal(y[: rows - 1], whole[: rows - 1])
                with np.errstate(all="ignore"):
                    expected = cpu_truth.weight_only(spoiled[-1:], t)[0]
                assert not np.isfinite(expected).any()
                assert not bool(y[-1].isfinite().any())
                if bad != bad:
                    assert bool(y[-1].isnan().all())


@pytest.mark.parametrize("activations", ["int8", "int4"])
@pytest.mark.parametrize("options", [{}, {"rank": 0}, {"rotate": True}, {"weights": "int8"}], ids=str)
def test_large_and_small_tokens(path, options, activations):
    """Each row is as exact as any other, from 10⁻³⁰ to 10³⁰, whatever stands beside it."""
    for dtype in (BF16, FP32):
        t = cpu_truth.layer(200, 70, dtype=dtype, bias=False, **options)
        sizes = torch.tensor([1e-30, 1e-20, 1e-8, 1.0, 1e8, 1e20, 1e30])[:, None]
        x = (cpu_truth.inputs(7, 200, FP32) * sizes).to(dtype)
        y, expected = svdquant_linear(x, t, activations), cpu_truth.output(x, t, activations)
        for row in range(7):
            cpu_truth.check(path, y[row : row + 1], expected[row : row + 1], t, (dtype, row))


@pytest.mark.parametrize("activations", ["int8", "int4"])
def test_the_largest_numbers_of_float16(path, activations):
    t = cpu_truth.layer(200, 70, dtype=FP16, rank=0, bias=False, smooth=False)
    t.wscales /= 500
    x = cpu_truth.inputs(5, 200, FP16)
    x[1] = 65504 * torch.sign(x[1])
    x[2, 7] = 65504
    x[3, 7] = -65504
    x[3, 8] = 65504
    y, expected = svdquant_linear(x, t, activations), cpu_truth.output(x, t, activations)
    for row in range(5):
        cpu_truth.check(path, y[row : row + 1], expected[row : row + 1], t, row)


@pytest.mark.parametrize("activations", ["int8", "int4"])
def test_subnormal_tokens(path, activations):
    """The scale of such a token, or its inverse, is no ordinary number; results are not NaN, and near the truth."""
    steps = {BF16: 2.0**-133, FP16: 2.0**-24, FP32: 2.0**-149}
    for dtype, step in steps.items():
        for options in ({"rank": 0}, {}, {"smooth": False, "rank": 0}, {"rotate": True}):
            t = cpu_truth.layer(200, 70, dtype=dtype, bias=False, **options)
            t.wscales *= 16
            x = cpu_truth.inputs(4, 200, FP32)
            x = (x * torch.tensor([1, 16, 128, 1000])[:, None]).round().mul(step).to(dtype)
            x = torch.cat([x, x.new_zeros(1, 200)])
            y, expected = svdquant_linear(x, t, activations).double().numpy(), cpu_truth.output(x, t, activations)
            assert np.isfinite(y).all() and not y[-1].any()
            if path == "dequantize" and dtype == BF16:
                # The instruction that multiplies bf16 takes subnormal numbers for zero.
                continue
            # One step of the type in each of 200 products, at most, is rounding.
            assert np.abs(y - expected).max() < 0.02 * np.abs(expected).max() + 40 * step


@pytest.mark.parametrize("activations", ["int8", "int4"])
def test_zero_tokens_give_the_bias(path, activations):
    for dtype in DTYPES:
        for options in ({}, {"rotate": True}, {"weights": "nvfp4"}, {"weights": "int8"}, {"smooth": False}):
            t = cpu_truth.layer(200, 70, dtype=dtype, **options)
            x = cpu_truth.inputs(5, 200, dtype)
            x[1], x[3] = 0, -0.0
            y = svdquant_linear(x, t, activations)
            assert torch.equal(y[1], t.bias) and torch.equal(y[3], t.bias)


@pytest.mark.parametrize("activations", ["int8", "int4"])
def test_small_smoothing_factors_and_large_ones(path, activations):
    for dtype in DTYPES:
        t = cpu_truth.layer(200, 70, dtype=dtype, rank=0)
        t.smooth_factor = torch.logspace(-3, 3, 200).to(dtype)
        x = (cpu_truth.inputs(6, 200, FP32) * t.smooth_factor.float()).to(dtype)
        cpu_truth.check_linear(path, x, t, activations, dtype)


def test_weights_of_any_size(path):
    """Rows of very small, very large and zero scales stand side by side."""
    for weights in ("int4", "nvfp4", "int8"):
        for activations in ("int8", "int4"):
            t = cpu_truth.layer(200, 40, weights, rank=0, bias=False, smooth=False)
            sizes = torch.logspace(-12, 12, 40)
            if weights == "nvfp4":
                t.wcscales = sizes
            else:
                t.wscales *= sizes[:, None]
                t.wscales[7] = 0
            t.qweight[11] = 0
            x = cpu_truth.inputs(6, 200, FP32)
            y, expected = svdquant_linear(x, t, activations), cpu_truth.output(x, t, activations)
            assert weights == "nvfp4" or not y[:, 7].any()
            assert not y[:, 11].any()
            for column in set(range(40)) - {7, 11}:
                cpu_truth.check(path, y[:, column][None], expected[:, column][None], t, (weights, activations, column))
