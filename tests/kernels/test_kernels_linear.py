"""`svdquant_linear` and `w4a16_linear` against the second implementation."""

import pytest
import reference64
import torch

from svdquant import SVDQuantError
from svdquant.config import LayerSpec
from svdquant.kernels import svdquant_linear, w4a16_linear
from svdquant.kernels.reference import w4a16_linear as w4a16_reference

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
GROUPS = {"int4": 64, "nvfp4": 16, "int8": 0}
# What is left of a float32 result once it is rounded to the type of x.
ROUNDING = {torch.float32: 1e-5, torch.float16: 4e-4, torch.bfloat16: 2.5e-3}
# (rank, rotate, unsigned, bias, K, N)
LAYERS = [
    (0, False, (), False, 64, 33),
    (16, False, (), True, 130, 65),
    (33, True, (), True, 130, 64),
    (16, True, (), False, 384, 40),
    (33, False, ((64, 192),), True, 320, 48),
    (0, False, ((0, 130),), False, 130, 17),
    (16, False, ((0, 64), (192, 256)), True, 256, 64),
    (0, True, (), True, 100, 31),
]


def layer(weights, rank=16, rotate=False, unsigned=(), bias=True, k=130, n=65, dtype=torch.float32, group=None):
    group = GROUPS[weights] if group is None else group
    spec = LayerSpec(weights=weights, group_size=group, rank=rank, rotate=rotate, unsigned=unsigned)
    return reference64.random_tensors(spec, k, n, bias, dtype, seed=k + n)


def check(tensors, activations, dtype, tolerance, rows=24):
    x = reference64.random_inputs(tensors.spec, rows, tensors.in_features, dtype)
    y = svdquant_linear(x, tensors, activations)
    assert y.shape == (rows, tensors.out_features) and y.dtype == dtype
    expected, certain = reference64.layer(tensors).forward(x.double().numpy(), activations, dtype)
    assert certain.mean() > 0.5
    assert reference64.relative(y.double().numpy()[certain], expected[certain]) <= tolerance


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rank", "rotate", "unsigned", "bias", "k", "n"), LAYERS)
@pytest.mark.parametrize("activations", ["int4", "int8", "fp8", "nvfp4", "none"])
@pytest.mark.parametrize("weights", ["int4", "nvfp4", "int8"])
def test_reference_backend(weights, activations, rank, rotate, unsigned, bias, k, n, dtype, monkeypatch):
    monkeypatch.setenv("SVDQUANT_BACKEND", "reference")
    check(layer(weights, rank, rotate, unsigned, bias, k, n, dtype), activations, dtype, ROUNDING[dtype])


@pytest.mark.parametrize(("rank", "rotate", "unsigned", "bias", "k", "n"), LAYERS)
@pytest.mark.parametrize("activations", ["int4", "int8", "fp8", "nvfp4", "none"])
@pytest.mark.parametrize("weights", ["int4", "nvfp4", "int8"])
def test_dequantize_backend_in_bfloat16(weights, activations, rank, rotate, unsigned, bias, k, n):
    tensors = layer(weights, rank, rotate, unsigned, bias, k, n, torch.bfloat16)
    check(tensors, activations, torch.bfloat16, 6e-3)


