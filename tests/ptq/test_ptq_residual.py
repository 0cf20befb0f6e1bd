"""Rounding the residual: GPTQ against a naive float64 implementation, and what it is worth."""

import numpy as np
import pytest
import reference64
import torch

from svdquant.ptq.residual import DAMPING, HessianFactor, quantize_residual

GROUPS = {"int4": 64, "nvfp4": 16, "int8": 0}


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(rows, columns, seed=0):
    """Inputs of a few strong directions, as activations are."""
    return gaussian(rows, 24, seed=seed) @ gaussian(24, columns, seed=seed + 1) + 0.3 * gaussian(
        rows, columns, seed=seed + 2
    )


def dequantized(values, wscales, wcscales):
    scales = reference64.array(wscales) * (1 if wcscales is None else reference64.array(wcscales)[:, None])
    return values.double().numpy() * np.repeat(scales, values.shape[1] // scales.shape[1], 1)


def naive_gptq(weight, scales, round_value, hessian):
    """Frantar et al., algorithm 1, a column at a time and with the inverse itself: (values, in the given columns)."""
    w = weight.copy()
    h = hessian.copy()
    dead = np.diag(h) == 0
    h[dead, dead] = 1
    h += DAMPING * np.diag(h).mean() * np.eye(len(h))
    order = np.argsort(-np.where(dead, 1, np.diag(hessian)), kind="stable")
    inverse = np.linalg.inv(h[np.ix_(order, order)])
    w, scales = w[:, order], scales[:, order]
    values = np.zeros_like(w)
    for i in range(w.shape[1]):
        values[:, i] = round_value(w[:, i] / scales[:, i])
        error = (w[:, i] - values[:, i] * scales[:, i]) / inverse[0, 0]
        w[:, i:] -= np.outer(error, inverse[0])
        # The inverse of what is left once column i is fixed.
        inverse = (inverse - np.outer(inverse[:, 0], inverse[0]) / inverse[0, 0])[1:, 1:]
    out = np.zeros_like(values)
    out[:, order] = values
    return out


ROUND = {
    "int4": lambda v: np.clip(np.rint(v), -8, 7),
    "nvfp4": reference64.e2m1,
    "int8": lambda v: np.clip(np.rint(v), -127, 127),
}


@pytest.mark.parametrize("k", [64, 192])
@pytest.mark.parametrize("weights", ["int4", "nvfp4", "int8"])
def test_equals_the_naive_algorithm(weights, k):
    weight, x = gaussian(12, k), correlated(300, k)
    hessian = (x.double().T @ x.double()).numpy()
    values, _wscales, _wcscales = quantize_residual(
        weight, weights, GROUPS[weights], torch.bfloat16, HessianFactor(torch.from_numpy(hessian).float())
    )
    _, scales, outer = reference64.quantize_weight(weight.double().numpy(), weights, GROUPS[weights], torch.bfloat16)
    scales = np.repeat(scales, k // scales.shape[1], 1) * (1 if outer is None else outer[:, None])
    expected = naive_gptq(weight.double().numpy(), scales, ROUND[weights], hessian)
    # Once a value falls on the other side of a boundary, the rest of its row may differ.
    rows_equal = (values.numpy() == expected).all(1)
    assert rows_equal.mean() >= (0.9 if weights != "int8" else 0.5)
    x, weight = x.double().numpy(), weight.double().numpy()
    ours, naive = (reference64.relative(x @ (v * scales).T, x @ weight.T) for v in (values.double().numpy(), expected))
    assert ours == pytest.approx(naive, rel=0.02)


@pytest.mark.parametrize(("weights", "limit"), [("int4", 0.6), ("nvfp4", 0.6), ("int8", 0.6)])
def test_beats_rounding_to_nearest_on_correlated_inputs(weights, limit):
    weight, x = gaussian(64, 256), correlated(1024, 256)
    expected = (x @ weight.T).numpy()
    errors = []
    for hessian in (None, HessianFactor(x.T @ x)):
        parts = quantize_residual(weight, weights, GROUPS[weights], torch.bfloat16, hessian)
        errors.append(reference64.relative(x.double().numpy() @ dequantized(*parts).T, expected))
    assert errors[1] < limit * errors[0]


@pytest.mark.parametrize("weights", ["int4", "nvfp4", "int8"])
def test_values_stay_on_the_grid_and_scales_are_static(weights):
    weight, x = gaussian(32, 128), correlated(200, 128)
    nearest, scales, outer = quantize_residual(weight, weights, GROUPS[weights], torch.bfloat16, None)
    values, again, outer_again = quantize_residual(
        weight, weights, GROUPS[weights], torch.bfloat16, HessianFactor(x.T @ x)
    )
    assert torch.equal(scales.float(), again.float())
    assert (outer is None and outer_again is None) or torch.equal(outer, outer_again)
    assert not torch.equal(values, nearest)
    np.testing.assert_array_equal(values.numpy(), ROUND[weights](values.double().numpy()))
    assert values.is_contiguous() and values.shape == weight.shape


def test_uncorrelated_inputs_leave_rounding_to_nearest():
    weight = gaussian(8, 128)
    nearest, *_ = quantize_residual(weight, "int4", 64, torch.bfloat16, None)
    values, *_ = quantize_residual(weight, "int4", 64, torch.bfloat16, HessianFactor(torch.eye(128) * 5))
    assert torch.equal(values, nearest)


def test_columns_that_no_input_reaches():
    weight, x = gaussian(16, 128), correlated(200, 128)
    dead = [0, 5, 64, 127]
    x[:, dead] = 0
    values, *_ = quantize_residual(weight, "int4", 64, torch.bfloat16, HessianFactor(x.T @ x))
    nearest, *_ = quantize_residual(weight, "int4", 64, torch.bfloat16, None)
    assert torch.equal(values[:, dead], nearest[:, dead])
    assert bool(torch.isfinite(values).all())


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_fewer_rows_than_columns(rows):
    weight, x = gaussian(16, 128), gaussian(rows, 128, seed=9)
    values, wscales, _ = quantize_residual(weight, "int4", 64, torch.bfloat16, HessianFactor(x.T @ x))
    assert float(values.min()) >= -8 and float(values.max()) <= 7
    if rows:
        wrong = x.double().numpy() @ (dequantized(values, wscales, None) - weight.double().numpy()).T
        assert np.linalg.norm(wrong) / np.linalg.norm((x @ weight.T).numpy()) < 0.06


def test_damping_grows_until_it_factorises():
    indefinite = torch.eye(8) - 0.5
    factor = HessianFactor(indefinite)
    assert factor.damping > DAMPING and bool(torch.isfinite(factor.factor).all())
    assert HessianFactor(torch.eye(8)).damping == DAMPING
    with pytest.raises(ArithmeticError):
        HessianFactor(torch.full((4, 4), float("nan")))


def test_visits_columns_by_descending_diagonal():
    assert HessianFactor(torch.diag(torch.tensor([2.0, 9.0, 5.0, 5.0]))).order.tolist() == [1, 2, 3, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fitted_scales_lose_less_in_every_group(dtype):
    """Against scales that move nothing by more than half a step; 0.093 of normally distributed weights become 0.091."""
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    weight[3, 64:128] = 0
    lost = {}
    for fit in (False, True):
        values, scales, outer = quantize_residual(weight, "int4", 64, dtype, None, fit_scales=fit)
        assert outer is None and scales.dtype == dtype and bool((scales != 0).all())
        assert values.min() == -8 and values.max() == 7
        difference = values.double().unflatten(1, (-1, 64)) * scales.double()[..., None] - weight.unflatten(1, (-1, 64))
        lost[fit] = difference.square().sum(-1)
    assert bool((lost[True] <= lost[False] * (1 + 1e-6)).all())
    errors = [float((lost[fit].sum() / weight.double().square().sum()).sqrt()) for fit in (False, True)]
    assert errors == pytest.approx([0.0927, 0.0913], abs=0.0005)
    # With a Hessian, GPTQ's scales are not fitted.
    hessian = HessianFactor(torch.eye(512))
    fitted, plain = (quantize_residual(weight, "int4", 64, dtype, hessian, fit_scales=fit) for fit in (True, False))
    assert torch.equal(fitted[1], plain[1])
