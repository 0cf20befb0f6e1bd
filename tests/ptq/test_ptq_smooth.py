"""The smoothing factor and its search."""

import numpy as np
import pytest
import reference64
import torch

from svdquant.config import LayerSpec
from svdquant.ptq.low_rank import dense_svd
from svdquant.ptq.problem import Problem
from svdquant.ptq.smooth import evaluation_rows, grid, search, search_segments, smooth_factor

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def generator():
    return torch.Generator().manual_seed(0)


def problem(x, weight, splits=None, activations="int4", **spec):
    spec = LayerSpec(**({"rank": 8} | spec))
    return Problem(weight, splits or [len(weight)], x, spec, x.shape[1], activations, torch.bfloat16)


def outliers(rows=400, columns=128, strength=30.0):
    x = gaussian(rows, columns)
    x[:, ::17] *= strength
    return x


@pytest.mark.parametrize("steps", [1, 2, 10, 20])
def test_grid(steps):
    pairs = grid(steps)
    assert len(pairs) == len(set(pairs)) == 2 * steps - 1 and pairs[0] == (0, 0)
    assert all(0 < a < 1 and (b == 0 or a + b == pytest.approx(1)) for a, b in pairs[1:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 0.0), (0.5, 0.5), (0.3, 0.0), (0.85, 0.15)])
def test_factor_is_the_formula(alpha, beta, dtype):
    x_amax, w_amax = gaussian(96).abs() * 20 + 0.1, gaussian(96, seed=1).abs() + 0.01
    raw = x_amax.double().numpy() ** alpha / w_amax.double().numpy() ** beta
    expected = raw / np.exp(np.log(raw).mean())
    actual = smooth_factor(x_amax, w_amax, alpha, beta, dtype)
    assert actual.dtype == torch.float32 and torch.equal(actual, actual.to(dtype).float())
    np.testing.assert_allclose(actual.numpy(), expected, rtol={torch.bfloat16: 4e-3}.get(dtype, 5e-4))
    if alpha == 0:
        assert torch.equal(actual, torch.ones(96))


def test_factor_of_channels_without_signal_is_finite():
    x_amax, w_amax = torch.tensor([0.0, 1.0, 4.0, 1.0]), torch.tensor([1.0, 0.0, 1.0, 1.0])
    factor = smooth_factor(x_amax, w_amax, 0.5, 0.5, torch.float32)
    # Ones before the mean is taken out: 1, 1, 2, 1.
    np.testing.assert_allclose(factor.numpy(), np.array([1, 1, 2, 1]) / 2**0.25, rtol=1e-6)
    huge = smooth_factor(torch.tensor([1e30, 1e-30, 1.0]), torch.ones(3), 1.0, 0.0, torch.float16)
    assert bool(torch.isfinite(huge).all()) and float(huge.min()) > 0


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize(("activations", "gain"), [("int4", 0.75), ("nvfp4", 1.0), ("int8", 1.0)])
def test_search_beats_no_smoothing_on_outliers(activations, gain, rotate):
    x = outliers()
    p = problem(x, gaussian(96, 128, seed=1) / 11, activations=activations, rotate=rotate)
    x_amax = x.abs().amax(0)
    off, on = (search(p, x_amax, steps, generator()) for steps in (1, 10))
    assert (off.alpha, off.beta) == (0, 0) and torch.equal(off.factor, torch.ones(128))
    assert on.error < off.error * (gain if not rotate else 1) and on.alpha > 0
    loud = on.factor[::17].mean() / on.factor.mean()
    assert float(loud) > 1.5


def test_search_reports_the_error_of_its_factor():
    x = outliers()
    p = problem(x, gaussian(96, 128, seed=1))
    found = search(p, x.abs().amax(0), 5, generator(), exact_svd=True)
    # The truncated SVD finds as good a factor as the published, dense one.
    assert search(p, x.abs().amax(0), 5, generator()).error == pytest.approx(found.error, rel=0.03)
    up, down = dense_svd(p.smoothed_weight(found.factor), 8)
    weight = p.smoothed_weight(found.factor).double().numpy()
    low = up.double().numpy() @ down.double().numpy()
    values, scales, _ = reference64.quantize_weight(weight - low, "int4", 64, torch.bfloat16)
    h = (x / found.factor).double().numpy()
    codes, steps = reference64.quantize_activation(h, "int4", 64, None, torch.bfloat16)
    y = (codes * steps).reshape(h.shape) @ (values * np.repeat(scales, 64, 1)).T + h @ low.T
    expected = x.double().numpy() @ p.weight.double().numpy().T
    assert found.error == pytest.approx(reference64.relative(y, expected), rel=2e-3)


def test_segments_are_searched_apart_and_scaled_to_unit_power():
    x = outliers(columns=192)
    x[:, :64] *= 40
    p = problem(x, gaussian(64, 192, seed=1), rank=4)
    results = search_segments(p, x.abs().amax(0), ((0, 64), (64, 192)), 5, generator())
    assert [len(r.factor) for r in results] == [64, 128]
    for r, part in zip(results, (x[:, :64], x[:, 64:]), strict=True):
        assert float((part / r.factor).square().mean().sqrt()) == pytest.approx(1, rel=0.01)
        assert torch.equal(r.factor, r.factor.bfloat16().float())
    whole = search_segments(p, x.abs().amax(0), ((0, 192),), 5, generator())
    assert len(whole) == 1 and torch.equal(whole[0].factor, search(p, x.abs().amax(0), 5, generator()).factor)


def test_evaluation_rows_are_a_bounded_sample():
    big = problem(gaussian(300, 64), torch.zeros(1, 64).expand(1 << 22, 64))
    rows = evaluation_rows(big, generator())
    assert rows.shape == (256, 64)
    assert len({tuple(r.tolist()) for r in rows}) == 256
    small = problem(gaussian(300, 64), gaussian(8, 64))
    assert evaluation_rows(small, generator()) is small.inputs
