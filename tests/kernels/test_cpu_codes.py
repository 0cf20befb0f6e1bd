"""4-bit activations have exactly the documented codes, seen from outside: through weights that copy columns."""

from dataclasses import replace

import cpu_truth
import numpy as np
import pytest
import torch
from cpu_truth import BF16, DTYPES, FP16, FP32
from reference64 import array, round_to

from svdquant.kernels import svdquant_linear
from svdquant.numerics import FORMATS, SVDQuantTensors


def copier(t: SVDQuantTensors, columns: np.ndarray) -> SVDQuantTensors:
    """The record `t` with a weight whose row i is 1 in `columns[i]` and 0 elsewhere: y is the quantized input."""
    stored = t.qweight.shape[1] * (1 if t.spec.weights == "int8" else 2)
    ones = torch.zeros(len(columns), stored)
    ones[torch.arange(len(columns)), torch.from_numpy(columns)] = 1
    scales = torch.ones(len(columns), t.wscales.shape[1]).to(t.wscales.dtype)
    outer = None if t.wcscales is None else torch.ones(len(columns), *t.wcscales.shape[1:], dtype=t.wcscales.dtype)
    return SVDQuantTensors(
        replace(t.spec, rank=0), t.in_features, FORMATS[t.spec.weights].pack(ones), scales, outer, t.smooth_factor
    )


def check_codes(
    x: torch.Tensor, t: SVDQuantTensors, rng: np.random.Generator, count: int = 192, gain: float = 1
) -> np.ndarray:
    """Codes of all (or `count` random) columns of x are the truth's; returns the truth's. gain: of the copies."""
    stored = cpu_truth.weight(t).shape[1]
    columns = np.arange(stored) if stored <= count else np.sort(rng.choice(stored, count, replace=False))
    copies = copier(t, columns)
    if gain != 1:
        copies.wscales *= gain
    y = svdquant_linear(x, copies, "int4").double().numpy() / gain
    codes, scales = cpu_truth.quantized(x, t, "int4")
    assert np.isfinite(scales).all()
    flat = codes.reshape(len(x), -1)[:, columns]
    scale = np.repeat(scales[..., 0], codes.shape[2], axis=1)[:, columns]
    # A scale that underflows in x's type leaves nothing to see.
    seen = np.where(scale == 0, flat, np.rint(y / np.where(scale == 0, 1, scale)))
    wrong = np.argwhere(seen != flat)
    assert not len(wrong), (wrong[:5], seen[tuple(wrong[0])], flat[tuple(wrong[0])])
    assert np.array_equal(y, round_to(flat * scale, x.dtype)), "a code is multiplied by the scale rounded to x's type"
    return codes


LAYERS = {
    "group 512": {"k": 600, "group": 512},
    "per row": {"k": 130, "group": 0},
    "int8 weights, group 512": {"k": 600, "weights": "int8", "group": 512},
    "plain": {"k": 192},
    "no smoothing": {"k": 192, "smooth": False},
    "one column more than a group": {"k": 65},
    "K = 100": {"k": 100},
    "group 16": {"k": 80, "group": 16},
    "group 32": {"k": 100, "group": 32},
    "group 128": {"k": 300, "group": 128},
    "group 6": {"k": 32, "group": 6},
    "group 50": {"k": 130, "group": 50},
    "rotated": {"k": 200, "rotate": True},
    "rotated, K = 5600": {"k": 5600, "rotate": True},
    "rotated, no smoothing": {"k": 128, "rotate": True, "smooth": False},
    "unsigned": {"k": 192, "unsigned": ((0, 192),)},
    "unsigned tail, as FLUX's single blocks": {"k": 15 * 64, "unsigned": ((3 * 64, 15 * 64),)},
    "several unsigned ranges": {"k": 520, "unsigned": ((0, 64), (128, 256), (448, 520)), "smooth": False},
    "unsigned ranges that cut groups": {"k": 256, "unsigned": ((10, 70), (200, 201))},
    "unsigned, group 128": {"k": 384, "group": 128, "unsigned": ((128, 384),)},
    "nvfp4 weights": {"k": 100, "weights": "nvfp4"},
    "nvfp4 weights, unsigned": {"k": 192, "weights": "nvfp4", "unsigned": ((64, 128),)},
    "int8 weights": {"k": 100, "weights": "int8"},
    "int8 weights, rotated": {"k": 256, "weights": "int8", "rotate": True},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYERS, ids=lambda n: n.replace(" ", "-"))
