"""The product with exact group scales, in Triton's interpreter, against float64."""

import pytest
import torch

pytest.importorskip("triton")

from truth import output, quantized_input, random_input, random_layer, relative_error

from svdquant.kernels.gpu.arch import Arch
from svdquant.kernels.gpu.grouped import Grouped, tile_of
from svdquant.kernels.gpu.types import Epilogue, HeadNorm

PRODUCT = Grouped()
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


def rows(y):
    return y.flatten(0, 1)


def make(seed, batch, tokens, n, k, activations, dtype=torch.bfloat16, **options):
    generator = torch.Generator().manual_seed(seed)
    t = random_layer(generator, n, k, dtype=dtype, **options)
    x = random_input(generator, batch, tokens, k, dtype)
    return t, quantized_input(x, t, PRODUCT.reading(activations))


@pytest.mark.parametrize("activations", ["int4", "int8"])
@pytest.mark.parametrize(
    ("n", "k", "options"),
    [
        (64, 256, {}),
        (72, 192, {"rank": 0}),
        (35, 448, {"rank": 16, "bias": False}),
        (64, 200, {"rank": 128}),
        (40, 256, {"rank": 48, "rotate": True}),
        (48, 384, {"unsigned": ((128, 384),)}),
        (48, 300, {"weights": "int8"}),
        (48, 256, {"weights": "int8", "group": 64}),
        (32, 144, {"weights": "int8", "group": 48}),
        (40, 272, {"weights": "nvfp4"}),
        (40, 192, {"weights": "nvfp4", "outer_blocks": 3}),
    ],
)
def test_matches_float64(n, k, options, activations):
    t, q = make(n + k, 2, 5, n, k, activations, **options)
    assert PRODUCT.why_not(t, activations, torch.bfloat16, Arch("interpreter")) is None
    assert relative_error(rows(run(q, [t])), output(q, t)) < BOUND[torch.bfloat16]


@pytest.mark.parametrize("group", [16, 32, 96, 128])
def test_groups_of_int4_weights(group):
    t, q = make(group, 1, 5, 32, 384, "int8", group=group)
    assert relative_error(rows(run(q, [t])), output(q, t)) < BOUND[torch.bfloat16]


@pytest.mark.parametrize(("n", "k"), [(2240, 192), (64, 5600)])
def test_odd_shapes(n, k):
    t, q = make(n, 1, 1, n, k, "int4")
    assert relative_error(rows(run(q, [t])), output(q, t)) < BOUND[torch.bfloat16]


@pytest.mark.parametrize("activations", ["int4", "int8"])
def test_float16(activations):
    t, q = make(0, 1, 17, 48, 256, activations, torch.float16)
    assert relative_error(rows(run(q, [t], torch.float16)), output(q, t)) < BOUND[torch.float16]


def test_parameters_of_the_other_type():
    generator = torch.Generator().manual_seed(1)
    t = random_layer(generator, 48, 128, dtype=torch.float16)
    q = quantized_input(random_input(generator, 1, 5, 128, torch.bfloat16), t, PRODUCT.reading("int4"))
    # U is multiplied in the type of the input.
    t.proj_up = t.proj_up.bfloat16().half()
    assert relative_error(rows(run(q, [t])), output(q, t)) < BOUND[torch.bfloat16]


def test_gelu():
    t, q = make(2, 1, 5, 64, 128, "int8")
    assert relative_error(rows(run(q, [t], gelu=True)), output(q, t, gelu=True)) < BOUND[torch.bfloat16]


def test_layers_side_by_side():
    generator = torch.Generator().manual_seed(3)
    layers = [random_layer(generator, n, 128) for n in (40, 64)]
    x = random_input(generator, 2, 3, 128)
    for t in layers:
        t.smooth_factor, t.proj_down = layers[0].smooth_factor, layers[0].proj_down
    q = quantized_input(x, layers[0], PRODUCT.reading("int8"))
    expected = torch.cat([output(q, t) for t in layers], 1)
    assert relative_error(rows(run(q, layers)), expected) < BOUND[torch.bfloat16]


@pytest.mark.parametrize("activations", ["int4", "int8"])
def test_rows_do_not_depend_on_each_other(activations):
    generator = torch.Generator().manual_seed(4)
    t = random_layer(generator, 80, 320, rank=32)
    x = random_input(generator, 1, 70, 320)
    reading = PRODUCT.reading(activations)
    y = run(quantized_input(x, t, reading), [t])
    for part in (slice(0, 1), slice(3, 20), slice(0, 65)):
        assert torch.equal(run(quantized_input(x[:, part], t, reading), [t]), y[:, part])


def test_what_it_cannot_take():
    arch = Arch("nvidia", 90)
    generator = torch.Generator().manual_seed(5)
    t = random_layer(generator, 16, 128)
    assert PRODUCT.why_not(t, "int4", torch.bfloat16, arch) is None
    assert "fp8" in PRODUCT.why_not(t, "fp8", torch.bfloat16, arch)
    assert "float32" in PRODUCT.why_not(t, "int8", torch.float32, arch)
    wide = random_layer(generator, 16, 128, group=128)
    assert "groups of 128" in PRODUCT.why_not(wide, "int4", torch.bfloat16, arch)
    assert PRODUCT.why_not(wide, "int8", torch.bfloat16, arch) is None
    t.wzeros = t.wscales
    assert "zero" in PRODUCT.why_not(t, "int8", torch.bfloat16, arch)


def test_fuses():
    norm = HeadNorm((None,), 1e-6, 64)
    assert PRODUCT.fuses(Epilogue(gelu=True), ()) and not PRODUCT.fuses(Epilogue(norm=norm), ())


def test_few_rows_get_a_small_tile():
    arch = Arch("nvidia", 90)
    assert tile_of(arch, 1, 64, "int4").tokens < tile_of(arch, 4096, 64, "int4").tokens
