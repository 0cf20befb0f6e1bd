"""Products on a CPU against float64: every format, shape, type and option of a layer."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import cpu_truth
import numpy as np
import pytest
import torch
from cpu_truth import BF16, DTYPES, FP16, FP32

from svdquant.kernels import svdquant_linear


@cache
def case(rows: int, k: int, n: int, activations: str, dtype: torch.dtype, options: tuple[tuple[str, Any], ...]) -> Any:
    """(x, record, truth); kept, so that each path is compared with one evaluation."""
    t = cpu_truth.layer(k, n, dtype=dtype, seed=k + n, **dict(options))
    x = cpu_truth.inputs(rows, k, dtype, rows, t.spec.unsigned)
    return x, t, cpu_truth.output(x, t, activations)


def run(path: str, rows: int, k: int, n: int, activations: str, dtype: torch.dtype, **options: Any) -> None:
    x, t, expected = case(rows, k, n, activations, dtype, tuple(options.items()))
    before = x.clone()
    y = svdquant_linear(x, t, activations)
    assert y.dtype == dtype and y.shape == (rows, n) and y.is_contiguous()
    cpu_truth.check(path, y, expected, t, (rows, k, n, activations, dtype, options), activations == "int4")
    assert torch.equal(x, before)


OPTIONS = {
    "int4": {},
    "int4, bare": {"rank": 0, "bias": False, "smooth": False},
    "int4, group 16": {"group": 16},
    "int4, group 32": {"group": 32, "rank": 32},
    "int4, group 128": {"group": 128, "rank": 31},
    "int4, group 6": {"group": 6},
    "int4, group 50": {"group": 50},
    "int4, group 5": {"group": 5},
    "int4, group 256": {"group": 256},
    "int4, group 512": {"group": 512},
    "int4, per row": {"group": 0},
    "int8, group 512": {"weights": "int8", "group": 512},
    "int4, far apart scales": {"spread": 1000.0},
    "int4, rotated": {"rotate": True},
    "int4, rotated, group 32": {"rotate": True, "group": 32, "smooth": False},
    "int4, rotated, group 50": {"rotate": True, "group": 50},
    "int4, unsigned": {"unsigned": ((0, 130),)},
    "int4, unsigned ranges": {"unsigned": ((0, 64), (100, 130)), "rank": 33},
    "int4, unsigned and rotated": {"unsigned": ((64, 130),), "rotate": True},
    "nvfp4": {"weights": "nvfp4"},
    "nvfp4, bare": {"weights": "nvfp4", "rank": 0, "bias": False, "smooth": False},
    "nvfp4, outer scale per block": {"weights": "nvfp4", "outer_blocks": 3},
    "nvfp4, far apart scales": {"weights": "nvfp4", "spread": 300.0},
    "nvfp4, rotated": {"weights": "nvfp4", "rotate": True},
    "nvfp4, unsigned": {"weights": "nvfp4", "unsigned": ((64, 128),)},
    "int8": {"weights": "int8"},
    "int8, bare": {"weights": "int8", "rank": 0, "bias": False, "smooth": False},
    "int8, group 64": {"weights": "int8", "group": 64},
    "int8, rotated": {"weights": "int8", "rotate": True, "rank": 1},
    "int8, unsigned": {"weights": "int8", "unsigned": ((10, 70),)},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activations", ["int8", "int4"])
@pytest.mark.parametrize("name", OPTIONS, ids=lambda n: n.replace(", ", "-").replace(" ", "-"))
def test_every_kind_of_layer(path, name, activations, dtype):
    # 140 columns of 16 are 9 groups: a number that 3 outer blocks divide.
    run(path, 19, 140, 70, activations, dtype, **OPTIONS[name])


@pytest.mark.parametrize("activations", ["int8", "int4"])
@pytest.mark.parametrize("weights", ["int4", "nvfp4", "int8"])
def test_widths(path, weights, activations):
    """K below, at and above groups and vectors; N around every tile."""
    for k in (1, 2, 15, 16, 17, 63, 64, 65, 100, 127, 128, 129, 192, 257, 1000):
        run(path, 3, k, 33, activations, FP32, weights=weights)
    for n in (*range(1, 20), 31, 32, 33, 47, 48, 49, 63, 64, 65, 95, 96, 97, 127, 128, 129, 255, 257):
        run(path, 3, 100, n, activations, FP32, weights=weights)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activations", ["int8", "int4"])
def test_numbers_of_rows(path, activations, dtype):
    for rows in (*range(18), 31, 32, 33, 63, 64, 65, 127, 128, 129, 200, 513):
        run(path, rows, 130, 37, activations, dtype)


@pytest.mark.parametrize("activations", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_large_widths_that_no_group_divides(path, dtype, activations):
    run(path, 17, 5600, 65, activations, dtype)
    run(path, 17, 3000, 63, activations, dtype)
    run(path, 17, 100, 2240, activations, dtype)
    run(path, 1, 12288, 7, activations, dtype)


@pytest.mark.parametrize("activations", ["int8", "int4"])
def test_a_layer_of_sana(path, activations):
    run(path, 17, 5600, 2240, activations, BF16, rank=32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activations", ["int8", "int4"])
def test_ranks(path, activations, dtype):
    for rank in (0, 1, 2, 3, 15, 16, 17, 31, 32, 33, 48, 100, 128, 129, 1024):
        run(path, 5, 130, 45, activations, dtype, rank=rank)
    for rank in (1, 32, 1024):
        run(path, 66, 200, 18, activations, dtype, rank=rank, weights="int8", bias=False)


@pytest.mark.parametrize("activations", ["int8", "int4"])
def test_flux_single_block_output(path, activations):
    """Attention's half of the input is signed, the GELU's is not."""
    for dtype in DTYPES:
        run(path, 20, 5 * 192, 96, activations, dtype, unsigned=((192, 5 * 192),), rank=32)


@pytest.mark.parametrize("activations", ["int8", "int4"])
def test_mixed_types(path, activations):
    """A model that was cast keeps the types of its scales; published files mix others."""
    names = ("wscales", "wcscales", "smooth_factor", "proj_down", "proj_up", "bias")
    for seed in range(24):
        choose = random.Random(seed)
        types = {name: choose.choice(DTYPES) for name in names}
        if choose.random() < 0.5:
            types["proj_up"] = types["proj_down"]
        weights, dtype = choose.choice(["int4", "nvfp4", "int8"]), choose.choice(DTYPES)
        t = cpu_truth.layer(130, 45, weights, types=types, seed=seed, rotate=seed % 5 == 0)
        x = cpu_truth.inputs(6, 130, dtype, seed)
        y = cpu_truth.check_linear(path, x, t, activations, (seed, weights, dtype, types))
        assert y.dtype == dtype


def test_parts_in_float64(path):
    """A model that was cast back and forth."""
    x = cpu_truth.inputs(6, 130, FP32)
    for name in ("bias", "proj_up", "proj_down", "smooth_factor", "wscales"):
        t = cpu_truth.layer(130, 45)
        setattr(t, name, getattr(t, name).double())
        for activations in ("int8", "int4"):
            cpu_truth.check_linear(path, x, t, activations, name)


def test_a_model_in_float64(path):
    """Nothing is faster there, but it has to run."""
    t = cpu_truth.layer(130, 45)
    x = cpu_truth.inputs(6, 130, FP32)
    y = svdquant_linear(x.double(), t, "int8")
    assert y.dtype == torch.float64
    cpu_truth.check("dequantize", y.float(), cpu_truth.output(x, t, "int8"), t)


def test_random_layers(path):
    """Whatever fits together: sizes, formats, options, types."""
    for seed in range(150):
        choose = random.Random(seed)
        weights, dtype = choose.choice(["int4", "int4", "nvfp4", "int8"]), choose.choice(DTYPES)
        k, n, rows = choose.randint(1, 420), choose.randint(1, 150), choose.choice([1, 2, 3, 5, 8, 13, 40, 70])
        options: dict[str, Any] = {
            "weights": weights,
            "rank": choose.choice([0, 1, 8, 16, 32, 50]),
            "bias": choose.random() < 0.7,
            "smooth": choose.random() < 0.7,
            "group": choose.choice([16, 32, 64, 64, 64, 128, 48, 24]) if weights == "int4" else None,
        }
        kind = choose.choice(["", "", "rotate", "unsigned"])
        if kind == "rotate":
            options["rotate"] = True
        elif kind == "unsigned":
            start = choose.randint(0, k - 1)
            options["unsigned"] = ((start, choose.randint(start + 1, k)),)
        run(path, rows, k, n, choose.choice(["int8", "int4"]), dtype, **options)


@pytest.mark.parametrize("activations", ["int8", "int4"])
@pytest.mark.parametrize("weights", ["int4", "nvfp4", "int8"])
def test_sums_at_their_largest(path, weights, activations):
    """All codes at one end add up to what 16 bits do not hold, and 32 bits do."""
    k, n = 4096, 24
    t = cpu_truth.layer(k, n, weights, rank=0, bias=False, smooth=False)
    rows = torch.arange(n)
    if weights == "int8":
        t.qweight[:] = torch.where(rows % 2 == 0, 127, -127)[:, None]
    else:
        ends = {"int4": (0x77, 0x88), "nvfp4": (0x77, 0xFF)}[weights]
        t.qweight[:] = torch.where(rows % 2 == 0, *ends)[:, None]
    x = torch.full((6, k), 3.0)
    x[1::2] = -3
    x[4, ::2] *= -1
    x[4, 0] = 5
    t.spec = t.spec.__class__(weights=weights, group_size=t.spec.group_size, rank=0, smooth=False)
    cpu_truth.check_linear(path, x, t, activations)
    unsigned = cpu_truth.layer(k, n, weights, rank=0, bias=False, smooth=False, unsigned=((0, k),))
    unsigned.qweight[:] = t.qweight
    x = x.abs()
    cpu_truth.check_linear(path, x, unsigned, activations)


@pytest.mark.parametrize("activations", ["int8", "int4"])
def test_unsigned_ranges_that_end_beyond_the_input(path, activations):
    """A range rounded up to its group, or one from a bad file: what is beyond the last column is padding and stays."""
    x = cpu_truth.inputs(6, 130, FP32, 1, ((64, 130),))
    fits = cpu_truth.layer(130, 45, unsigned=((64, 130),))
    for stop in (192, 256, 10000):
        t = cpu_truth.layer(130, 45, unsigned=((64, stop),))
        expected = svdquant_linear(x, fits, activations)
        cpu_truth.check(path, svdquant_linear(x, t, activations), expected.double().numpy(), t, stop)


def test_results_beyond_float16(path):
    """They are infinite, as a dense float16 linear's are, and nothing else is."""
    t = cpu_truth.layer(256, 64, dtype=FP16)
    x = cpu_truth.inputs(8, 256, FP16)
    t.wscales *= 50
    x[2:4] *= 500
    for activations in ("int8", "int4"):
        expected = cpu_truth.output(x, t, activations)
        y = svdquant_linear(x, t, activations)
        safe = np.abs(np.abs(expected) - 65504) > 200
        infinite = np.abs(expected) > 65504
        assert infinite.any() and not infinite[[0, 1, 4, 5, 6, 7]].any()
        assert np.array_equal(np.isinf(y.double().numpy())[safe], infinite[safe])
        finite = torch.from_numpy(~infinite & safe)
        cpu_truth.check(path, y[finite][None], expected[finite.numpy()][None], t)


