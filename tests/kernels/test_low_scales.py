"""Strengths of the branch's directions: what adapters are switched and mixed with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import cpu_truth
import numpy as np
import pytest
import torch
from cpu_truth import BF16, DTYPES, FP32

from svdquant import SVDQuantError
from svdquant.kernels import svdquant_linear

BATCH, TOKENS, K, N, BASE, EXTRA = 3, 7, 130, 65, 16, 32


def widened(t: Any, extra: int, seed: int = 9) -> Any:
    """The same layer with `extra` more directions in its branch."""
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(extra, t.in_features, generator=generator).to(t.qweight.device) / t.in_features**0.5
    up = torch.randn(t.out_features, extra, generator=generator)
    dtype = t.floating_dtype
    if t.proj_down is None:
        down, up = down.to(dtype), up.to(dtype)
    else:
        down, up = torch.cat([t.proj_down, down.to(dtype)]), torch.cat([t.proj_up, up.to(dtype)], 1)
    return replace(t, spec=replace(t.spec, rank=down.shape[0]), proj_down=down, proj_up=up)


def with_strengths(t: Any, strengths: torch.Tensor) -> Any:
    """The record whose up-projection holds the strengths, in float32 so that nothing is rounded."""
    return replace(t, proj_down=t.proj_down.float(), proj_up=t.proj_up.float() * strengths)


def strengths(rows: int | None, rank: int = BASE + EXTRA) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows or 0)
    values = torch.randn(*(() if rows is None else (rows,)), rank, generator=generator)
    values[..., :BASE] = 1
    return values


@pytest.fixture(params=[*cpu_truth.PATHS, "reference"])
def backend(request, monkeypatch):
    """The paths of a CPU, and the reference."""
    if request.param == "reference":
        monkeypatch.setenv("SVDQUANT_BACKEND", "reference")
        yield request.param
        return
    with cpu_truth.running(request.param):
        yield request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activations", ["int8", "int4"])
@pytest.mark.parametrize(
    "options", [{}, {"rotate": True}, {"weights": "nvfp4"}, {"weights": "int8", "bias": False}], ids=str
)
def test_against_float64(backend, options, activations, dtype):
    t = widened(cpu_truth.layer(K, N, dtype=dtype, rank=BASE, **options), EXTRA)
    x = cpu_truth.inputs(BATCH * TOKENS, K, dtype)
    bound = {BF16: 8e-3, torch.float16: 1.5e-3, FP32: 1e-3}[dtype]
    one = strengths(None)
    y = svdquant_linear(x, t, activations, low_scales=one)
    expected = cpu_truth.output(x, with_strengths(t, one), activations)
    assert y.dtype == dtype and np.linalg.norm(y.double().numpy() - expected) < bound * np.linalg.norm(expected)
    many = strengths(BATCH)
    cube = svdquant_linear(x.view(BATCH, TOKENS, K), t, activations, low_scales=many)
    expected = np.concatenate(
        [
            cpu_truth.output(rows, with_strengths(t, line), activations)
            for rows, line in zip(x.split(TOKENS), many, strict=True)
        ]
    )
    assert np.linalg.norm(cube.double().flatten(0, 1).numpy() - expected) < bound * np.linalg.norm(expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activations", ["int8", "int4"])
@pytest.mark.parametrize("base", [0, 16, 33])
def test_ones_are_none(backend, base, activations, dtype):
    t = cpu_truth.layer(K, N, dtype=dtype, rank=base)
    t = t if base else widened(t, 16)
    x = cpu_truth.inputs(BATCH * TOKENS, K, dtype)
    expected = svdquant_linear(x, t, activations)
    rank = t.proj_down.shape[0]
    for x_like, scales in ((x, torch.ones(rank)), (x.view(BATCH, TOKENS, K), torch.ones(BATCH, rank))):
        y = svdquant_linear(x_like, t, activations, low_scales=scales)
        assert torch.equal(y.reshape(expected.shape), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activations", ["int8", "int4"])
@pytest.mark.parametrize("rows", [1, 5, 24, 70])
def test_zeros_are_no_adapter(path, rows, activations, dtype):
    """Bit for bit on the compiled paths; torch's products may sum more directions in another order."""
    t = cpu_truth.layer(K, N, dtype=dtype, rank=BASE)
    wide = widened(t, EXTRA)
    x = cpu_truth.inputs(rows, K, dtype)
    none = svdquant_linear(x, t, activations)
    scales = torch.ones(BASE + EXTRA)
    scales[BASE:] = 0
    y = svdquant_linear(x, wide, activations, low_scales=scales)
    if path == "dequantize":
        assert torch.allclose(y.float(), none.float(), rtol=2e-2, atol=2e-2)
    else:
        assert torch.equal(y, none)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gelu", [False, True])
