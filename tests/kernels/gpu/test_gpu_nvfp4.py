"""The nvfp4 product against float64, in Triton's interpreter: all but `tl.dot_scaled` itself, which it cannot run."""

import pytest
import torch

pytest.importorskip("triton")

from truth import output, quantized_input, random_input, random_layer, relative_error

from svdquant.kernels.gpu.arch import Arch
from svdquant.kernels.gpu.nvfp4 import NVFP4, tile_of
from svdquant.kernels.gpu.types import Epilogue, HeadNorm

PRODUCT = NVFP4()
BOUND = {torch.bfloat16: 2.5e-3, torch.float16: 4e-4}


def run(q, layers, dtype=torch.bfloat16, gelu=False):
    """Into a view whose neighbours must stay as they are."""
    n = sum(t.out_features for t in layers)
    wide = torch.full((q.batch, q.tokens + 3, n + 8), float("nan"), dtype=dtype)
    out = wide[:, 1 : 1 + q.tokens, 5 : 5 + n]
    PRODUCT.multiply(q, layers, out, Epilogue(gelu=gelu))
    assert not out.isnan().any()
    assert int(wide.isnan().sum()) == wide.numel() - out.numel()
    return out


def make(seed, batch, tokens, n, k, dtype=torch.bfloat16, **options):
    generator = torch.Generator().manual_seed(seed)
    t = random_layer(generator, n, k, "nvfp4", dtype=dtype, **options)
    x = random_input(generator, batch, tokens, k, dtype)
    return t, quantized_input(x, t, PRODUCT.reading("nvfp4"))


@pytest.mark.parametrize(
    ("n", "k", "options"),
    [
        (64, 256, {}),
        (72, 192, {"rank": 0}),
        (35, 448, {"rank": 16, "bias": False}),
        (130, 200, {"rank": 128}),
        (40, 256, {"rank": 48, "rotate": True}),
        (48, 384, {"unsigned": ((128, 384),)}),
        (40, 384, {"outer_blocks": 3}),
        (40, 640, {"outer_blocks": 5}),
        (40, 240, {"outer_blocks": 5, "rank": 0}),
    ],
)
@pytest.mark.parametrize("tokens", [1, 5, 17])
def test_matches_float64(n, k, options, tokens):
    t, q = make(n + k, 2, tokens, n, k, **options)
    assert PRODUCT.why_not(t, "nvfp4", torch.bfloat16, Arch("interpreter")) is None
    assert relative_error(run(q, [t]).flatten(0, 1), output(q, t)) < BOUND[torch.bfloat16]


@pytest.mark.parametrize(("n", "k"), [(2240, 192), (64, 5600)])
def test_odd_shapes(n, k):
    t, q = make(n, 1, 1, n, k)
    assert relative_error(run(q, [t]).flatten(0, 1), output(q, t)) < BOUND[torch.bfloat16]


def test_float16():
    t, q = make(0, 1, 17, 48, 256, torch.float16)
    assert relative_error(run(q, [t], torch.float16).flatten(0, 1), output(q, t)) < BOUND[torch.float16]


def test_gelu():
    t, q = make(2, 1, 5, 64, 128)
    assert relative_error(run(q, [t], gelu=True).flatten(0, 1), output(q, t, gelu=True)) < BOUND[torch.bfloat16]


def test_groups_of_zeros():
    """Their scale is zero; a scale of the weight's may be the smallest."""
    generator = torch.Generator().manual_seed(3)
    t = random_layer(generator, 32, 128, "nvfp4", rank=0)
    t.wscales[:, 2] = 2.0**-9
    x = random_input(generator, 1, 3, 128)
    x[..., 16:48] = 0
    q = quantized_input(x, t, PRODUCT.reading("nvfp4"))
    assert bool((q.scales.float() == 0).any())
    assert relative_error(run(q, [t]).flatten(0, 1), output(q, t)) < BOUND[torch.bfloat16]


def test_layers_side_by_side():
    generator = torch.Generator().manual_seed(4)
    layers = [random_layer(generator, n, 128, "nvfp4") for n in (40, 64)]
    x = random_input(generator, 2, 3, 128)
    for t in layers:
        t.smooth_factor, t.proj_down = layers[0].smooth_factor, layers[0].proj_down
    q = quantized_input(x, layers[0], PRODUCT.reading("nvfp4"))
    expected = torch.cat([output(q, t) for t in layers], 1)
    assert relative_error(run(q, layers).flatten(0, 1), expected) < BOUND[torch.bfloat16]


def test_rows_do_not_depend_on_each_other():
    generator = torch.Generator().manual_seed(5)
    t = random_layer(generator, 80, 320, "nvfp4", rank=32)
    x = random_input(generator, 1, 40, 320)
    y = run(quantized_input(x, t, PRODUCT.reading("nvfp4")), [t])
    for part in (slice(0, 1), slice(3, 19), slice(0, 33)):
        assert torch.equal(run(quantized_input(x[:, part], t, PRODUCT.reading("nvfp4")), [t]), y[:, part])


def test_what_it_cannot_take():
    generator = torch.Generator().manual_seed(6)
    t = random_layer(generator, 16, 128, "nvfp4")
    for number in (100, 103, 120, 121):
        assert PRODUCT.why_not(t, "nvfp4", torch.bfloat16, Arch("nvidia", number)) is None
    for arch in (Arch("nvidia", 90), Arch("nvidia", 110), Arch("amd")):
        assert "tensor cores" in PRODUCT.why_not(t, "nvfp4", torch.bfloat16, arch)
    arch = Arch("nvidia", 120)
    assert "int8" in PRODUCT.why_not(t, "int8", torch.bfloat16, arch)
    assert "float32" in PRODUCT.why_not(t, "nvfp4", torch.float32, arch)
    assert "int4" in PRODUCT.why_not(random_layer(generator, 16, 128), "nvfp4", torch.bfloat16, arch)
    t.wcscales = torch.ones(16, 3)
    assert "blocks" in PRODUCT.why_not(t, "nvfp4", torch.bfloat16, arch)
    t.wcscales = None
    assert "outer" in PRODUCT.why_not(t, "nvfp4", torch.bfloat16, arch)


def test_fuses():
    norm = HeadNorm((None,), 1e-6, 64)
    assert PRODUCT.fuses(Epilogue(gelu=True), ()) and not PRODUCT.fuses(Epilogue(norm=norm), ())


def test_steps_over_the_columns_do_not_depend_on_the_rows():
    for number in (100, 103, 120):
        arch = Arch("nvidia", number)
        assert len({tile_of(arch, m, 1).columns for m in (1, 16, 17, 4608)}) == 1
