"""Layers in use: views, gradients, modes of torch, casts, weights that change, copies."""

from __future__ import annotations

import copy
import pickle

import cpu_truth
import pytest
import torch
from cpu_layers import Block, block_inputs, quantized, weights_only
from cpu_truth import BF16, DTYPES, FP16, FP32
from torch import nn

from svdquant import SVDQuantError
from svdquant.kernels import svdquant_linear, w4a16_linear
from svdquant.nn import SVDQuantConv2d


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_and_offsets_of_the_input(path, dtype):
    t = cpu_truth.layer(130, 65, dtype=dtype)
    plain = cpu_truth.layer(130, 65, dtype=dtype, rank=0, kind="w4a16", smooth=False)
    x = cpu_truth.inputs(24, 130, dtype)
    wide, every_third = torch.zeros(24, 300, dtype=dtype), torch.zeros(24, 390, dtype=dtype)
    wide[:, 7:137], every_third[:, ::3] = x, x
    odd_start = torch.zeros(24 * 130 + 3, dtype=dtype)[3:].view(24, 130).copy_(x)
    views = {
        "transposed": x.t().contiguous().t(),
        "slice of columns": wide[:, 7:137],
        "strided columns": every_third[:, ::3],
        "offset": odd_start,
        "expanded": x[:1].expand(24, -1),
        "expanded columns": x[:, :1].expand(-1, 130),
        "every other row": x.repeat_interleave(2, 0)[::2],
        "reversed by index": x.flip(0).flip(0),
        "heads": x.reshape(2, 12, 130).transpose(0, 1).contiguous().transpose(0, 1),
        "permuted": x.reshape(2, 3, 4, 130).permute(2, 0, 1, 3),
        "zero rows of a wide one": wide[:0, 7:137],
    }
    for name, view in views.items():
        same = view.contiguous().clone()
        for activations in ("int8", "int4"):
            y = svdquant_linear(view, t, activations)
            assert y.is_contiguous() and torch.equal(y, svdquant_linear(same, t, activations)), name
        y = w4a16_linear(view, plain.qweight, plain.wscales, plain.bias)
        assert y.is_contiguous() and torch.equal(y, w4a16_linear(same, plain.qweight, plain.wscales, plain.bias)), name


@pytest.mark.parametrize("activations", ["int8", "int4"])
def test_parameters_that_are_views(path, activations):
    """Members of fused layers, and tensors of a mapped file that start at any byte."""
    t = cpu_truth.layer(130, 65, dtype=BF16)
    x = cpu_truth.inputs(5, 130, BF16)
    expected = svdquant_linear(x, t, activations)
    moved = copy.copy(t)
    for name, value in t.named().items():
        raw = torch.zeros(value.numel() * value.element_size() + 2, dtype=torch.uint8)
        start = 1 if value.element_size() == 1 else 2
        raw[start : start + value.numel() * value.element_size()] = value.contiguous().view(torch.uint8).flatten()
        view = raw[start : start + value.numel() * value.element_size()].view(value.dtype).view(value.shape)
        setattr(moved, name, view)
    assert torch.equal(svdquant_linear(x, moved, activations), expected)
    for name, value in t.named().items():
        wide = torch.zeros(*value.shape, 2, dtype=value.dtype)
        wide[..., 0] = value
        setattr(moved, name, wide[..., 0])
    assert torch.equal(svdquant_linear(x, moved, activations), expected)


def test_parameters_are_left_as_they_are(path):
    """What is saved after running is what was loaded."""
    block = Block()
    before = {name: p.clone() for name, p in block.state_dict().items()}
    pointers = {name: p.data_ptr() for name, p in block.named_parameters()}
    with torch.no_grad():
        block(*block_inputs())
    for name, p in block.state_dict().items():
        assert p.dtype == before[name].dtype and torch.equal(p.view(torch.uint8), before[name].view(torch.uint8)), name
    assert pointers == {name: p.data_ptr() for name, p in block.named_parameters()}


@pytest.mark.parametrize("activations", ["int8", "int4"])
@pytest.mark.parametrize("options", [{}, {"rotate": True}, {"unsigned": ((0, 64),)}, {"weights": "nvfp4"}], ids=str)
def test_gradients_are_those_of_the_dense_layer(path, options, activations):
    t = cpu_truth.layer(128, 48, **options)
    x = cpu_truth.inputs(10, 128, FP32).reshape(2, 5, 128).requires_grad_()
    upstream = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(0))
    y = svdquant_linear(x, t, activations)
    assert torch.equal(y.detach(), svdquant_linear(x.detach(), t, activations))
    y.backward(upstream)
    expected = upstream.double() @ t.dense()[0].double()
    assert float((x.grad.double() - expected).norm() / expected.norm()) < 1e-5
    cpu_truth.check(path, y.flatten(0, 1), cpu_truth.output(x.detach().flatten(0, 1), t, activations), t)