@pytest.mark.parametrize("shape", [(130,), (0, 130), (2, 0, 130), (0, 3, 130), (1, 130), (2, 3, 130), (2, 1, 5, 130)])
def test_leading_dimensions(path, shape):
    for dtype in DTYPES:
        for options in ({}, {"rank": 0, "weights": "int8"}, {"weights": "nvfp4", "rotate": True}):
            t = cpu_truth.layer(130, 65, dtype=dtype, **options)
            x = cpu_truth.inputs(10, 130, dtype).flatten()[: torch.Size(shape).numel()].reshape(shape)
            for activations in ("int8", "int4"):
                y = svdquant_linear(x, t, activations)
                assert y.shape == (*shape[:-1], 65) and y.dtype == dtype and y.is_contiguous()
                cpu_truth.check(path, y.reshape(-1, 65), cpu_truth.output(x.reshape(-1, 130), t, activations), t)


def test_the_truth_is_that_of_the_dense_layer():
    """With activations that are not rounded, the truth is docs/format.md's dense layer; int8 comes close to it."""
    for options in OPTIONS.values():
        x, t, _ = case(19, 140, 70, "int8", FP32, tuple(options.items()))
        exact = cpu_truth.output(x, t, "none")
        dense, bias = t.dense()
        y = x.double() @ dense.double().T + (0 if bias is None else bias.double())
        assert float((y - torch.from_numpy(exact)).norm() / y.norm()) < 1e-5
        assert np.linalg.norm(cpu_truth.output(x, t, "int8") - exact) < 0.05 * np.linalg.norm(exact)
