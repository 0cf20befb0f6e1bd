"""What follows the product in one pass over y: GELU, and results into memory that the caller has."""

from __future__ import annotations

import cpu_truth
import numpy as np
import pytest
import torch
from cpu_truth import BF16, DTYPES, FP32

from svdquant import SVDQuantError
from svdquant.kernels import svdquant_linear


def gelu(y: np.ndarray) -> np.ndarray:
    """The tanh form, in float64."""
    return torch.nn.functional.gelu(torch.from_numpy(y), approximate="tanh").numpy()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activations", ["int8", "int4"])
@pytest.mark.parametrize(
    "options", [{}, {"weights": "nvfp4"}, {"weights": "int8", "bias": False}, {"group": 6}], ids=str
)
def test_gelu_of_the_product(path, options, activations, dtype):
    for rows, k, n in ((1, 130, 65), (7, 130, 33), (40, 257, 130)):
        t = cpu_truth.layer(k, n, dtype=dtype, **options)
        x = cpu_truth.inputs(rows, k, dtype)
        y = svdquant_linear(x, t, activations, gelu=True)
        assert y.dtype == dtype and y.shape == (rows, n)
        expected = gelu(cpu_truth.output(x, t, activations))
        # Rounding y before its GELU, as two operations do, costs a second rounding.
        error = np.linalg.norm(y.double().numpy() - expected) / np.linalg.norm(expected)
        assert error < 2e-3 + {FP32: 0, torch.float16: 1e-3, BF16: 6e-3}[dtype]
        assert (
            np.abs(y.double().numpy() - expected).max()
            < 0.05 * np.sqrt((expected**2).mean()) + 2**-6 * np.abs(expected).max()
        )


def test_gelu_over_its_whole_range(path):
    """A layer that copies its input: float32 beside float64, from −10⁴ to 10⁴ and at zero."""
    values = torch.cat([torch.logspace(-30, 4, 96), torch.linspace(0, 8, 32)])
    x = torch.zeros(257, 64)
    x[:128, 0], x[128:256, 0] = values, -values
    t = cpu_truth.layer(64, 3, weights="int8", rank=0, bias=False, smooth=False)
    t.qweight.zero_()
    t.qweight[:, 0] = 1
    t.wscales.fill_(1)
    y = svdquant_linear(x, t, "int8", gelu=True).double().numpy()
    expected = gelu(svdquant_linear(x, t, "int8").double().numpy())
    assert np.abs(y - expected).max() < 1e-3 and not y[-1].any()
    assert np.allclose(y, expected, rtol=1e-5, atol=1e-7)


def test_gelu_of_a_bad_token(path):
    for dtype in DTYPES:
        t = cpu_truth.layer(130, 65, dtype=dtype)
        x = cpu_truth.inputs(7, 130, dtype)
        whole = svdquant_linear(x, t, "int8", gelu=True)
        x[3, 5] = float("nan")
        y = svdquant_linear(x, t, "int8", gelu=True)
        assert bool(y[3].isnan().all()) and torch.equal(y[[0, 1, 2, 4, 5, 6]], whole[[0, 1, 2, 4, 5, 6]])


@pytest.mark.parametrize("way", ["inference", "gradient", "compiled"])
def test_gelu_on_every_way_in(path, way):
    torch._dynamo.reset()
    t = cpu_truth.layer(130, 65)
    x = cpu_truth.inputs(7, 130, FP32)
    expected = gelu(cpu_truth.output(x, t, "int8"))

    def run(x: torch.Tensor) -> torch.Tensor:
        return svdquant_linear(x, t, "int8", gelu=True)

    if way == "gradient":
        x.requires_grad_()
    y = torch.compile(run, fullgraph=True, backend="aot_eager")(x) if way == "compiled" else run(x)
    assert np.abs(y.detach().double().numpy() - expected).max() < 1e-2
    if way == "gradient":
        y.sum().backward()
        assert bool(x.grad.isfinite().all()) and float(x.grad.norm()) > 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activations", ["int8", "int4"])
def test_results_into_given_memory(path, activations, dtype):
    """Only the N columns of the rows are written, whatever lies around them."""
    t = cpu_truth.layer(130, 65, dtype=dtype)
    x = cpu_truth.inputs(24, 130, dtype)
    expected = svdquant_linear(x, t, activations)
    for gelu_too in (False, True):
        wanted = svdquant_linear(x, t, activations, gelu=True) if gelu_too else expected
        wide = torch.full((26, 200), 7.0, dtype=dtype)
        cube = torch.full((3, 8, 70), 7.0, dtype=dtype)
        apart = torch.full((3, 9, 70), 7.0, dtype=dtype)
        for out, given in (
            (torch.empty(24, 65, dtype=dtype), x),
            (wide[1:25, 100:165], x),
            (cube[..., 5:].transpose(0, 1).contiguous().transpose(0, 1), x.view(3, 8, 130)),
            (cube[..., :65], x.view(3, 8, 130)),
            (apart[:, :8, :65], x.view(3, 8, 130)),
            (torch.empty(65, 24, dtype=dtype).t(), x),
            (torch.empty(24, 130, dtype=dtype)[:, ::2], x),
        ):
            y = svdquant_linear(given, t, activations, gelu=gelu_too, out=out)
            assert y is out
            # What is no view of rows is copied, and its GELU is torch's.
            if gelu_too:
                eps = torch.finfo(dtype).eps
                assert torch.allclose(y.reshape(24, 65).float(), wanted.float(), rtol=4 * eps + 1e-3, atol=4 * eps)
            else:
                assert torch.equal(y.reshape(24, 65), wanted)
        assert bool((wide[[0, 25]] == 7).all() and (wide[:, :100] == 7).all() and (wide[:, 165:] == 7).all())
        assert bool((cube[..., 65:] == 7).all() and (apart[:, 8] == 7).all())


def test_results_over_the_input(path):
    """A square layer may write over what it reads: every row is read before any is written."""
    t = cpu_truth.layer(128, 128, dtype=BF16)
    x = cpu_truth.inputs(300, 128, BF16)
    expected = svdquant_linear(x, t, "int8")
    assert torch.equal(svdquant_linear(x, t, "int8", out=x), expected)
    again = svdquant_linear(x, t, "int8")
    cpu_truth.check(path, again, cpu_truth.output(expected, t, "int8"), t)


def test_memory_that_does_not_fit(path):
    """An error, or broadcasting as `copy_` does; never a write beyond it."""
    t = cpu_truth.layer(130, 65, dtype=BF16)
    x = cpu_truth.inputs(24, 130, BF16)
    for shape in ((23, 65), (25, 65), (24, 64), (24, 66), (65, 24), (24 * 65,), (48, 65), (12, 130), (24, 1), (0, 65)):
        out = torch.empty(shape, dtype=BF16)
        with pytest.raises((SVDQuantError, RuntimeError, ValueError)):
            svdquant_linear(x, t, "int8", out=out)
