"""Every family: compiling, offloading, caching and adapters work on the quantized model as on any of diffusers'."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import family_pipelines
import numpy as np
import pytest
import tiny
import torch
from diffusers import FirstBlockCacheConfig
from diffusers.hooks.context_parallel import _get_submodule_by_name
from family_pipelines import Inputs, Models, output, relative
from torch import Tensor, nn

import svdquant
from svdquant.nn import quantized_layers

# One pipeline for every model class.
FAMILIES = (
    "flux_dev", "flux2_klein", "sana", "pixart_sigma", "sdxl", "sd35_medium", "qwen_image", "z_image", "wan_i2v",
    "ltx", "ltx2", "hunyuan_video",
)  # fmt: skip
CPU = torch.device("cpu")


class Family:
    """A pipeline with a quantized denoiser, what that reads first when it draws, and what it makes of it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.pipe = family_pipelines.PIPELINES[name]()
        self.part, self.original = next(iter(family_pipelines.denoisers(self.pipe).items()))
        self.quantized = copy.deepcopy(self.original)
        svdquant.quantize(self.quantized, tiny.config())
        self.use(self.quantized)
        self.picture, self.inputs = family_pipelines.recorded(name, self.pipe)
        self.expected = self.output(self.quantized)

    def use(self, model: nn.Module) -> None:
        self.pipe.register_modules(**{self.part: model})

    def output(self, model: nn.Module) -> Tensor:
        models: Models = {self.part: model}
        inputs: Inputs = {self.part: copy.deepcopy(self.inputs[self.part])}
        return output(models, inputs)

    def draw(self, model: nn.Module, **arguments: Any) -> np.ndarray:
        self.use(model)
        return family_pipelines.draw(self.name, self.pipe, **arguments)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Iterator[Family]:
    yield Family(request.param)


@pytest.fixture
def model(family: Family) -> nn.Module:
    return copy.deepcopy(family.quantized)


def test_compile_repeated_blocks(family: Family, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """fullgraph: a graph break is an error."""
    torch._dynamo.reset()
    assert type(model)._repeated_blocks in ([], model._repeated_blocks)
    # A compiler sees diffusers' own forwards; what it does not compile is fused, and a rounding moves no codes here.
    svdquant.set_activations(model, "none")
    monkeypatch.setenv("SVDQUANT_FUSE", "0")
    expected = family.output(model)
    monkeypatch.delenv("SVDQUANT_FUSE")
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    assert relative(family.output(model), expected) < 1e-5
    assert {m.__class__.__name__ for m in model.modules() if m._compiled_call_impl} == set(model._repeated_blocks)
    torch._dynamo.reset()


def test_repeated_blocks_of_a_loaded_model(family: Family, tmp_path: Any) -> None:
    family.quantized.save_pretrained(tmp_path)
    loaded = type(family.quantized).from_pretrained(tmp_path)
    assert loaded._repeated_blocks == family.quantized._repeated_blocks
    assert loaded.dequantize()._repeated_blocks == type(loaded)._repeated_blocks == family.original._repeated_blocks


@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
def test_group_offload(family: Family, model: Any, level: str) -> None:
    blocks = {"num_blocks_per_group": 1} if level == "block_level" else {}
    model.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type=level, **blocks)
    for _ in range(2):
        assert torch.equal(family.output(model), family.expected)


def test_context_parallel_plan_is_untouched(family: Family, model: Any) -> None:
    assert model._cp_plan is type(model)._cp_plan is family.original._cp_plan
    assert "_cp_plan" not in model.__dict__
    for name in model._cp_plan or {}:
        # What the plan splits or gathers is still there, and of the class that it was written for.
        was, now = (_get_submodule_by_name(m, name) for m in (family.original, model))
        was, now = (found if isinstance(found, list) else [found] for found in (was, now))
        assert len(was) == len(now) > 0
        assert all(isinstance(b, type(a)) for a, b in zip(was, now, strict=True)), name


def test_first_block_cache(family: Family, model: Any) -> None:
    arguments = {"num_inference_steps": 3}
    try:
        cached = copy.deepcopy(family.original)
        cached.enable_cache(FirstBlockCacheConfig(threshold=0.0))
        family.draw(cached, **arguments)
    except (AttributeError, TypeError, ValueError):
        pytest.skip("diffusers cannot cache this model's first block in 16 bits either")
    expected = family.draw(family.quantized, **arguments)
    model.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    assert (family.draw(model, **arguments) == expected).all()
    model.disable_cache()
    model.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    reused = family.draw(model, **arguments)
    assert np.isfinite(reused).all() and (reused != expected).any()
    model.disable_cache()
    assert (family.draw(model, **arguments) == expected).all()


def test_adapter_equals_the_dense_model_with_it(family: Family, model: Any) -> None:
    """A LoRA by the pipeline's own call, on every other linear: the dense meaning plus B·A."""
    if not hasattr(family.pipe, "load_lora_weights"):
        pytest.skip("diffusers has no adapters for this pipeline")
    svdquant.set_activations(model, "none")
    plain = family.output(model)
    names = [name for name, layer in quantized_layers(model).items() if isinstance(layer, nn.Linear)][::2]
    dense = copy.deepcopy(model).dequantize()
    generator = torch.Generator().manual_seed(1)
    state = {}
    for name in names:
        k, n = model.get_submodule(name).in_features, model.get_submodule(name).out_features
        down = torch.randn(4, k, generator=generator) * k**-0.5
        up = torch.randn(n, 4, generator=generator) * 0.1
        state[f"{family.part}.{name}.lora_A.weight"], state[f"{family.part}.{name}.lora_B.weight"] = down, up
        dense.get_submodule(name).weight.data += up @ down
    family.use(model)
    family.pipe.load_lora_weights(state, adapter_name="style")
    expected = family.output(dense)
    assert relative(family.output(model), expected) < 1e-5
    assert relative(plain, expected) > 1e-2
    family.pipe.unload_lora_weights()
    assert torch.equal(family.output(model), plain)