def test_every_entry_of_a_batch_as_it_is_alone(path, gelu, dtype, threads):
    if path == "dequantize":
        pytest.skip("torch's products may sum in another order")
    t = widened(cpu_truth.layer(K, N, dtype=dtype, rank=BASE), EXTRA)
    many = strengths(BATCH)
    many[1, BASE:] = 0
    for count in (1, 3):
        threads(count)
        for tokens in (1, 5, 12, 40):
            x = cpu_truth.inputs(BATCH * tokens, K, dtype, tokens).view(BATCH, tokens, K)
            whole = svdquant_linear(x, t, "int8", gelu, low_scales=many)
            for i in range(BATCH):
                assert torch.equal(whole[i], svdquant_linear(x[i], t, "int8", gelu, low_scales=many[i]))
                assert torch.equal(
                    whole[i : i + 1], svdquant_linear(x[i : i + 1], t, "int8", gelu, low_scales=many[i : i + 1])
                )
            out = torch.empty(BATCH, tokens, 2 * N, dtype=dtype)[..., N:]
            assert torch.equal(svdquant_linear(x, t, "int8", gelu, out, many), whole)
    rows = cpu_truth.inputs(BATCH, K, dtype)
    whole = svdquant_linear(rows, t, "int8", gelu, low_scales=many)
    assert torch.equal(whole, svdquant_linear(rows[:, None], t, "int8", gelu, low_scales=many)[:, 0])
    assert torch.equal(svdquant_linear(rows, t, "int8", gelu, torch.empty_like(whole), many), whole)


def test_in_parts(path, monkeypatch):
    """Inputs whose codes exceed the scratch go in parts; strengths go with their rows."""
    from svdquant.kernels.cpu import linear

    t = widened(cpu_truth.layer(K, N, dtype=BF16, rank=BASE), EXTRA)
    x = cpu_truth.inputs(60, K, BF16).view(BATCH, 20, K)
    many = strengths(BATCH)
    whole = svdquant_linear(x, t, "int8", low_scales=many)
    monkeypatch.setattr(linear, "SCRATCH_LIMIT", 7000)
    assert torch.equal(svdquant_linear(x, t, "int8", low_scales=many), whole)


@pytest.mark.parametrize("lines", [None, BATCH])
def test_gradient(path, lines):
    t = widened(cpu_truth.layer(K, N, dtype=FP32, rank=BASE), EXTRA)
    x = cpu_truth.inputs(BATCH * TOKENS, K, FP32).view(BATCH, TOKENS, K).requires_grad_()
    scales = strengths(lines)
    y = svdquant_linear(x, t, "none", low_scales=scales)
    y.backward(torch.ones_like(y))
    for i in range(BATCH):
        weight, _ = with_strengths(t, scales if lines is None else scales[i]).dense()
        assert torch.allclose(x.grad[i], weight.sum(0).expand(TOKENS, K), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lines", [None, BATCH])
def test_compiled(path, lines):
    torch._dynamo.reset()
    t = widened(cpu_truth.layer(K, N, dtype=FP32, rank=BASE), EXTRA)
    x = cpu_truth.inputs(BATCH * TOKENS, K, FP32).view(BATCH, TOKENS, K)
    scales = strengths(lines)

    def run(x: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return svdquant_linear(x, t, "int8", low_scales=scales)

    with torch.no_grad():
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(x, scales)
        assert torch.allclose(compiled, run(x, scales), rtol=1e-5, atol=1e-5)


def test_nothing_to_multiply(path):
    t = widened(cpu_truth.layer(K, N, dtype=BF16, rank=BASE), EXTRA)
    assert svdquant_linear(torch.empty(2, 0, K, dtype=BF16), t, "int8", low_scales=strengths(2)).shape == (2, 0, N)
    assert svdquant_linear(torch.empty(0, 4, K, dtype=BF16), t, "int8", low_scales=strengths(0)).shape == (0, 4, N)


def test_strengths_that_do_not_fit(path):
    t = cpu_truth.layer(K, N, dtype=BF16, rank=BASE)
    x = cpu_truth.inputs(6, K, BF16).view(2, 3, K)
    for scales in (torch.ones(15), torch.ones(3, 16), torch.ones(2, 15), torch.ones(2, 3, 16), torch.ones(16).double()):
        with pytest.raises(SVDQuantError, match="low_scales is"):
            svdquant_linear(x, t, "int8", low_scales=scales)
    with pytest.raises(SVDQuantError, match=r"not \[0\]"):
        svdquant_linear(x[0, 0], cpu_truth.layer(K, N, dtype=BF16, rank=0), "int8", low_scales=torch.ones(16))
