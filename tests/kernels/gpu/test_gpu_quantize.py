"""`quantize` against codes, scales and projections written down in `truth`, in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import truth

from svdquant.kernels.gpu import quantize as module
from svdquant.kernels.gpu.arch import Arch
from svdquant.kernels.gpu.quantize import quantize, specializations
from svdquant.kernels.gpu.types import Before, Quantized, Reading
from svdquant.numerics import SVDQuantTensors

BF16, FP16 = torch.bfloat16, torch.float16
READINGS = [
    Reading("int8"),
    Reading("int8", split=True),
    Reading("fp8"),
    Reading("fp8", split=True),
    Reading("int4", packed=True),
    Reading("int4"),
    Reading("int4", split=True),
    Reading("nvfp4", packed=True),
]
FOUR = [Reading("int8"), Reading("fp8"), Reading("int4", packed=True), Reading("nvfp4", packed=True)]


def name(reading: Reading) -> str:
    return reading.precision + "-packed" * reading.packed + "-split" * reading.split


@pytest.fixture
def g():
    return torch.Generator().manual_seed(0)


def check(actual: Quantized, expected: Quantized, t: SVDQuantTensors, exact: bool = True) -> None:
    """Codes, scales and low of `expected`; 8-bit codes, and others unless `exact`, may be the next in a few places."""
    assert actual.reading == expected.reading
    assert (actual.batch, actual.tokens) == (expected.batch, expected.tokens)
    for attribute in ("codes", "scales"):
        a, e = getattr(actual, attribute), getattr(expected, attribute)
        assert a.shape == e.shape and a.dtype == e.dtype
    values, scales = truth.decode(actual, t)
    expected_values, expected_scales = truth.decode(expected, t)
    if exact and actual.reading.precision in ("int4", "nvfp4"):
        assert torch.equal(values, expected_values)
        assert torch.equal(scales, expected_scales)
    else:
        assert (values != expected_values).double().mean() < 2e-3
        step = {"int8": 1, "fp8": 32, "int4": 1, "nvfp4": 2}[actual.reading.precision]
        assert (values - expected_values).abs().max() <= step
        # A 16-bit value before an int4 group's scale may be the next one, and so may an e4m3 scale.
        bound = {"int8": 1e-6, "fp8": 1e-6, "int4": 0.01, "nvfp4": 0.13}[actual.reading.precision]
        assert ((scales - expected_scales).abs() <= bound * expected_scales.abs()).all()
    if expected.low is None:
        assert actual.low is None
    else:
        assert actual.low is not None and actual.low.dtype == expected.low.dtype
        assert truth.relative_error(actual.low, expected.low) < {BF16: 1e-3, FP16: 2e-4}[expected.low.dtype]


@pytest.mark.parametrize("reading", READINGS, ids=name)
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_every_reading(g, reading, dtype):
    t = truth.random_layer(g, 16, 320, rank=16, dtype=dtype)
    x = truth.random_input(g, 2, 17, 320, dtype)
    check(quantize(x, t, reading), truth.quantized_input(x, t, reading), t)


@pytest.mark.parametrize("reading", FOUR, ids=name)
@pytest.mark.parametrize(("k", "tokens"), [(5600, 1), (2240, 5), (192, 17), (100, 3), (384, 40)])
def test_odd_shapes(g, reading, k, tokens):
    t = truth.random_layer(g, 16, k, rank=0, smooth=k != 192)
    x = truth.random_input(g, 1, tokens, k)
    check(quantize(x, t, reading), truth.quantized_input(x, t, reading), t)


@pytest.mark.parametrize("reading", FOUR, ids=name)
def test_padding_beyond_the_group(g, reading):
    """Kp may exceed K by more than a tile; codes there are zeros."""
    t = truth.random_layer(g, 16, 144, group=256, rank=16)
    x = truth.random_input(g, 1, 3, 144)
    q = quantize(x, t, reading)
    check(q, truth.quantized_input(x, t, reading), t)
    assert not truth.decode(q, t)[0][:, 144:].any()


def before(kind: str, g: torch.Generator, batch: int, k: int) -> Before:
    if kind != "layer_norm":
        return Before(kind)
    scale, shift = (torch.randn(batch, 2 * k, generator=g).to(BF16)[:, i * k : (i + 1) * k] for i in range(2))
    return Before(kind, 1e-6, scale, shift)


@pytest.mark.parametrize("reading", FOUR, ids=name)
@pytest.mark.parametrize("kind", ["layer_norm", "gelu", "geglu", "swiglu"])
def test_before(g, reading, kind):
    k = 224 if reading.precision == "fp8" else 256
    t = truth.random_layer(g, 16, k, rank=16)
    x = truth.random_input(g, 2, 6, 2 * k if kind in ("geglu", "swiglu") else k)
    b = before(kind, g, 2, k)
    check(quantize(x, t, reading, b), truth.quantized_input(x, t, reading, b), t, exact=False)


def test_layer_norm_of_a_large_mean(g):
    t = truth.random_layer(g, 16, 256, rank=16, dtype=FP16)
    x = truth.random_input(g, 1, 4, 256, FP16) + 200
    b = Before("layer_norm", 1e-6, torch.zeros(1, 256, dtype=FP16), torch.zeros(1, 256, dtype=FP16))
    check(quantize(x, t, Reading("int8"), b), truth.quantized_input(x, t, Reading("int8"), b), t, exact=False)


@pytest.mark.parametrize("reading", [r for r in READINGS if r.precision in ("int4", "int8")], ids=name)
@pytest.mark.parametrize("unsigned", [((0, 320),), ((64, 192), (256, 320))])
def test_unsigned(g, reading, unsigned):
    t = truth.random_layer(g, 16, 320, rank=16, unsigned=unsigned)
    x = torch.nn.functional.gelu(truth.random_input(g, 1, 5, 320).float()).to(BF16)
    check(quantize(x, t, reading), truth.quantized_input(x, t, reading), t)


@pytest.mark.parametrize("reading", FOUR, ids=name)
def test_rotated(g, reading):
    t = truth.random_layer(g, 16, 200, rank=16, rotate=True)
    x = truth.random_input(g, 1, 5, 200)
    check(quantize(x, t, reading), truth.quantized_input(x, t, reading), t, exact=False)


@pytest.mark.parametrize("reading", FOUR, ids=name)
@pytest.mark.parametrize(("first", "rotate"), [(128, False), (192, False), (64, True), (72, False)])
def test_second_input(g, reading, first, rotate):
    t = truth.random_layer(g, 16, 448, rank=32, rotate=rotate)
    x = truth.random_input(g, 2, 3, 448)
    q = quantize(x[..., :first], t, reading, second=x[..., first:].contiguous())
    check(q, truth.quantized_input(x, t, reading), t, exact=not rotate)


@pytest.mark.parametrize("rank", [0, 16, 32, 48, 64, 128, 160, 1024])
def test_ranks(g, rank):
    t = truth.random_layer(g, 16, 192, rank=rank)
    x = truth.random_input(g, 1, 5, 192)
    check(quantize(x, t, Reading("int8")), truth.quantized_input(x, t, Reading("int8")), t)


@pytest.mark.parametrize("case", ["layer_norm", "swiglu", "second"])
def test_large_rank_of_what_is_quantized(g, case):
    """The projection in a kernel of its own reads what came out of the first."""
    t = truth.random_layer(g, 16, 192, rank=160)
    x = truth.random_input(g, 2, 5, 384 if case == "swiglu" else 192)
    b = Before() if case == "second" else before(case, g, 2, 192)
    scales = torch.rand(2, 160, generator=g) + 0.5
    expected = truth.quantized_input(x, t, Reading("int8"), b, low_scales=scales)
    parts: dict[str, Any] = {"x": x}
    if case == "second":
        parts = {"x": x[..., :64], "second": x[..., 64:]}
    check(quantize(t=t, reading=Reading("int8"), before=b, low_scales=scales, **parts), expected, t, exact=False)


@pytest.mark.parametrize("shape", [(32,), (2, 32)])
@pytest.mark.parametrize("transposed", [False, True])
def test_low_scales_and_another_branch(g, shape, transposed):
    t = truth.random_layer(g, 16, 256, rank=16)
    x = truth.random_input(g, 2, 5, 256)
    scales = torch.rand(shape[::-1] if transposed else shape, generator=g) + 0.5
    scales = scales.T if transposed and len(shape) == 2 else scales.reshape(shape)
    down = torch.randn(32, 320, generator=g).to(FP16)[:, :256]
    expected = truth.quantized_input(x, replace(t, proj_down=down), Reading("int8"), low_scales=scales)
    check(quantize(x, t, Reading("int8"), proj_down=down, low_scales=scales), expected, t)


@pytest.mark.parametrize("reading", FOUR, ids=name)
def test_strided_inputs(g, reading):
    t = truth.random_layer(g, 16, 256, rank=16)
    storage = truth.random_input(g, 5, 7, 600)
    views = [storage[1:4, 2:6, 20:276], storage[:, :1, 8:264], storage.transpose(0, 1)[:, :, :256]]
    for x in [*views, truth.random_input(g, 1, 256, 6).transpose(1, 2)]:
        check(quantize(x, t, reading), truth.quantized_input(x.contiguous(), t, reading), t)


@pytest.mark.parametrize("reading", FOUR, ids=name)
@pytest.mark.parametrize("kind", ["none", "layer_norm"])
def test_rows_do_not_depend_on_the_batch(g, reading, kind, monkeypatch):
    """Not even where a small chip takes taller tiles for many rows."""
    t = truth.random_layer(g, 16, 256, rank=16)
    x = truth.random_input(g, 2, 35, 256)
    b = before(kind, g, 2, 256)
    monkeypatch.setattr(module, "arch_of", lambda device: Arch("interpreter", units=1))
    whole = quantize(x, t, reading, b)
    check(whole, truth.quantized_input(x, t, reading, b), t, exact=kind == "none")
    for batch, token in ((0, 0), (0, 33), (1, 0), (1, 34)):
        scale, shift = (None if v is None else v[batch : batch + 1] for v in (b.scale, b.shift))
        one = quantize(x[batch : batch + 1, token : token + 1], t, reading, replace(b, scale=scale, shift=shift))
        row = batch * 35 + token
        for attribute in ("codes", "scales", "low"):
            a, e = getattr(one, attribute), getattr(whole, attribute)[row : row + 1]
            assert torch.equal(a.view(torch.uint8), e.contiguous().view(torch.uint8)), attribute


@pytest.mark.parametrize("reading", FOUR, ids=name)
def test_zeros_and_nothing(g, reading):
    t = truth.random_layer(g, 16, 256, rank=16)
    x = truth.random_input(g, 1, 3, 256)
    x[:, 1] = 0
    q = quantize(x, t, reading)
    check(q, truth.quantized_input(x, t, reading), t)
    assert not truth.decode(q, t)[0][1].any()
    assert (q.scales.float()[1] == (0 if reading.precision == "nvfp4" else 1)).all()
    empty = quantize(x[:, :0], t, reading)
    assert empty.codes.shape[0] == empty.scales.shape[0] == 0
    assert empty.low is not None and empty.low.shape == (0, 16)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_a_token_that_is_no_number_stays_none(g, precision, bad):
    t = truth.random_layer(g, 16, 256, rank=0)
    x = truth.random_input(g, 1, 3, 256)
    x[0, 1, 17] = bad
    scales = quantize(x, t, Reading(precision)).scales
    assert scales.isfinite().tolist() == [True, False, True]


def test_codes_of_every_quotient(g):
    """bfloat16 over bfloat16, rounded to bfloat16, for all significands: as a division gives it."""
    significands = 1 + torch.arange(128) / 128
    for sign, power in ((1, 0), (-1, 3)):
        x = (sign * significands).to(BF16).repeat(128, 1)
        s = (significands * 2.0**power).to(BF16)
        t = replace(truth.random_layer(g, 16, 128, rank=0), smooth_factor=s)
        x = torch.stack([x[:, torch.randperm(128, generator=g)] for _ in range(2)])
        check(quantize(x, t, Reading("int4", True)), truth.quantized_input(x, t, Reading("int4", True)), t)


def test_refused(g):
    t = truth.random_layer(g, 16, 256, rank=16)
    x = truth.random_input(g, 1, 3, 256)
    for wrong in (
        {"x": x.float()},
        {"x": x[0]},
        {"x": x[..., :128]},
        {"before": Before("relu")},
        {"before": Before("layer_norm")},
        {"x": x[..., :128], "second": x[..., 128:], "before": Before("gelu")},
        {"x": x[..., :128], "second": x[:, :2, 128:]},
        {"reading": Reading("nvfp4")},
        {"reading": Reading("int8", packed=True)},
        {"proj_down": torch.zeros(16, 128)},
    ):
        with pytest.raises(ValueError):
            quantize(**({"x": x, "t": t, "reading": Reading("int8")} | wrong))


def test_specializations_name_every_argument():
    names = set()
    for s in specializations():
        assert set(s.signature) | set(s.constants) == set(s.kernel.arg_names)
        assert not set(s.signature) & set(s.constants)
        names.add(s.name)
    assert len(names) == len(specializations())