def test_gradients_through_a_block(path):
    block = Block(dtype=FP32)
    x, t = block_inputs(dtype=FP32)
    x.requires_grad_()
    block(x, t).sum().backward()
    assert bool(x.grad.isfinite().all()) and float(x.grad.norm()) > 0
    w = weights_only(128, 48, FP32, zeros=True)
    z = x.detach().clone().requires_grad_()
    w(z).sum().backward()
    expected = cpu_truth.weight(w.tensors()).sum(0)
    assert float((z.grad.double() - torch.from_numpy(expected)).abs().max()) < 1e-4


def test_modes_of_torch_change_nothing(path):
    block = Block()
    x, t = block_inputs()
    expected = block(x, t).detach()
    with torch.inference_mode():
        assert torch.equal(block(x, t), expected)
        assert torch.equal(block(x.clone(), t.clone()), expected)
    with torch.no_grad():
        assert torch.equal(block(x, t), expected)
    made_there = torch.inference_mode()(lambda: (x * 1, t * 1))()
    with torch.no_grad():
        assert torch.equal(block(*made_there), expected)


def test_autocast_does_not_reach_inside(path):
    layer, plain = quantized(130, 40, dtype=FP32), weights_only(130, 40, FP32)
    for dtype in (FP32, BF16, FP16):
        x = cpu_truth.inputs(5, 130, dtype)
        with torch.autocast("cpu", dtype=BF16):
            inside = layer(x), plain(x)
        assert inside[0].dtype == dtype and torch.equal(inside[0], layer(x)) and torch.equal(inside[1], plain(x))


@pytest.mark.parametrize("dtype", [FP16, FP32], ids=str)
def test_a_model_that_is_cast(path, dtype):
    layer, plain = quantized(130, 40, "int4", rotate=True), weights_only(130, 40)
    layer(cpu_truth.inputs(3, 130, BF16)), plain(cpu_truth.inputs(3, 130, BF16))
    layer.to(dtype), plain.to(dtype)
    x = cpu_truth.inputs(6, 130, dtype)
    cpu_truth.check_linear(path, x, layer.tensors(), "int4")
    cpu_truth.check_weight_only(path, x, plain.tensors())


def test_weights_that_change(path):
    """After loading another state, or an edit in place, the layer computes with what it holds now."""
    layer, plain = quantized(130, 40, dtype=FP32), weights_only(130, 40, FP32)
    x = cpu_truth.inputs(6, 130, FP32)
    layer(x), plain(x)
    layer.load_state_dict(quantized(130, 40, dtype=FP32, seed=9).state_dict())
    plain.load_state_dict(weights_only(130, 40, FP32, seed=9).state_dict())
    cpu_truth.check_linear(path, x, layer.tensors(), "int8", "another state")
    cpu_truth.check_weight_only(path, x, plain.tensors())
    for edit in (
        lambda p: p.qweight.data.bitwise_xor_(0x35),
        lambda p: p.wscales.data.mul_(2),
        lambda p: p.bias.data.add_(1),
        lambda p: p.qweight.numpy().fill(0x13),
        lambda p: setattr(p, "qweight", nn.Parameter(p.qweight.flip(0), requires_grad=False)),
    ):
        edit(layer), edit(plain)
        cpu_truth.check_linear(path, x, layer.tensors(), "int8")
        cpu_truth.check_weight_only(path, x, plain.tensors())
    for edit in (
        lambda p: p.smooth_factor.data.mul_(1.5),
        lambda p: p.proj_down.data.mul_(-2),
        lambda p: p.proj_up.data.add_(0.1),
        lambda p: setattr(p, "proj_up", nn.Parameter(p.proj_up.flip(0), requires_grad=False)),
    ):
        edit(layer)
        cpu_truth.check_linear(path, x, layer.tensors(), "int8")


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def test_another_default_device(path):
    """As while a model is being built elsewhere, or where tensors are made on an accelerator by default."""
    t, plain = cpu_truth.layer(130, 40, unsigned=((0, 64),)), weights_only(130, 40, FP32)
    x = cpu_truth.inputs(6, 130, FP32)
    expected = [svdquant_linear(x, t, "int8"), svdquant_linear(x, t, "int4"), plain(x)]
    with torch.device("meta"):
        results = [svdquant_linear(x, t, "int8"), svdquant_linear(x, t, "int4"), plain(x)]
    for y, wanted in zip(results, expected, strict=True):
        assert y.device.type == "cpu" and torch.equal(y, wanted)
    torch.set_default_dtype(torch.float64)
    try:
        assert close(svdquant_linear(x, t, "int8"), expected[0]) and torch.equal(plain(x), expected[2])
    finally:
        torch.set_default_dtype(torch.float32)


