"""The INT4 kernel's own source, its lanes and its assembly emulated, against plain products of the stored numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gluon_emulation
import pytest
import torch
import truth
from torch import Tensor

import svdquant.kernels.gpu.int4_mma as int4_mma
from svdquant.kernels.gpu.arch import Arch
from svdquant.kernels.gpu.int4_mma import LARGE, MEDIUM, SMALL, Int4MMA, Tile, launch_arguments, tile_of
from svdquant.kernels.gpu.types import Epilogue, HeadNorm, Quantized
from svdquant.numerics import SVDQuantTensors

# Small enough to emulate, with more than one tile and warp in both directions.
TINY = Tile(1, 2, 2, 2, 3)
AMPERE = Arch("nvidia", 80)


@pytest.fixture(scope="module")
def run() -> Any:
    program = [0]
    source = Path(int4_mma.__file__).with_name("int4_mma_kernel.py")
    kernel = gluon_emulation.emulated(source, program).int4_linear

    def multiply(q: Quantized, t: SVDQuantTensors, out: Tensor, gelu: bool = False, tile: Tile = TINY) -> None:
        arguments, constants = launch_arguments(q, t, out, gelu, tile)
        m, n = q.codes.shape[0], t.out_features
        grid = -(-m // tile.rows) * -(-n // tile.columns)
        gluon_emulation.launch(kernel, program, grid, arguments | constants)

    return multiply


def quantized(t: SVDQuantTensors, batch: int, tokens: int, seed: int = 1) -> Quantized:
    g = torch.Generator().manual_seed(seed)
    x = truth.random_input(g, batch, tokens, t.in_features, t.wscales.dtype)
    return truth.quantized_input(x, t, Int4MMA().reading("int4"))


@pytest.mark.parametrize(
    ("m", "n", "k", "unsigned"),
    [
        (32, 32, 128, ()),
        (1, 1, 64, ()),
        (37, 45, 192, ()),
        (70, 33, 320, ((0, 320),)),
        (19, 40, 384, ((128, 320),)),
        (5, 9, 200, ((64, 200),)),
    ],
)
def test_integer_sums_are_exact(run: Any, m: int, n: int, k: int, unsigned: tuple[tuple[int, int], ...]) -> None:
    g = torch.Generator().manual_seed(m)
    t = truth.random_layer(g, n, k, rank=0, unsigned=unsigned, bias=False, dtype=torch.float16)
    # Scales are powers of two, sums stay below 2²⁴: every step of the kernel is exact but its one rounding.
    t.wscales = torch.exp2(torch.randint(-3, 1, t.wscales.shape, generator=g).float()).half()
    columns = -(-t.qweight.shape[1] * 2 // 128) * 128
    codes = torch.randint(0, 256, (m, columns // 2), generator=g).to(torch.uint8)
    codes[:, t.qweight.shape[1] :] = 0
    scales = torch.exp2(torch.randint(-6, -3, (m, columns // 64), generator=g).float())
    q = Quantized(Int4MMA().reading("int4"), 1, m, codes, scales, None)
    out = torch.full((1, m, n), float("nan"), dtype=torch.float16)
    run(q, t, out)
    expected = truth.output(q, t)
    assert torch.equal(out[0], expected.half())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rank", "tile", "k"),
    [
        (16, TINY, 256),
        (32, replace(TINY, stages=2), 128),
        (40, TINY, 192),
        (160, TINY, 64),
        (32, SMALL, 256),
        (0, TINY, 640),
        (32, replace(TINY, stages=4, row_tiles=2, column_tiles=1), 448),
    ],
)
def test_layers(run: Any, rank: int, tile: Tile, k: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(rank)
    t = truth.random_layer(g, 45, k, rank=rank, dtype=dtype)
    q = quantized(t, 2, 21)
    out = torch.full((2, 21, 45), float("nan"), dtype=dtype)
    run(q, t, out, tile=tile)
    expected = truth.output(q, t)
    # Products of 32 terms in float32, one rounding.
    limit = torch.finfo(dtype).eps * expected.abs() / 2 * 1.001 + 1e-5
    assert ((out.flatten(0, 1).double() - expected).abs() <= limit).all()


def test_gelu_unsigned_groups_and_strides(run: Any) -> None:
    g = torch.Generator().manual_seed(3)
    t = truth.random_layer(g, 40, 256, rank=16, unsigned=((64, 192),))
    q = quantized(t, 3, 7)
    whole = torch.full((3, 11, 64), 7.0, dtype=torch.bfloat16)
    out = whole[:, 2:9, 8:48]
    run(q, t, out, gelu=True)
    expected = truth.output(q, t, gelu=True).view(3, 7, 40)
    assert truth.relative_error(out, expected) < 3e-3
    outside = torch.ones_like(whole, dtype=torch.bool)
    outside[:, 2:9, 8:48] = False
    assert (whole[outside] == 7).all()


def test_rows_do_not_depend_on_their_number_or_tile(run: Any) -> None:
    g = torch.Generator().manual_seed(4)
    t = truth.random_layer(g, 33, 320, rank=32)
    q = quantized(t, 1, 40)
    full = torch.empty(1, 40, 33, dtype=torch.bfloat16)
    run(q, t, full)
    assert q.low is not None
    few = replace(q, tokens=3, codes=q.codes[20:23], scales=q.scales[20:23], low=q.low[20:23])
    part = torch.empty(1, 3, 33, dtype=torch.bfloat16)
    run(few, t, part, tile=SMALL)
    assert torch.equal(part, full[:, 20:23])


@pytest.mark.parametrize("exponent", [-60, 60])
def test_extreme_scales(run: Any, exponent: int) -> None:
    """What the float trick of the sums multiplies by 3072 stays finite and exact."""
    g = torch.Generator().manual_seed(6)
    t = truth.random_layer(g, 16, 128, rank=0, bias=False)
    q = quantized(t, 1, 16)
    q = replace(q, scales=q.scales * 2.0**exponent)
    out = torch.empty(1, 16, 16, dtype=torch.bfloat16)
    run(q, t, out)
    assert truth.relative_error(out[0], truth.output(q, t)) < 3e-3


def test_which_layers_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    t = truth.random_layer(g, 16, 256)
    product = Int4MMA()

    def why(layer: SVDQuantTensors = t, activations: str = "int4", arch: Arch = AMPERE) -> str:
        return product.why_not(layer, activations, torch.bfloat16, arch) or ""

    assert why() == ""
    assert why(arch=Arch("nvidia", 89)) == ""
    assert "int8" in why(activations="int8")
    assert "32" in why(truth.random_layer(g, 16, 256, group=32))
    assert "int4" in why(truth.random_layer(g, 16, 256, weights="nvfp4"))
    assert "ranges" in why(truth.random_layer(g, 16, 384, unsigned=((0, 64), (192, 256))))
    assert why(truth.random_layer(g, 16, 384, unsigned=((0, 64), (64, 256)))) == ""
    assert "16-bit" in (product.why_not(t, "int4", torch.float32, AMPERE) or "")
    assert "sm_90" in why(arch=Arch("nvidia", 90))
    assert "NVIDIA" in why(arch=Arch("amd"))
    monkeypatch.setenv("SVDQUANT_BACKEND", "int4_mma")
    assert why(arch=Arch("nvidia", 90)) == ""
    assert "NVIDIA" in why(arch=Arch("interpreter"))


def test_epilogues_that_it_fuses() -> None:
    product = Int4MMA()
    assert product.fuses(Epilogue(gelu=True), [])
    assert not product.fuses(Epilogue(norm=HeadNorm((None,), 1e-6, 64)), [])


def test_tiles_fill_the_chip() -> None:
    assert tile_of(AMPERE, 4608, 3072) == LARGE
    assert tile_of(AMPERE, 256, 3072) == MEDIUM
    assert tile_of(AMPERE, 4, 3072) == SMALL
    for tile in (LARGE, MEDIUM, SMALL):
        assert 32 % (tile.columns // 8) == 0
