"""Miniature denoisers with quantized layers, and inputs of odd sizes for them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import family_pipelines
import tiny
import torch
from family_pipelines import relative
from test_fused_flux import plain, randomize_norms
from torch import Tensor, nn

import svdquant

TEXT = 32
Inputs = dict[str, Any]


class _Random:
    """Seeded tensors of one type."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.generator, self.dtype = torch.Generator().manual_seed(seed), dtype

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.dtype)


def _some_text(batch: int, tokens: int) -> Tensor:
    """A mask: every prompt has another length."""
    return (torch.arange(tokens)[None] < tokens - 1 - torch.arange(batch)[:, None]).long()


def _wan(random: _Random, batch: int) -> Inputs:
    return {
        "hidden_states": random(batch, 16, 3, 6, 10),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": random(batch, 7, TEXT),
    }


def _wan_5b(random: _Random, batch: int) -> Inputs:
    """Tokens of the first frame, which is known, have another timestep."""
    steps = torch.full((batch, 45), 500)
    steps[:, :15] = 0
    return _wan(random, batch) | {"timestep": steps}


def _wan_i2v(random: _Random, batch: int) -> Inputs:
    return {
        "hidden_states": random(batch, 36, 3, 6, 10),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": random(batch, 512, TEXT),
        "encoder_hidden_states_image": random(batch, 17, TEXT),
    }


def _ltx(random: _Random, batch: int) -> Inputs:
    return {
        "hidden_states": random(batch, 45, 4),
        "encoder_hidden_states": random(batch, 7, TEXT),
        "timestep": torch.full((batch, 1), 500),
        "encoder_attention_mask": _some_text(batch, 7),
        "num_frames": 3,
        "height": 3,
        "width": 5,
    }


def _ltx2(random: _Random, batch: int) -> Inputs:
    return {
        "hidden_states": random(batch, 45, 4),
        "audio_hidden_states": random(batch, 9, 4),
        "encoder_hidden_states": random(batch, 7, TEXT),
        "audio_encoder_hidden_states": random(batch, 7, TEXT),
        "timestep": torch.full((batch,), 500),
        "encoder_attention_mask": _some_text(batch, 7),
        "audio_encoder_attention_mask": _some_text(batch, 7),
        "num_frames": 3,
        "height": 3,
        "width": 5,
        "audio_num_frames": 9,
    }


def _hunyuan(random: _Random, batch: int) -> Inputs:
    return {
        "hidden_states": random(batch, 4, 3, 6, 10),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": random(batch, 7, TEXT),
        "encoder_attention_mask": _some_text(batch, 7),
        "pooled_projections": random(batch, 32),
        "guidance": torch.full((batch,), 6000.0),
    }


# Pipeline of `family_pipelines`, and inputs of its denoiser.
FAMILIES: dict[str, tuple[str, Callable[[_Random, int], Inputs]]] = {
    "wan": ("wan", _wan),
    "wan_5b": ("wan", _wan_5b),
    "wan_i2v": ("wan_i2v", _wan_i2v),
    "ltx": ("ltx", _ltx),
    "ltx2": ("ltx2", _ltx2),
    "ltx2_halves": ("ltx2", _ltx2),
    "hunyuan_video": ("hunyuan_video", _hunyuan),
}


@cache
def _quantized(pipeline: str) -> nn.Module:
    model = next(iter(family_pipelines.denoisers(family_pipelines.PIPELINES[pipeline]()).values()))
    randomize_norms(model)
    svdquant.quantize(model.to(torch.bfloat16), tiny.config())
    # As diffusers loads it.
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, parameter in model.named_parameters():
        if kept & set(name.split(".")):
            parameter.data = parameter.data.float()
    return model


def quantized(family: str) -> Any:
    """In bfloat16, fused."""
    model = copy.deepcopy(_quantized(FAMILIES[family][0]))
    if family == "ltx2_halves":
        # What is rotated are the halves of heads.
        for module in model.modules():
            if hasattr(module, "rope_type"):
                module.rope_type = "split"  # type: ignore[assignment]
    return model


def inputs(family: str, batch: int = 1, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Inputs:
    return FAMILIES[family][1](_Random(seed, dtype), batch)


def output(model: nn.Module, given: Inputs) -> Tensor:
    """All that the model makes of it, float64 in one row."""
    return family_pipelines.output({"model": model}, {"model": ((), copy.deepcopy(given))})


def in_float32(given: Inputs) -> Inputs:
    return {
        key: in_float32(value)
        if isinstance(value, dict)
        else value.float()
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for key, value in given.items()
    }


def errors(model: nn.Module, given: Inputs) -> tuple[float, float]:
    """Of the model with fused forwards, and with diffusers' own, against diffusers' own in float32.

    Layers do not quantize what they read, so that roundings are all that is left.
    """
    svdquant.set_activations(model, "none")
    theirs = plain(model)
    # Of the class above: a quantized model of diffusers refuses.
    truth = output(nn.Module.float(copy.deepcopy(theirs)), in_float32(given))
    return relative(output(model, given), truth), relative(output(theirs, given), truth)
