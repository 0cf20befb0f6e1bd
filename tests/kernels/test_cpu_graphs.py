"""Layers that are offloaded, compiled, exported, traced."""

from __future__ import annotations

import copy
import shutil
import weakref
from collections.abc import Callable

import cpu_truth
import pytest
import torch
import torch._inductor.config
from accelerate import cpu_offload, disk_offload
from cpu_layers import Block, block_inputs, quantized, weights_only
from cpu_truth import BF16, FP32
from diffusers.hooks import apply_group_offloading
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Fused pointwise operations round less often; codes then differ here and there."""
    return a.dtype == b.dtype and float((a.double() - b.double()).norm() / b.double().norm()) < 0.02


@pytest.mark.parametrize("offload", ["cpu", "disk", "group leaf", "group block"])
def test_offloaded(path, offload, tmp_path):
    model = nn.ModuleList([Block(), Block()])
    x, t = block_inputs()

    def run() -> torch.Tensor:
        h = x
        for block in model:
            h = block(h, t)
        return h

    cpu = torch.device("cpu")
    with torch.no_grad():
        expected = run()
        if offload == "cpu":
            cpu_offload(model, execution_device=cpu)
        elif offload == "disk":
            disk_offload(model, str(tmp_path), execution_device=cpu)
        elif offload == "group leaf":
            apply_group_offloading(model, onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
        else:
            apply_group_offloading(
                model, onload_device=cpu, offload_device=cpu, offload_type="block_level", num_blocks_per_group=1
            )
        for _ in range(3):
            assert torch.equal(run(), expected)


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_offloaded_weights_are_freed(path, offload, tmp_path):
    """A model larger than memory runs because each layer lets go of its weights after its turn."""
    model = nn.Sequential(*(quantized(128, 128, seed=seed) for seed in range(3)), weights_only(128, 128))
    x = cpu_truth.inputs(3, 128, BF16)
    seen = []
    for layer in model:
        forward = layer.forward

        def watched(x: torch.Tensor, layer: nn.Module = layer, forward: Callable = forward) -> torch.Tensor:
            seen.append(weakref.ref(layer.qweight))
            return forward(x)

        layer.forward = watched
    cpu = torch.device("cpu")
    with torch.no_grad():
        expected = model(x)
        seen.clear()
        if offload == "cpu":
            cpu_offload(model, execution_device=cpu)
        else:
            disk_offload(model, str(tmp_path), execution_device=cpu)
        assert torch.equal(model(x), expected)
    assert len(seen) == 4
    assert [parameter() for parameter in seen] == [None] * 4


def test_compiled_without_breaks(path):
    torch._dynamo.reset()
    model, (x, t) = Block(), block_inputs()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for tokens in (7, 5, 7):
            assert torch.equal(compiled(x[:, :tokens], t), model(x[:, :tokens], t))
        assert compiled(x[:0], t[:0]).shape == (0, 7, 128)


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")
def test_compiled_by_inductor(monkeypatch):
    """Its buffers are written without torch's knowledge and reused; each path computes what it does uncompiled."""
    torch._dynamo.reset()
    layers = [quantized(128, 128, "auto", seed=seed) for seed in range(6)]
    for first, second in zip(layers[::2], layers[1::2], strict=True):
        second.smooth_factor, second.proj_down = first.smooth_factor, first.proj_down

    def run(x: torch.Tensor) -> torch.Tensor:
        for first, second in zip(layers[::2], layers[1::2], strict=True):
            h = nn.functional.gelu(x * 1.5)
            x = x + 0.1 * (first(h) - second(h))
        return x

    if hasattr(torch._inductor.config, "cpp_cache_precompile_headers"):
        # Compiling the headers takes longer than the two kernels that need them.
        monkeypatch.setattr(torch._inductor.config, "cpp_cache_precompile_headers", False)
    compiled = torch.compile(run, fullgraph=True)
    for path in cpu_truth.PATHS:
        with cpu_truth.running(path), torch.no_grad():
            for seed in range(4):
                x = cpu_truth.inputs(14, 128, BF16, seed)
                assert close(compiled(x), run(x)), path


def test_exported(path):
    block = Block().eval()
    for p in block.parameters():
        p.requires_grad_(False)
    x, t = block_inputs()
    with torch.no_grad():
        expected = block(x, t)
        program = torch.export.export(block, (x, t))
        assert torch.equal(program.module()(x, t), expected)
        batch = torch.export.Dim("batch", min=2)
        program = torch.export.export(block, (x, t), dynamic_shapes=({0: batch}, {0: batch}))
        more, steps = block_inputs(4)
        assert torch.equal(program.module()(more, steps), block(more, steps))


def test_traced_and_faked(path):
    layer, plain = quantized(130, 40, dtype=FP32), weights_only(130, 40, FP32)
    x = cpu_truth.inputs(6, 130, FP32)
    for module in (layer, plain):
        graph = make_fx(lambda x: module(x) * 2)(x)  # noqa: B023
        assert any("svdquant" in str(node.target) for node in graph.graph.nodes)
        assert torch.equal(graph(x.flip(0)), module(x.flip(0)) * 2)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            y = module(mode.from_tensor(x.reshape(2, 3, 130)))
            assert y.shape == (2, 3, 40) and y.dtype == FP32
        on_meta = copy.deepcopy(module).to("meta")
        assert on_meta(x.to("meta")).shape == (6, 40) and on_meta(x.to("meta")).is_meta


def test_vmap_falls_back_or_says_no(path):
    """torch loops over the batch where it has no rule; either that, or an error, but no wrong numbers."""
    layer = quantized(130, 40, dtype=FP32)
    x = cpu_truth.inputs(6, 130, FP32).reshape(3, 2, 130)
    try:
        y = torch.func.vmap(layer)(x)
    except RuntimeError:
        return
    assert torch.equal(y, layer(x))
