"""Adapters of a pipeline with two transformers, Wan 2.2's for high and for low noise."""

from __future__ import annotations

from typing import Any

import adapter_tools as tools
import family_pipelines
import pytest
import tiny
import torch

import svdquant

LAYER = "blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = family_pipelines.PIPELINES["wan22"]()
    for model in family_pipelines.denoisers(pipe).values():
        svdquant.quantize(model, tiny.config())
    return pipe


@pytest.mark.parametrize("second", [False, True])
def test_load_into_transformer_2(pipe: Any, second: bool) -> None:
    models = [pipe.transformer, pipe.transformer_2]
    chosen, other = models[second], models[not second]
    state = tools.lora(chosen, 3, names=[LAYER])
    x = torch.randn(2, 5, tools.linears(chosen)[LAYER].in_features, generator=torch.Generator().manual_seed(0))
    before = [model.get_submodule(LAYER)(x) for model in (chosen, other)]
    pipe.load_lora_weights(dict(state), adapter_name="style", load_into_transformer_2=second)
    assert list(chosen.peft_config) == ["style"] and not getattr(other, "peft_config", {})
    after = [model.get_submodule(LAYER)(x) for model in (chosen, other)]
    added = x @ tools.deltas(state)[LAYER].T
    assert tools.relative(after[0] - before[0], added) < 1e-4
    assert torch.equal(after[1], before[1])
    chosen.delete_adapters("style")
    assert torch.equal(chosen.get_submodule(LAYER)(x), before[0])
