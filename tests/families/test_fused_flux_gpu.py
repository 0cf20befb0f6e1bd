"""FLUX.1's blocks by a GPU's kernels: what is computed together equals what is computed apart."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import torch
from fused_cases import needs_interpreter
from test_fused_flux import BLOCKS, arguments, error, plain, randomize_norms, run
from torch import nn

import svdquant
from svdquant.families import fused
from svdquant.families.fused.inputs import alike, reading_key
from svdquant.nn import SVDQuantLinear

pytestmark = needs_interpreter
TOGETHER = ("multiply", (3, False, True))


@pytest.fixture(scope="module")
def quantized() -> Any:
    model = tiny.transformer().to(torch.float16)
    randomize_norms(model)
    svdquant.quantize(model, tiny.config())
    fused.install(model)
    return model


@pytest.fixture
def interpreted(quantized, monkeypatch) -> Any:
    monkeypatch.setenv("SVDQUANT_BACKEND", "triton")
    return copy.deepcopy(quantized)


@pytest.fixture
def model(interpreted, replaced) -> Any:
    return interpreted


def inputs(batch: int = 1, text: int = 5) -> dict[str, Any]:
    return arguments(batch, text, torch.float16)


DOUBLE = [
    *[("quantize", ("layer_norm", False)), TOGETHER] * 2,
    *[("quantize", ("none", False)), ("multiply", (1, False, False))] * 2,
    *[("quantize", ("layer_norm", False)), ("multiply", (1, True, False))] * 2,
    *[("quantize", ("none", False)), ("multiply", (1, False, False))] * 2,
]
SINGLE = [
    *[("quantize", ("layer_norm", False)), ("multiply", (1, True, False)), TOGETHER],
    *[("quantize", ("none", True)), ("multiply", (1, False, False))],
]


@pytest.mark.parametrize(("name", "kernels"), [(BLOCKS[0], DOUBLE), (BLOCKS[1], SINGLE)], ids=BLOCKS)
@pytest.mark.parametrize(("batch", "text"), [(1, 5), (2, 3)])
def test_together_and_apart(model, launched, name, kernels, batch, text):
    block, given = model.get_submodule(name), inputs(batch, text)
    together = run(block, **given)
    assert sorted(map(str, launched)) == sorted(map(str, kernels))
    assert error(together, run(plain(block), **given)) < 5e-3


@pytest.mark.parametrize("name", BLOCKS)
def test_by_the_kernels(interpreted, launched, name, monkeypatch):
    """Compiled without a break, and launched directly; beside the stored numbers, whose 8-bit copies differ by 1 %."""
    block, given = interpreted.get_submodule(name), inputs(2, 3)
    directly = run(block, **given)
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    count = len(launched)
    assert error(run(compiled, **given), directly) < 2e-3
    assert TOGETHER in launched[:count] and TOGETHER in launched[count:]
    monkeypatch.setenv("SVDQUANT_BACKEND", "reference")
    assert error(directly, run(plain(block), **given)) < 5e-3


class _Wrapper(nn.Module):
    """Something that has taken a layer's place."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, x):
        return self.base(x) + 1


@pytest.mark.parametrize("place", ["attn.to_k", "attn.to_out.0", "ff.net.2", "ff.net.0.proj", "norm1.linear"])
def test_what_took_a_place_is_called(model, place):
    block = model.transformer_blocks[0]
    parent, _, child = place.rpartition(".")
    owner = block.get_submodule(parent)
    if isinstance(owner, nn.ModuleList):
        owner[int(child)] = _Wrapper(owner[int(child)])
    else:
        setattr(owner, child, _Wrapper(getattr(owner, child)))
    assert error(run(block, **inputs()), run(plain(block), **inputs())) < 5e-3


@pytest.mark.parametrize("place", ["attn.to_k", "attn", "norm1", "attn.norm_q", "ff", "ff.net.0", "norm2"])
def test_hooks_are_called(model, place):
    block = model.transformer_blocks[0]
    called = []
    expected = run(block, **inputs())
    block.get_submodule(place).register_forward_hook(lambda *args: called.append(place))
    assert error(run(block, **inputs()), expected) < 5e-3
    assert called == [place]


def test_layers_that_read_differently_are_not_stacked(model, launched):
    block = model.single_transformer_blocks[0]
    with torch.no_grad():
        block.attn.to_k.proj_down.mul_(2)
    together = run(block, **inputs())
    assert TOGETHER not in launched
    assert error(together, run(plain(block), **inputs())) < 5e-3


def test_switched_off(model, launched, monkeypatch):
    monkeypatch.setenv("SVDQUANT_FUSE", "0")
    expected = run(plain(model.single_transformer_blocks[0]), **inputs())
    launched.clear()
    assert torch.equal(run(model.single_transformer_blocks[0], **inputs()), expected)
    assert TOGETHER not in launched


def test_digests_follow_the_parameters(quantized):
    layers = [quantized.single_transformer_blocks[0].attn.to_q]
    layer = copy.deepcopy(layers[0])
    assert type(layer) is SVDQuantLinear
    before = reading_key(layer)
    with torch.no_grad():
        layer.proj_down.mul_(2)
    assert reading_key(layer) != before and not alike((layer, layers[0]))
    with torch.no_grad():
        layer.proj_down.div_(2)
    assert reading_key(layer) == before == reading_key(copy.deepcopy(layer))
    assert alike((layer, layers[0]))
    layer.activations = "int4"
    assert not alike((layer, layers[0]))


def test_digests_know_another_parameter_and_another_type(quantized):
    """The address of a parameter that is gone, and its count of writings, may be the next one's."""
    layer = copy.deepcopy(quantized.single_transformer_blocks[0].attn.to_q)
    first, before = layer.proj_down.detach().clone(), reading_key(layer)
    for i in range(8):
        layer.proj_down = None
        layer.proj_down = nn.Parameter(first * (i + 2), requires_grad=False)
        now = reading_key(layer)
        assert now != before
        before = now
    assert reading_key(layer.to(torch.bfloat16)) != before
