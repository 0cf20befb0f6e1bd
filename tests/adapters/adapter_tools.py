"""Adapters with random contents, and what they mean for dense models."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import tiny
import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor, nn

import svdquant

BF16, FP32 = torch.bfloat16, torch.float32
PREFIX = "transformer."
# What `quantized_flux` has solved, to be copied.
_SOLVED: dict[str, Any] = {}
# One of every kind: attention and feed-forward, GELU, concatenated input, modulation (W4A16), a 16-bit embedder.
LAYERS = (
    "x_embedder",
    "transformer_blocks.0.norm1.linear",
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.0.attn.to_k",
    "transformer_blocks.0.attn.add_v_proj",
    "transformer_blocks.0.attn.to_out.0",
    "transformer_blocks.0.ff.net.0.proj",
    "transformer_blocks.0.ff.net.2",
    "transformer_blocks.0.ff_context.net.2",
    "single_transformer_blocks.0.norm.linear",
    "single_transformer_blocks.0.attn.to_v",
    "single_transformer_blocks.0.proj_mlp",
    "single_transformer_blocks.0.proj_out",
)


def quantized_flux(dtype: torch.dtype = FP32, activations: str = "none", seed: int = 0, **config: Any) -> Any:
    """A tiny FLUX, lively enough for what adapters change to show, quantized without data."""
    from standin_parts import lively

    key = repr((dtype, seed, config))
    if key not in _SOLVED:
        _SOLVED[key] = lively(tiny.transformer(seed)).to(dtype)
        svdquant.quantize(_SOLVED[key], tiny.config(**config))
    return svdquant.set_activations(copy.deepcopy(_SOLVED[key]), activations)


def quantized_pixart() -> tuple[Any, Callable[[Any], Tensor]]:
    """A tiny PixArt, quantized without data, with 16-bit activations; and one forward of it."""
    with tiny._seeded(3):
        model = PixArtTransformer2DModel(
            num_attention_heads=4,
            attention_head_dim=32,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            cross_attention_dim=128,
            sample_size=8,
            patch_size=2,
            caption_channels=32,
            norm_type="ada_norm_single",
            num_embeds_ada_norm=100,
        ).eval()
    svdquant.quantize(model, tiny.config())
    svdquant.set_activations(model, "none")
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(1, 4, 8, 8, generator=generator),
        "encoder_hidden_states": torch.randn(1, 6, 32, generator=generator),
        "timestep": torch.tensor([50.0]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }

    def run(m: Any) -> Tensor:
        with torch.no_grad():
            return m(**inputs, return_dict=False)[0]

    return model, run


def linears(model: nn.Module) -> dict[str, Any]:
    """Every linear by the name it has without adapters."""
    return {
        name.replace(".base_layer", ""): m
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and ".lora_" not in name and "lora" not in type(m).__module__
    }


def lora(
    model: nn.Module,
    seed: int,
    rank: int = 4,
    names: Iterable[str] = LAYERS,
    size: float = 0.3,
    prefix: str = PREFIX,
    dtype: torch.dtype = FP32,
) -> dict[str, Tensor]:
    """A LoRA in diffusers' names; `size`: how much of a layer's output it makes, about."""
    generator = torch.Generator().manual_seed(seed)
    layers, state = linears(model), {}
    for name in names:
        k, n = layers[name].in_features, layers[name].out_features
        state[f"{prefix}{name}.lora_A.weight"] = (torch.randn(rank, k, generator=generator) * k**-0.5).to(dtype)
        up = torch.randn(n, rank, generator=generator) * size * rank**-0.5
        state[f"{prefix}{name}.lora_B.weight"] = up.to(dtype)
    return state


def deltas(state: dict[str, Tensor], alphas: dict[str, float] | None = None) -> dict[str, Tensor]:
    """Module → ΔW float32 [N, K]; alphas: of modules whose alpha is not their rank."""
    out = {}
    for key, down in state.items():
        name, found, _ = key.removeprefix(PREFIX).partition(".lora_A.weight")
        if found:
            up = state[key.replace("lora_A", "lora_B")]
            out[name] = up.float() @ down.float() * ((alphas or {}).get(name, down.shape[0]) / down.shape[0])
    return out


def dense(model: Any, adapters: Iterable[tuple[dict[str, Tensor], float]] = ()) -> Any:
    """The 16-bit meaning of a quantized model, in float32, with every adapter's ΔW (module → [N, K]) added to it."""
    plain = copy.deepcopy(model).dequantize().float()
    for changes, strength in adapters:
        for name, delta in changes.items():
            plain.get_submodule(name).weight.data += strength * delta
    return plain


def output(model: Any, batch: int = 1) -> Tensor:
    return tiny.run(model, batch=batch)


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


def with_requests(model: Any, run: Callable[[], Tensor], sets: Any) -> Tensor:
    with svdquant.adapters_per_request(model, sets):
        return run()