def test_views_whose_sign_is_pending(path):
    """The imaginary part of a conjugate is such a view: its numbers are those of its memory, negated."""
    for activations in ("int8", "int4"):
        t = cpu_truth.layer(130, 40)
        x = cpu_truth.inputs(6, 130, FP32)
        expected = svdquant_linear(x, t, activations)
        view = torch.complex(torch.zeros(6, 130), -x).conj().imag
        assert view.is_neg() and torch.equal(view, x)
        assert torch.equal(svdquant_linear(view, t, activations), expected)
        for name in ("bias", "smooth_factor", "proj_up", "proj_down"):
            moved = copy.copy(t)
            setattr(moved, name, torch._neg_view(-getattr(t, name)))
            assert torch.equal(svdquant_linear(x, moved, activations), expected), name
    plain = weights_only(130, 40, FP32)
    assert torch.equal(plain(view), plain(x))


def test_kinds_of_tensors(path):
    """Parameters, buffers, subclasses and tensors of inference are tensors."""

    class Named(torch.Tensor):
        pass

    t, plain = cpu_truth.layer(130, 40, dtype=BF16), weights_only(130, 40)
    x = cpu_truth.inputs(6, 130, BF16)
    expected = svdquant_linear(x, t, "int8")
    for kind in (nn.Parameter(x.clone()), nn.Parameter(x.clone(), False), nn.Buffer(x.clone()), x.as_subclass(Named)):
        assert torch.equal(svdquant_linear(kind, t, "int8").detach().as_subclass(torch.Tensor), expected), type(kind)
        assert torch.equal(plain(kind).detach().as_subclass(torch.Tensor), plain(x))
    t.proj_up = nn.Parameter(t.proj_up)
    assert torch.equal(svdquant_linear(x, t, "int8").detach(), expected)
    with torch.inference_mode():
        other = cpu_truth.layer(130, 40, dtype=BF16)
    assert torch.equal(svdquant_linear(x, other, "int8"), expected)


def test_records_can_be_copied_after_use(path):
    for activations in ("int8", "int4"):
        t = cpu_truth.layer(130, 40)
        x = cpu_truth.inputs(3, 130, FP32)
        expected = svdquant_linear(x, t, activations)
        for twin in (copy.copy(t), copy.deepcopy(t), pickle.loads(pickle.dumps(t))):
            assert torch.equal(svdquant_linear(x, twin, activations), expected)
        twin = copy.deepcopy(t)
        del t
        assert torch.equal(svdquant_linear(x, twin, activations), expected)


def test_copies_and_pickles(path, tmp_path):
    block = Block()
    x, t = block_inputs()
    with torch.no_grad():
        expected = block(x, t)
        twin = copy.deepcopy(block)
        assert torch.equal(twin(x, t), expected)
        twin = copy.deepcopy(block)
        torch.save(block, tmp_path / "block.pt")
        assert torch.equal(torch.load(tmp_path / "block.pt", weights_only=False)(x, t), expected)
        del block
        assert torch.equal(twin(x, t), expected)


def test_a_convolution(path):
    for activations in ("int8", "int4"):
        t = cpu_truth.layer(130, 45, dtype=BF16)
        conv = SVDQuantConv2d.from_tensors(t, BF16)
        conv.activations = activations
        x = cpu_truth.inputs(2 * 3 * 5, 130, BF16).reshape(2, 3, 5, 130).movedim(-1, 1)
        expected = cpu_truth.output(x.movedim(1, -1).reshape(-1, 130), t, activations)
        for image in (x, x.contiguous(), x.contiguous(memory_format=torch.channels_last)):
            y = conv(image)
            assert y.shape == (2, 45, 3, 5)
            cpu_truth.check(path, y.movedim(1, -1).reshape(-1, 45), expected, t)


@pytest.mark.parametrize("width", [1, 129, 131, 192])
def test_inputs_of_another_width(path, width):
    layer = quantized(130, 40)
    for shape in ((2, width), (0, width), (width,)):
        with pytest.raises(SVDQuantError, match=rf"{width} features.* takes 130"):
            layer(torch.zeros(shape, dtype=BF16))
