"""A quantized model with adapters is the dense model it means, plus their ΔW."""

from __future__ import annotations

import adapter_tools as tools
import pytest
import torch
from adapter_tools import BF16, FP32

import svdquant

STRENGTHS = {1: [0.8], 2: [1.0, -0.5], 5: [0.5, -1.0, 0.0, 2.0, 0.25]}


@pytest.fixture(params=["native", "dequantize", "reference"])
def backend(request, monkeypatch):
    monkeypatch.setenv("SVDQUANT_BACKEND", request.param)
    return request.param


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("config", [{}, {"rank": 0}, {"weights": "nvfp4"}, {"weights": "int8"}], ids=str)
def test_against_dense_models(backend, config, count):
    model = tools.quantized_flux(**config)
    states = [tools.lora(model, seed, rank=3 + 4 * seed) for seed in range(count)]
    strengths = STRENGTHS[count]
    expected = tools.output(tools.dense(model, zip(map(tools.deltas, states), strengths, strict=True)))
    before = tools.output(model)
    for i, state in enumerate(states):
        model.load_lora_adapter(dict(state), adapter_name=f"style_{i}")
    model.set_adapters([f"style_{i}" for i in range(count)], strengths)
    y = tools.output(model)
    assert tools.relative(before, expected) > 0.05  # the adapters do something
    assert tools.relative(y, expected) < 1e-3


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
@pytest.mark.parametrize("activations", ["int8", "int4"])
def test_quantized_activations_cost_what_they_cost_without(backend, activations, dtype):
    """Adapters add no error: that of the whole model stays about what it is without them."""
    model = tools.quantized_flux(dtype, activations)
    state = tools.lora(model, 1, dtype=dtype)
    alone = tools.relative(tools.output(model), tools.output(tools.dense(model)))
    expected = tools.output(tools.dense(model, [(tools.deltas(state), 1.0)]))
    model.load_lora_adapter(dict(state), adapter_name="style")
    assert tools.relative(tools.output(model), expected) < 1.5 * alone + 0.005


def test_alpha_and_rank_per_layer(backend):
    """kohya's alpha and ranks that differ from layer to layer."""
    model = tools.quantized_flux()
    state, alphas = {}, {}
    for i, name in enumerate(tools.LAYERS):
        state |= tools.lora(model, i, rank=1 + 3 * i, names=[name])
        alphas[name] = 2.0 + i
    expected = tools.output(tools.dense(model, [(tools.deltas(state, alphas), 0.7)]))
    network_alphas = {f"{tools.PREFIX}{name}.alpha": alpha for name, alpha in alphas.items()}
    model.load_lora_adapter(dict(state), adapter_name="style", network_alphas=network_alphas)
    model.set_adapters("style", 0.7)
    assert tools.relative(tools.output(model), expected) < 1e-3


def test_the_branch_really_holds_them(monkeypatch):
    """One product per layer: PEFT's own matrices are never multiplied."""
    model = tools.quantized_flux(BF16, "auto")
    names = [name for name in tools.LAYERS if "norm" not in name and name != "x_embedder"]
    model.load_lora_adapter(tools.lora(model, 1, names=names), adapter_name="style")
    called = []
    for name, module in model.named_modules():
        if ".lora_A." in name:
            module.register_forward_hook(lambda *_: called.append(1))
    tools.output(model)
    assert not called


def test_more_ranks_than_a_branch_holds():
    """PEFT's own products then, with the same result."""
    model = tools.quantized_flux()
    name = "transformer_blocks.0.attn.to_q"
    states = [tools.lora(model, seed, rank=400, names=[name]) for seed in range(3)]
    expected = tools.output(tools.dense(model, [(tools.deltas(state), 0.5) for state in states]))
    for i, state in enumerate(states):
        model.load_lora_adapter(state, adapter_name=f"style_{i}")
    model.set_adapters([f"style_{i}" for i in range(3)], [0.5] * 3)
    assert tools.relative(tools.output(model), expected) < 1e-3


def test_gradients_are_pefts():
    """Training an adapter on a quantized model: gradients of both matrices, as on the dense one."""
    import tiny

    model = tools.quantized_flux()
    state = tools.lora(model, 1)
    plain = tools.dense(model)
    for m in (model, plain):
        m.load_lora_adapter(dict(state), adapter_name="style")
        m.set_adapters("style", 1.0)
        m.train()
        for name, parameter in m.named_parameters():
            parameter.requires_grad_(".lora_" in name)
        m(**tiny.inputs(m), return_dict=False)[0].square().sum().backward()
    wanted = {n.replace(".base_layer", ""): p.grad for n, p in plain.named_parameters() if ".lora_" in n}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            assert tools.relative(parameter.grad, wanted[name]) < 1e-3, name


def test_set_activations_reaches_layers_with_adapters():
    model = tools.quantized_flux()
    model.load_lora_adapter(tools.lora(model, 1), adapter_name="style")
    svdquant.set_activations(model, {"*.to_q": "int8"})
    layer = model.transformer_blocks[0].attn.to_q
    assert layer.base_layer.activations == "int8" and layer.base_layer.compute_dtype == FP32
