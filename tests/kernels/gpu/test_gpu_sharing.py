"""Layers that read one tensor have it quantized once; whatever else might be its contents, they have it made anew."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

from svdquant.config import LayerSpec
from svdquant.kernels import gpu
from svdquant.kernels.gpu import linear, sharing
from svdquant.nn import SVDQuantLinear
from svdquant.ptq.requantize import solve_together

pytestmark = pytest.mark.skipif(
    gpu.missing() is not None or not gpu.interpreting(), reason="needs triton, and TRITON_INTERPRET=1"
)
K, N, RANK = 128, 64, 16


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(seed: int, count: int, group_seed: int = 0) -> list[SVDQuantLinear]:
    """Layers that were solved together: equal smooth factor and down-projection."""
    dense = [(random(seed + i, N, K), random(seed + i + 50, N)) for i in range(count)]
    smooth = random(group_seed, K).abs() + 0.5
    spec = LayerSpec(rank=RANK, smooth=True)
    records = solve_together(dense, spec, torch.float16, torch.Generator().manual_seed(0), smooth)
    return [SVDQuantLinear.from_tensors(record, torch.float16) for record in records]


@pytest.fixture
def launches(monkeypatch) -> list[Any]:
    monkeypatch.setenv("SVDQUANT_BACKEND", "triton")
    seen: list[Any] = []
    launch = linear.launch_quantize
    monkeypatch.setattr(linear, "launch_quantize", lambda *a: (seen.append(a[1]), launch(*a))[1])
    return seen


@pytest.fixture
def qkv() -> list[SVDQuantLinear]:
    return make(1, 3)


def alone(layers: list[SVDQuantLinear], x: Tensor) -> list[Tensor]:
    """Every layer's output of a tensor of its own."""
    with torch.no_grad():
        return [layer(x.clone()) for layer in layers]


def test_one_input_is_quantized_once(launches, qkv):
    x = random(9, 2, 5, K).half()
    expected = alone(qkv, x)
    assert len(launches) == 3
    launches.clear()
    with torch.no_grad():
        found = [layer(x) for layer in qkv]
        assert len(launches) == 1
        again = [layer(x) for layer in qkv]
    assert len(launches) == 2, "a second forward has its own codes"
    for a, b, c in zip(expected, found, again, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_written_to_in_between(launches, qkv):
    x = random(9, 1, 5, K).half()
    with torch.no_grad():
        qkv[0](x)
        x.mul_(2)
        found = qkv[1](x)
    assert len(launches) == 2 and torch.equal(found, alone(qkv[1:2], x)[0])


def test_written_to_where_torch_does_not_count(launches, qkv):
    """As a compiled kernel does. The same layer never gets old codes; so a forward is right from its first layer on."""
    x = random(9, 1, 5, K).half()
    with torch.no_grad():
        for layer in qkv:
            layer(x)
        x.detach().numpy()[...] = random(10, 1, 5, K).half().numpy()
        found = [layer(x) for layer in qkv]
    for a, b in zip(alone(qkv, x), found, strict=True):
        assert torch.equal(a, b)


def test_other_contents_in_the_same_place(launches, qkv):
    x = random(9, 1, 5, K).half()
    with torch.no_grad():
        qkv[0](x)
        x.data = random(11, 1, 5, K).half()
        found = qkv[1](x)
    assert len(launches) == 2 and torch.equal(found, alone(qkv[1:2], x)[0])


@pytest.mark.parametrize("other", ["smooth", "type of codes", "view"])
def test_layers_that_read_otherwise(launches, qkv, other):
    x, layer = random(9, 1, 6, K).half(), qkv[1]
    if other == "smooth":
        layer = make(1, 1, group_seed=7)[0]
    elif other == "type of codes":
        layer.activations = "int4"
    with torch.no_grad():
        qkv[0](x)
        found = layer(x[:, 1:] if other == "view" else x)
    expected = alone([layer], x[:, 1:] if other == "view" else x)[0]
    assert len(launches) == 3 and torch.equal(found, expected)


def test_changed_parameters(launches, qkv):
    x = random(9, 1, 5, K).half()
    with torch.no_grad():
        qkv[0](x)
        qkv[1].proj_down.mul_(2)
        found = qkv[1](x)
    assert len(launches) == 2 and torch.equal(found, alone(qkv[1:2], x)[0])


def test_nothing_outlives_the_input(launches, qkv):
    x = random(9, 1, 5, K).half()
    with torch.no_grad():
        qkv[0](x)
    assert sharing._local.last is not None
    del x
    gc.collect()
    assert sharing._local.last is None


def test_inference_tensors_are_not_shared(launches, qkv):
    """Nobody counts what is written to them."""
    with torch.inference_mode():
        x = random(9, 1, 5, K).half()
        for layer in qkv:
            layer(x)
    assert len(launches) == 3
