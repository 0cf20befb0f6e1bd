"""Every picture of a batch with adapters of its own."""

from __future__ import annotations

import adapter_tools as tools
import numpy as np
import pytest
import tiny
import torch
from adapter_tools import BF16, FP32

import svdquant
from svdquant import SVDQuantError

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")

SETS = [{"style_1": 0.8}, None, {"style_2": 1.5, "style_1": -0.5}, "style_3", {"style_3": 0.0}]


def with_adapters(dtype: torch.dtype, activations: str):
    model = tools.quantized_flux(dtype, activations)
    states = {f"style_{i}": tools.lora(model, i, 1 + 2 * i, dtype=dtype) for i in (1, 2, 3)}
    for name, state in states.items():
        model.load_lora_adapter(dict(state), adapter_name=name)
    model.set_adapters("style_1", 0.3)
    return model, states


def alone(model, sets, i, batch):
    """Entry i by `set_adapters`, in a batch of one."""
    wanted = sets[i] or {}
    wanted = {wanted: 1.0} if isinstance(wanted, str) else wanted
    if wanted:
        model.set_adapters(list(wanted), list(wanted.values()))
    else:
        model.disable_lora()
    inputs = {key: v[i : i + 1] if v.shape[:1] == (batch,) else v for key, v in tiny.inputs(model, batch=batch).items()}
    with torch.no_grad():
        y = model(**inputs, return_dict=False)[0]
    model.enable_lora()
    return y


@pytest.mark.parametrize("backend", ["native", "dequantize", "reference"])
def test_every_entry_as_it_is_alone(backend, monkeypatch):
    monkeypatch.setenv("SVDQUANT_BACKEND", backend)
    model, states = with_adapters(FP32, "none")
    whole = tools.with_requests(model, lambda: tools.output(model, batch=len(SETS)), SETS)
    for i in range(len(SETS)):
        one = alone(model, SETS, i, len(SETS))
        assert tools.relative(whole[i : i + 1], one) < 1e-4, i
    assert tools.relative(whole[1], whole[0]) > 0.05
    # As dense models have it, too.
    plain = tools.dense(model, [(tools.deltas(states["style_2"]), 1.5), (tools.deltas(states["style_1"]), -0.5)])
    assert tools.relative(whole[2], tools.output(plain, batch=len(SETS))[2]) < 1e-3


@pytest.mark.parametrize("dtype", [BF16, torch.float16, FP32], ids=str)
@pytest.mark.parametrize("activations", ["int8", "int4"])
@pytest.mark.parametrize("name", ["attn.to_q", "ff.net.2"])
def test_bits_of_a_layer(name, activations, dtype):
    model, _ = with_adapters(dtype, activations)
    layer = model.get_submodule(f"transformer_blocks.0.{name}")
    x = torch.randn(len(SETS), 9, layer.in_features, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        whole = tools.with_requests(model, lambda: layer(x), SETS)
        for i, chosen in enumerate(SETS):
            wanted = {chosen: 1.0} if isinstance(chosen, str) else chosen or {}
            model.set_adapters(list(wanted) or ["style_1"], list(wanted.values()) or [0.0])
            assert torch.equal(whole[i], layer(x[i])), i
        reversed_sets = tools.with_requests(model, lambda: layer(x.flip(0)), SETS[::-1])
        assert torch.equal(reversed_sets.flip(0), whole)


def test_pictures_of_a_pipeline():
    """Three prompts, three styles, and guidance by a second half of the batch."""
    model, _ = with_adapters(FP32, "auto")
    pipe = tiny.flux_pipeline(transformer=model)
    prompts, sets = ["a cat", "a dog", "a fox"], SETS[:3]

    def drawn(prompt, count: int, **options) -> np.ndarray:
        noise = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(3))[:, :, :4]
        first = prompts.index(prompt) if isinstance(prompt, str) else 0
        latents = noise[first : first + count].reshape(count, 4, 4).repeat(1, 4, 1)
        return tiny.draw(pipe, prompt, latents=latents, **options)

    for options in ({}, {"true_cfg_scale": 2.0, "negative_prompt": "a bird"}):
        extra = dict(options)
        if "negative_prompt" in extra:
            extra["negative_prompt"] = [options["negative_prompt"]] * 3
        with svdquant.adapters_per_request(pipe, sets):
            whole = drawn(prompts, 3, **extra)
        for i, prompt in enumerate(prompts):
            with svdquant.adapters_per_request(pipe, sets[i : i + 1]):
                one = drawn(prompt, 1, **options)
            assert np.abs(whole[i] - one[0]).max() < 0.02, (i, options)


def test_afterwards_everything_is_as_before():
    model, _ = with_adapters(BF16, "auto")
    before = tools.output(model)
    with pytest.raises(ZeroDivisionError), svdquant.adapters_per_request(model, SETS[:1]):
        assert not torch.equal(tools.output(model), before)
        with svdquant.adapters_per_request(model, [None]):
            tools.output(model)
        raise ZeroDivisionError
    assert torch.equal(tools.output(model), before)


def test_mistakes():
    model, _ = with_adapters(BF16, "auto")
    with pytest.raises(SVDQuantError, match=r"'style_9' is not loaded \(loaded: style_1, style_2, style_3\)"):
        tools.with_requests(model, lambda: tools.output(model), [{"style_9": 1.0}])
    with pytest.raises(SVDQuantError, match="batch of 3 cannot be shared out among 2 requests"):
        tools.with_requests(model, lambda: tools.output(model, batch=3), SETS[:2])
    with pytest.raises(SVDQuantError, match="empty"):
        tools.with_requests(model, lambda: tools.output(model), [])
    plain = tools.quantized_flux(BF16)
    with pytest.raises(SVDQuantError, match="loaded: none"):
        tools.with_requests(plain, lambda: tools.output(plain), ["style_1"])


def test_a_multiple_of_the_requests():
    model, _ = with_adapters(FP32, "none")
    twice = tools.with_requests(model, lambda: tools.output(model, batch=6), SETS[:3])
    listed = tools.with_requests(model, lambda: tools.output(model, batch=6), SETS[:3] * 2)
    assert torch.equal(twice, listed)
