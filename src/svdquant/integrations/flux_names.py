"""FLUX.1's tensors under the names of Black Forest Labs' code, as diffusers has them."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from .lazy_tensor import LazyTensor

# Of the embedders and the last layer.
_OUTER = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
_DOUBLE = {
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
}
_STACKED = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
_SINGLE = {
    "modulation.lin": "norm.linear",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
    "linear2": "proj_out",
}
_BLOCK = re.compile(r"(double|single)_blocks\.(\d+)\.(.+)")


def from_black_forest_labs(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Raises `KeyError` for a name that those files do not have."""
    converted: dict[str, LazyTensor] = {}
    width = tensors["img_in.weight"].shape[0]
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf not in ("weight", "bias", "scale"):
            continue
        leaf = "weight" if leaf == "scale" else leaf
        block = _BLOCK.fullmatch(module)
        if block is None:
            if module == "final_layer.adaLN_modulation.1":
                shift, scale = tensor.chunk(2, 0)
                # diffusers has the scale first.
                converted[f"norm_out.linear.{leaf}"] = torch.cat([scale, shift])  # type: ignore[list-item]
            elif module in _OUTER:
                converted[f"{_OUTER[module]}.{leaf}"] = tensor
            continue
        kind, number, part = block.groups()
        if kind == "double" and part in _STACKED:
            for new, piece in zip(_STACKED[part], tensor.chunk(3, 0), strict=True):
                converted[f"transformer_blocks.{number}.{new}.{leaf}"] = piece
        elif kind == "double":
            converted[f"transformer_blocks.{number}.{_DOUBLE[part]}.{leaf}"] = tensor
        elif part == "linear1":
            names = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
            pieces = tensor.split([width, width, width, tensor.shape[0] - 3 * width], 0)
            for new, piece in zip(names, pieces, strict=True):
                converted[f"single_transformer_blocks.{number}.{new}.{leaf}"] = piece
        else:
            converted[f"single_transformer_blocks.{number}.{_SINGLE[part]}.{leaf}"] = tensor
    return converted