def test_codes_are_exact(path, name, dtype):
    rng = np.random.default_rng(0)
    for seed, rows in ((0, 1), (1, 7), (2, 66)):
        options = dict(LAYERS[name])
        k = options.pop("k")
        t = cpu_truth.layer(k, 8, dtype=dtype, rank=0, seed=seed, **options)
        x = cpu_truth.inputs(rows, k, dtype, seed, t.spec.unsigned)
        x *= torch.logspace(-3, 3, rows).to(dtype)[:, None]
        codes = check_codes(x, t, rng)
        high = 15 if t.spec.unsigned else 7
        assert np.abs(codes).max() == high or rows == 1 or t.spec.unsigned == ((10, 70), (200, 201))


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_types_of_smoothing_and_input_differ(path, dtype):
    """The codes are those of x/s in the type of x, whatever type s has."""
    rng = np.random.default_rng(1)
    for smooth in DTYPES:
        for kind in ({}, {"rotate": True}, {"unsigned": ((64, 128),)}):
            t = cpu_truth.layer(256, 8, dtype=dtype, types={"smooth_factor": smooth}, rank=0, **kind)
            check_codes(cpu_truth.inputs(9, 256, dtype, 3, t.spec.unsigned), t, rng)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_round_to_even(path, dtype):
    """Every half from −6.5 to 6.5, in groups whose largest is 7 times a power of two."""
    halves = torch.arange(-7, 7.5, 0.5)
    row = torch.cat([halves, torch.zeros(64 - len(halves))])
    x = torch.stack([torch.cat([row, row.flip(0)]) * 2.0**e for e in (-12, -3, 0, 5, 10)]).to(dtype)
    t = cpu_truth.layer(128, 8, dtype=dtype, rank=0, smooth=False)
    codes = check_codes(x, t, np.random.default_rng(0))
    assert codes[0, 0, :4].tolist() == [-7, -6, -6, -6] and codes[0, 0, 26:29].tolist() == [6, 6, 7]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_near_ties(path, dtype):
    """h = (c + ½)·m/7 up to a few units in the last place: a product with a reciprocal would round some otherwise."""
    rng = np.random.default_rng(5)
    largest = rng.uniform(0.5, 2, (200, 1)).astype(np.float32)
    largest = round_to(largest, dtype)
    at = round_to((rng.integers(-7, 7, (200, 63)) + 0.5) * largest / 7, dtype)
    nudge = {BF16: 2.0**-8, FP16: 2.0**-11, FP32: 2.0**-23}[dtype]
    at = round_to(at * (1 + nudge * rng.integers(-2, 3, at.shape)), dtype)
    x = torch.from_numpy(np.concatenate([largest, at], 1)).to(dtype)
    check_codes(x, cpu_truth.layer(64, 8, dtype=dtype, rank=0, smooth=False), rng)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_the_rounding_to_16_bits_comes_first(path, dtype):
    """x/s falls between two 16-bit numbers; codes of the unrounded quotient differ in some columns."""
    k, rng = 512, np.random.default_rng(2)
    t = cpu_truth.layer(k, 8, dtype=dtype, rank=0)
    x = cpu_truth.inputs(64, k, dtype)
    codes = check_codes(x, t, rng)
    single = cpu_truth.quantized(x.float(), t, "int4")[0]
    assert (codes != single).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [{}, {"rotate": True}, {"unsigned": ((64, 128),)}], ids=str)