@pytest.mark.parametrize("activations", ["int4", "int8", "fp8", "nvfp4", "none"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_dequantize_backend_computes_in_float32_elsewhere_on_a_cpu(dtype, activations):
    check(layer("int4", dtype=dtype), activations, dtype, ROUNDING[dtype])


@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("activations", ["int4", "int8", "nvfp4"])
def test_other_group_sizes(group, activations):
    check(layer("int4", group=group, k=200), activations, torch.float32, 1e-5)
    check(layer("int4", group=group, k=256, unsigned=((128, 256),)), activations, torch.float32, 1e-5)


@pytest.mark.parametrize("activations", ["int8", "fp8", "nvfp4", "none"])
def test_rotated_and_unsigned(activations):
    """The planner never asks for both, but a file may; without 4-bit codes they do not interfere."""
    check(layer("int4", rotate=True, unsigned=((64, 128),)), activations, torch.float32, 1e-5)


def test_smoothing_is_optional():
    spec = LayerSpec(rank=16, smooth=False)
    tensors = reference64.random_tensors(spec, 130, 33, True, torch.float32)
    assert tensors.smooth_factor is None
    check(tensors, "int8", torch.float32, 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("k", "n"), [(64, 33), (100, 65), (320, 48)])
def test_w4a16(k, n, bias, dtype):
    tensors = reference64.random_tensors(LayerSpec("w4a16", rank=0, smooth=False), k, n, bias, dtype)
    x = reference64.random_inputs(tensors.spec, 7, k, dtype)
    y = w4a16_linear(x, tensors.qweight, tensors.wscales, tensors.bias)
    assert y.shape == (7, n) and y.dtype == dtype
    expected, _ = reference64.layer(tensors).forward(x.double().numpy(), "none", dtype)
    tolerance = 6e-3 if dtype == torch.bfloat16 else ROUNDING[dtype]
    assert reference64.relative(y.double().numpy(), expected) <= tolerance
    exact = w4a16_reference(x, tensors.qweight, tensors.wscales, "int4", tensors.bias, torch.float32)
    assert reference64.relative(exact.double().numpy(), expected) <= ROUNDING[dtype]


@pytest.mark.parametrize("shape", [(130,), (0, 130), (2, 0, 130), (1, 130), (2, 3, 130), (2, 1, 5, 130)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_leading_dimensions(shape, dtype):
    tensors = layer("int4", dtype=dtype)
    w4a16 = reference64.random_tensors(LayerSpec("w4a16", rank=0, smooth=False), 130, 65, True, dtype)
    x = reference64.random_inputs(tensors.spec, 30, 130, dtype).flatten()[: torch.Size(shape).numel()].reshape(shape)
    for y, flat in (
        (svdquant_linear(x, tensors), svdquant_linear(x.reshape(-1, 130), tensors)),
        (
            w4a16_linear(x, w4a16.qweight, w4a16.wscales, w4a16.bias),
            w4a16_linear(x.reshape(-1, 130), w4a16.qweight, w4a16.wscales, w4a16.bias),
        ),
    ):
        assert y.shape == (*shape[:-1], 65) and y.dtype == dtype and y.is_contiguous()
        assert torch.equal(y.reshape(-1, 65), flat)


@pytest.mark.parametrize("rows", [5, 64, 100])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activations", ["int4", "int8", "none"])
def test_strides_of_the_input_change_no_bit(activations, dtype, rows):
    tensors = layer("int4", dtype=dtype)
    x = reference64.random_inputs(tensors.spec, rows, 130, dtype)
    w4a16 = reference64.random_tensors(LayerSpec("w4a16", rank=0, smooth=False), 130, 65, True, dtype)
    expected = svdquant_linear(x, tensors, activations)
    plain = w4a16_linear(x, w4a16.qweight, w4a16.wscales, w4a16.bias)
    transposed = x.t().contiguous().t()
    every_other = torch.zeros(rows, 260, dtype=dtype)
    every_other[:, ::2] = x
    wide = torch.zeros(rows, 300, dtype=dtype)
    wide[:, 7:137] = x
    for view in (transposed, every_other[:, ::2], wide[:, 7:137], x[:1].expand(rows, -1)):
        same = view.contiguous()
        want = expected if torch.equal(same, x) else svdquant_linear(same, tensors, activations)
        want_plain = plain if torch.equal(same, x) else w4a16_linear(same, w4a16.qweight, w4a16.wscales, w4a16.bias)
        assert torch.equal(svdquant_linear(view, tensors, activations), want)
        assert torch.equal(w4a16_linear(view, w4a16.qweight, w4a16.wscales, w4a16.bias), want_plain)


def test_the_input_is_left_alone():
    tensors = layer("int4", unsigned=((0, 64),))
    x = reference64.random_inputs(tensors.spec, 8, 130, torch.float32)
    before = x.clone()
    for activations in ("int4", "int8", "fp8", "nvfp4", "none"):
        svdquant_linear(x, tensors, activations)
        assert torch.equal(x, before)


@pytest.mark.parametrize("width", [129, 131, 1])
def test_wrong_number_of_features(width):
    with pytest.raises(SVDQuantError, match=rf"{width} features.* takes 130"):
        svdquant_linear(torch.zeros(2, width), layer("int4"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("weights", ["int4", "nvfp4", "int8"])
def test_opcheck(weights, dtype):
    for rank, bias, unsigned, rows in ((16, True, (0, 64), (2, 3)), (0, False, (), (0,))):
        pairs = (tuple(unsigned),) if unsigned else ()
        t = layer(weights, rank, unsigned=pairs, bias=bias, dtype=dtype)
        x = reference64.random_inputs(t.spec, 6, 130, dtype)[: torch.Size(rows).numel()].reshape(*rows, 130)
        args = (x, t.qweight, t.wscales, t.wcscales, t.smooth_factor, t.proj_down, t.proj_up, t.bias)
        # The schema check itself multiplies every argument, which float8 cannot do.
        checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
        torch.library.opcheck(
            torch.ops.svdquant.linear.default,
            (*args, weights, t.spec.group_size, list(unsigned), False, "int8"),
            test_utils=checks if weights == "nvfp4" else ["test_schema", *checks],
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bias", [False, True])
def test_opcheck_of_w4a16(bias, dtype):
    t = reference64.random_tensors(LayerSpec("w4a16", rank=0, smooth=False), 130, 65, bias, dtype)
    x = reference64.random_inputs(t.spec, 3, 130, dtype)
    torch.library.opcheck(torch.ops.svdquant.w4a16_linear.default, (x, t.qweight, t.wscales, None, t.bias, "int4"))
