"""The 8-bit product against float64: every epilogue, stacks, strided outputs, odd shapes; tiles do not change a bit."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import truth

from svdquant.kernels.gpu.arch import Arch
from svdquant.kernels.gpu.eight_bit import CANDIDATES, EightBit, Tile, multiply_with, tile
from svdquant.kernels.gpu.expand import expand
from svdquant.kernels.gpu.types import NO_EPILOGUE, Epilogue, HeadNorm, Reading

HALF, BRAIN = torch.float16, torch.bfloat16
ROUNDING = {HALF: 6e-4, BRAIN: 5e-3}


def poisoned(q, n, dtype, stride=None):
    memory = torch.full((q.batch, q.tokens, stride or n), float("nan"), dtype=dtype)
    return memory[..., :n]


def expected(q, layers, epilogue=NO_EPILOGUE):
    """float64 [B, L, ΣN] of the expanded weights."""
    parts = []
    for t in layers:
        e = expand([t], q.reading.precision)
        columns = truth.weight(t).shape[1]
        w8 = (e.weight.float().double() * e.scales.double()[:, None])[:, :columns]
        parts.append(truth.output(q, t, w8, gelu=epilogue.gelu))
    y = torch.cat(parts, 1).unflatten(0, (q.batch, q.tokens))
    return y if epilogue.norm is None else truth.head_norm(y, epilogue.norm, [t.out_features for t in layers])


def check(q, layers, dtype, epilogue=NO_EPILOGUE, out=None, run=None):
    n = sum(t.out_features for t in layers)
    out = poisoned(q, n, dtype) if out is None else out
    (run or EightBit().multiply)(q, layers, out, epilogue)
    assert torch.isfinite(out).all()
    assert truth.relative_error(out, expected(q, layers, epilogue)) < ROUNDING[dtype]
    return out


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(7)


def layer_and_input(generator, precision, tokens, n, k, dtype=HALF, batch=1, **spec):
    t = truth.random_layer(generator, n, k, dtype=dtype, **spec)
    x = truth.random_input(generator, batch, tokens, k, dtype)
    return t, truth.quantized_input(x, t, Reading(precision))


@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize(
    "tokens, n, k, spec",
    [
        (1, 96, 64, {}),
        (17, 200, 192, {"rank": 0, "bias": False}),
        (130, 72, 320, {"rank": 48, "unsigned": ((64, 320),)}),
        (5, 40, 128, {"weights": "nvfp4", "rank": 16}),
        (5, 40, 144, {"weights": "nvfp4", "outer_blocks": 3, "smooth": False}),
        (5, 40, 128, {"weights": "int8"}),
        (5, 40, 160, {"weights": "int8", "group": 32}),
        (5, 40, 192, {"rotate": True, "group": 16}),
    ],
)
def test_layers(generator, precision, tokens, n, k, spec):
    t, q = layer_and_input(generator, precision, tokens, n, k, **spec)
    check(q, [t], HALF)


@pytest.mark.parametrize("rank", [16, 128, 300])
def test_ranks(generator, rank):
    t, q = layer_and_input(generator, "int8", 9, 40, 64, rank=rank)
    check(q, [t], HALF)


def test_bfloat16(generator):
    t, q = layer_and_input(generator, "int8", 33, 130, 128, dtype=BRAIN)
    check(q, [t], BRAIN)


def test_parameters_of_another_type(generator):
    t = truth.random_layer(generator, 40, 64, dtype=BRAIN)
    q = truth.quantized_input(truth.random_input(generator, 1, 9, 64, HALF), t, Reading("int8"))
    check(q, [t], HALF)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_gelu(generator, precision):
    t, q = layer_and_input(generator, precision, 20, 40, 64)
    check(q, [t], HALF, Epilogue(gelu=True))


def test_output_may_be_strided(generator):
    t, q = layer_and_input(generator, "int8", 9, 40, 64, batch=3)
    memory = torch.full((3, 20, 64), float("nan"), dtype=HALF)
    out = memory[:, 4:13, 8:48]
    check(q, [t], HALF, out=out)
    assert torch.isnan(memory).sum() == memory.numel() - out.numel()


@pytest.mark.parametrize(
    "head, weighted, rotated", [(64, True, True), (128, True, True), (64, False, True), (64, True, False)]
)
def test_norm_of_heads(generator, head, weighted, rotated):
    """q and k of a stack are normed and rotated, v is not; q has more heads than k and v."""
    widths = [2 * head, head, head]
    layers = [truth.random_layer(generator, n, 64, dtype=HALF) for n in widths]
    for t in layers:
        t.proj_down, t.smooth_factor = layers[0].proj_down, layers[0].smooth_factor
    q = truth.quantized_input(truth.random_input(generator, 2, 9, 64, HALF), layers[0], Reading("int8"))

    def factor():
        return (torch.rand(head, generator=generator) + 0.5).to(HALF)

    angles = torch.rand(2, 9, head, generator=generator)
    cosine, sine = (angles[0].cos(), angles[1].sin()) if rotated else (None, None)
    weights = (factor(), factor()) if weighted else (None, factor())
    norm = HeadNorm(weights, 1e-6, head, cosine, sine)
    assert EightBit().fuses(Epilogue(norm=norm), layers)
    check(q, layers, HALF, Epilogue(norm=norm))
    check(q, layers, HALF, Epilogue(norm=HeadNorm(weights[:1], 1e-6, head, cosine, sine)))


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_launches_agree(generator, precision):
    """Pointers or descriptors, one tile per program or several, any order: the same bits."""
    t, q = layer_and_input(generator, precision, 150, 300, 256)
    launches = [
        Tile(64, 128),
        Tile(64, 128, tma=True),
        Tile(128, 64, bk=64, group=2),
        Tile(64, 256, tma=True, persistent=True),
    ]
    outputs = [
        check(q, [t], HALF, run=lambda *a, launch=launch: multiply_with(launch, *a)) for launch in launches
    ]  # fmt: skip
    assert all(torch.equal(y, outputs[0]) for y in outputs)


def test_rows_do_not_depend_on_others(generator):
    t, q = layer_and_input(generator, "int8", 70, 40, 128)
    whole = check(q, [t], HALF)
    for first, last in ((0, 1), (3, 20), (69, 70)):
        part = type(q)(
            q.reading, 1, last - first, q.codes[first:last].contiguous(), q.scales[first:last], q.low[first:last]
        )
        assert torch.equal(check(part, [t], HALF), whole[:, first:last])


def test_every_chip_has_a_launch():
    shared = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
    for number, limit in shared.items():
        for m in (1, 64, 4608):
            for precision in ("int8", "fp8"):
                t = tile(Arch("nvidia", number), m, 9216, 3072, precision)
                assert (t.bm + t.bn) * t.bk * t.stages < limit
                # Fewer than 64 rows would be multiplied by other instructions, with other bits.
                assert number != 90 or t.bm >= 64
                assert t.tma == (number == 90)
    for t in CANDIDATES.values():
        assert (t.bm + t.bn) * t.bk * t.stages < shared[90]


def test_refusals(generator):
    hopper = Arch("nvidia", 90)
    t = truth.random_layer(generator, 32, 96, group=24)
    assert "no multiple of 16" in EightBit().why_not(t, "int8", HALF, hopper)
    t = truth.random_layer(generator, 32, 96, group=32)
    assert EightBit().why_not(t, "int8", HALF, hopper) is None
    assert "fp8" in EightBit().why_not(t, "fp8", HALF, Arch("nvidia", 80))
    assert "8-bit" in EightBit().why_not(t, "int4", HALF, hopper)
    assert not EightBit().fuses(Epilogue(norm=HeadNorm((None,), 1e-6, 64)), [t])