def test_small_large_and_empty_groups(path, kind, dtype):
    t = cpu_truth.layer(128, 8, dtype=dtype, rank=0, **kind)
    x = cpu_truth.inputs(12, 128, dtype, 4, t.spec.unsigned)
    x[0] = 0
    x[1, :64] = 0
    x[2] = -0.0
    tiny = float(torch.finfo(dtype).smallest_normal)
    x[3] *= tiny
    x[4] *= tiny * 2**-4
    x[5] = 0
    x[5, 3] = tiny * 2 ** {BF16: -7, FP16: -10, FP32: -23}[dtype]
    large = {BF16: 1e36, FP16: 3e2, FP32: 1e36}[dtype]
    x[6] *= large
    x[7] *= -large
    x[8, 5] = large
    x[9, ::2] *= 1e-3
    x[10] = x[10].abs().clamp_min(0.01)
    if t.spec.unsigned:
        # Below −0.171875 an unsigned code ends at zero.
        x[11] = -x[11].abs() - 0.2
    if path == "dequantize" and dtype == BF16:
        # The instruction that multiplies bf16 takes subnormal numbers for zero.
        x[3:6] = 0
    rng = np.random.default_rng(0)
    if dtype == BF16:
        # An instruction that rounds results to bf16 takes subnormal ones for zero.
        check_codes(x[3:6], t, rng, gain=2.0**30)
        x[3:6] = 0
    check_codes(x, t, rng)


def test_float16_quotients_that_overflow(path):
    """x/s beyond 65504 is infinite in float16, and the token is lost; its neighbours are not."""
    t = cpu_truth.layer(128, 40, dtype=FP16, rank=0)
    t.smooth_factor[5] = 0.25
    x = cpu_truth.inputs(3, 128, FP16)
    x[1, 5] = 30000
    y = svdquant_linear(x, t, "int4")
    assert bool(y[1].isnan().all()) and bool(y[[0, 2]].isfinite().all())
    assert np.isnan(cpu_truth.output(x, t, "int4")[1]).all()
    x[1, 5] = 16000
    assert bool(svdquant_linear(x, t, "int4").isfinite().all())
    check_codes(x, t, np.random.default_rng(0))


def test_the_truth_of_codes_by_hand():
    """7 is the largest of its group: scale 1. A token of 3.5 has scale ½ and code 7."""
    t = cpu_truth.layer(64, 8, dtype=BF16, rank=0, smooth=False)
    x = torch.zeros(2, 64, dtype=BF16)
    x[0, :6] = torch.tensor([7, 2.5, 3.5, -0.5, -1.5, 6.4], dtype=BF16)
    x[1] = -3.5
    codes, scales = cpu_truth.quantized(x, t, "int4")
    assert codes[0, 0, :6].tolist() == [7, 2, 4, 0, -2, 6] and not codes[0, 0, 6:].any()
    assert (codes[1] == -7).all() and scales.ravel().tolist() == [1, 0.5]
    rotation = cpu_truth.rotated(np.eye(128, dtype=np.float32))
    assert [float(v) * 128**0.5 for v in rotation[3, 3:6]] == pytest.approx([1, 1, -1], rel=1e-6)
    # Both signs of scales are tested.
    assert array(t.wscales).min() < 0 < array(t.wscales).max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"smooth": False}, {"rotate": True}, {"unsigned": ((0, 256),)}], ids=str)
def test_codes_of_8_bits_differ_at_ties_only(path, options, dtype):
    """By one, and in fewer than one of ten thousand: multiplying with a reciprocal rounds otherwise than dividing."""
    t = cpu_truth.layer(256, 8, dtype=dtype, rank=0, **options)
    x = cpu_truth.inputs(1024, 256, dtype, 8, t.spec.unsigned)
    no_shift = replace(copier(t, np.arange(256)), spec=replace(t.spec, rank=0, unsigned=()))
    y = svdquant_linear(x, no_shift, "int8").double().numpy()
    codes, scales = cpu_truth.quantized(x, t, "int8")
    seen = np.rint(y / scales[:, 0])
    differs = seen != codes[:, 0]
    assert differs.mean() < 1e-4 and np.abs(seen - codes[:, 0]).max() <= 1
    assert np.allclose(y, round_to(seen * scales[:, 0], dtype), rtol=1e-6 if dtype == FP32 else 2**-7, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_random_tokens(path, dtype):
    """A million codes: what happens once in a hundred thousand is seen."""
    t = cpu_truth.layer(256, 8, dtype=dtype, rank=0, rotate=dtype == FP32)
    x = cpu_truth.inputs(4096, 256, dtype, 9)
    check_codes(x, t, np.random.default_rng(0), count=256)
