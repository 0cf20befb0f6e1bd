"""Weights-only products on a CPU against float64: formats, zero points, few rows and many, types."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import cpu_truth
import pytest
import torch
from cpu_truth import BF16, DTYPES, FP32

from svdquant.kernels import w4a16_linear

OPTIONS = {
    "int4": {},
    "int4, no bias": {"bias": False},
    "int4, group 16": {"group": 16},
    "int4, group 32": {"group": 32},
    "int4, group 128": {"group": 128},
    "int4, group 6": {"group": 6},
    "int4, group 50": {"group": 50},
    "int4, far apart scales": {"spread": 1000.0},
    "zeros": {"zeros": True},
    "zeros, group 128": {"zeros": True, "group": 128},
    "zeros, group 32, no bias": {"zeros": True, "group": 32, "bias": False},
    "zeros, group 6": {"zeros": True, "group": 6},
    "nvfp4": {"weights": "nvfp4"},
    "int8": {"weights": "int8"},
    "int8, group 64": {"weights": "int8", "group": 64},
}


def multiply(x: torch.Tensor, t: Any) -> torch.Tensor:
    return w4a16_linear(x, t.qweight, t.wscales, t.bias, t.spec.weights, t.wzeros)


def record(k: int, n: int, **options: Any) -> Any:
    return cpu_truth.layer(k, n, rank=0, kind="w4a16", smooth=False, **options)


@cache
def case(rows: int, k: int, n: int, dtype: torch.dtype, options: tuple[tuple[str, Any], ...]) -> Any:
    t = record(k, n, dtype=dtype, seed=k + n, **dict(options))
    x = cpu_truth.inputs(rows, k, dtype, rows)
    return x, t, cpu_truth.weight_only(x, t)


def run(path: str, rows: int, k: int, n: int, dtype: torch.dtype, **options: Any) -> None:
    x, t, expected = case(rows, k, n, dtype, tuple(options.items()))
    before = x.clone()
    y = multiply(x, t)
    assert y.dtype == dtype and y.shape == (rows, n) and y.is_contiguous()
    cpu_truth.check(path, y, expected, t, (rows, k, n, dtype, options), True)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS, ids=lambda n: n.replace(", ", "-").replace(" ", "-"))
def test_every_kind_of_weight(path, name, dtype):
    for rows in (1, 2, 19):
        run(path, rows, 130, 70, dtype, **OPTIONS[name])


@pytest.mark.parametrize("name", ["int4", "zeros", "nvfp4", "int8"])
def test_widths(path, name):
    for k in (1, 2, 15, 16, 17, 63, 64, 65, 100, 127, 128, 129, 192, 257, 1000):
        run(path, 1, k, 33, FP32, **OPTIONS[name])
        run(path, 3, k, 5, FP32, **OPTIONS[name])
    for n in (*range(1, 20), 31, 32, 33, 47, 48, 49, 63, 64, 65, 95, 96, 97, 127, 128, 129, 255, 257):
        run(path, 1, 100, n, FP32, **OPTIONS[name])
        run(path, 7, 100, n, BF16, **OPTIONS[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["int4", "zeros-128", "nvfp4", "int8"])
def test_numbers_of_rows(path, name, dtype):
    options = {"zeros": True, "group": 128} if name == "zeros-128" else OPTIONS[name]
    for rows in (*range(18), 31, 32, 33, 63, 64, 65, 127, 128, 129, 300):
        run(path, rows, 130, 37, dtype, **options)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_large_widths_that_no_group_divides(path, dtype):
    for rows in (1, 17):
        run(path, rows, 5600, 65, dtype)
        run(path, rows, 3000, 63, dtype, zeros=True)
        run(path, rows, 100, 2240, dtype)
        run(path, rows, 12288, 7, dtype, group=128)


def test_a_modulation(path):
    """One row, as wide as FLUX's."""
    run(path, 1, 3072, 6144, BF16)


def test_mixed_types(path):
    for seed in range(24):
        choose = random.Random(seed)
        types = {name: choose.choice(DTYPES) for name in ("wscales", "bias")}
        name, dtype = choose.choice(list(OPTIONS)), choose.choice(DTYPES)
        t = record(130, 45, types=types, seed=seed, **OPTIONS[name])
        x = cpu_truth.inputs(choose.choice([1, 6]), 130, dtype, seed)
        cpu_truth.check_weight_only(path, x, t, (seed, name, dtype, types))


def test_random_weights(path):
    for seed in range(100):
        choose = random.Random(seed)
        k, n, rows = choose.randint(1, 420), choose.randint(1, 150), choose.choice([1, 1, 2, 4, 5, 8, 33])
        options: dict[str, Any] = {"bias": choose.random() < 0.6}
        options["weights"] = choose.choice(["int4", "int4", "nvfp4", "int8"])
        if options["weights"] == "int4":
            options["group"], options["zeros"] = choose.choice([16, 32, 64, 64, 128, 24]), choose.random() < 0.4
        run(path, rows, k, n, choose.choice(DTYPES), **options)


def test_activations_are_not_rounded(path):
    """An outlier of 10⁴ leaves what stands beside it as exact as it was: 8-bit codes would not."""
    for name in ("int4", "zeros", "nvfp4", "int8"):
        t = record(128, 40, dtype=FP32, **OPTIONS[name])
        x = cpu_truth.inputs(3, 128, FP32)
        without = multiply(x, t).double()
        spiked = x.clone()
        spiked[:, 5] += 1e4
        column = torch.from_numpy(cpu_truth.weight(t)[:, 5])
        difference = multiply(spiked, t).double() - 1e4 * column - without
        assert float(difference.abs().max()) < 0.02 * float(without.abs().mean()), name


def test_wide_ranges_of_float32(path):
    """Inputs that 16 bits cannot hold."""
    t = record(128, 40, dtype=FP32, bias=False)
    x = cpu_truth.inputs(4, 128, FP32) * torch.tensor([1e-30, 1e-10, 1e10, 1e30])[:, None]
    expected = cpu_truth.weight_only(x, t)
    for y, row in zip(multiply(x, t), expected, strict=True):
        cpu_truth.check(path, y[None], row[None], t)


@pytest.mark.parametrize("shape", [(130,), (0, 130), (2, 0, 130), (1, 130), (2, 3, 130), (2, 1, 5, 130)])
def test_leading_dimensions(path, shape):
    for dtype in DTYPES:
        t = record(130, 65, dtype=dtype)
        x = cpu_truth.inputs(10, 130, dtype).flatten()[: torch.Size(shape).numel()].reshape(shape)
        y = multiply(x, t)
        assert y.shape == (*shape[:-1], 65) and y.dtype == dtype and y.is_contiguous()
        cpu_truth.check(path, y.reshape(-1, 65), cpu_truth.weight_only(x.reshape(-1, 130), t), t)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_many_outputs_whatever_shares_them(path, threads, dtype):
    """Tasks of 512, 256 and 128 outputs, and a rest that fills none."""
    results = []
    for count in (1, 2, 4):
        threads(count)
        run(path, 1, 1040, 2101, dtype)
        x, t, _ = case(1, 1040, 2101, dtype, ())
        results.append(multiply(x, t))
    assert all(torch.equal(y, results[0]) for y in results)
