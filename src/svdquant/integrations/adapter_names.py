"""Adapters in the model's own module names, whatever prefix, separator or ending their tool gave them.

diffusers' converters know the names that BFL and others gave FLUX' layers; of a model's own names with underscores
they know those of attention only, and with some endings they lose alpha. Here the model itself says what it has.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

_PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "unet.",
    "lora_transformer_",
    "lora_unet_",
    "oft_unet_",
    "lycoris_",
)
_LEAF = re.compile(r"\.(?:(lora_A|lora_down|lora\.down)|(lora_B|lora_up|lora\.up))(?:\.default)?\.weight$|\.alpha$")
# A module that stacks the rows of others, by the last part of its name.
_STACKS = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "qkv": ("to_q", "to_k", "to_v"),
    "add_qkv_proj": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "to_kv": ("to_k", "to_v"),
}
# FLUX' modules as its authors call them, with or without dots, and diffusers' in the order of their rows.
_FLUX_BLOCK = re.compile(r"(double|single)_blocks[._](\d+)[._](.+)")
_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
_FLUX_PARTS = {
    "img_attn_qkv": _QKV,
    "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn_proj": ("attn.to_out.0",),
    "txt_attn_proj": ("attn.to_add_out",),
    "img_mlp_0": ("ff.net.0.proj",),
    "img_mlp_2": ("ff.net.2",),
    "txt_mlp_0": ("ff_context.net.0.proj",),
    "txt_mlp_2": ("ff_context.net.2",),
    "img_mod_lin": ("norm1.linear",),
    "txt_mod_lin": ("norm1_context.linear",),
    "linear1": (*_QKV, "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation_lin": ("norm.linear",),
}
_FLUX_OUTER = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in_in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in_out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in_in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in_out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in_in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in_out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer_linear": "proj_out",
}


def by_module(state: dict[str, Tensor], modules: dict[str, Any], start: str) -> dict[str, Tensor] | None:
    """The adapter as `{start}{module}.lora_A.weight` and `lora_B.weight`, alpha multiplied into B.

    modules: name → module of the model. None where it needs no such help, or a name is not the model's own: then
    diffusers' converters have to know it. q, k and v are taken apart or put together as the model has them.
    """
    if all(re.search(r"\.lora_[AB]\.weight$", key) and _below(key, start) in modules for key in state):
        return None
    pairs: dict[str, dict[str, Tensor]] = {}
    flat = {name.replace(".", "_"): name for name in modules}
    for key, value in state.items():
        if key.endswith(".dora_scale"):
            continue  # its magnitudes are read beside it
        found = _LEAF.search(key)
        if found is None:
            return None
        base = key[: found.start()]
        name = resolved(base, modules, flat) or (base if of_flux(base, modules) else None)
        if name is None:
            return None
        half = "A" if found[1] else "B" if found[2] else "alpha"
        pairs.setdefault(name, {})[half] = value
    out: dict[str, Tensor] = {}
    for name, pair in pairs.items():
        if "A" not in pair or "B" not in pair or (pair["A"].dim() != 2 and name not in modules):
            return None
        down, up = pair["A"], pair["B"]
        if "alpha" in pair:
            up = (up.float() * (float(pair["alpha"]) / down.shape[0])).to(up.dtype)
        for part, (a, b) in _parts(name, down, up, modules).items():
            out[f"{start}{part}.lora_A.weight"], out[f"{start}{part}.lora_B.weight"] = a, b
    return _stacked(out, modules, start)


def _below(key: str, start: str) -> str:
    # The model itself is no linear.
    return key[len(start) :].partition(".lora_")[0] or "-" if key.startswith(start) else "-"


def resolved(base: str, modules: dict[str, Any], flat: dict[str, str]) -> str | None:
    """The model's name, or that of a stack of some of its modules, of what a file calls `base`."""
    for prefix in ("", *_PREFIXES):
        if not base.startswith(prefix):
            continue
        name = base[len(prefix) :]
        name = name if name in modules else flat.get(name, name)
        parent, _, leaf = name.rpartition(".")
        siblings = {part: f"{parent}.{part}" if parent else part for part in _SPLIT}
        # A part of what the model has stacked.
        whole = any(
            leaf in parts and (f"{parent}.{stack}" in modules or stack in modules) for stack, parts in _STACKS.items()
        )
        if name in modules or whole or (leaf in _STACKS and all(siblings[p] in modules for p in _STACKS[leaf])):
            return name
    return None


_SPLIT = {part for parts in _STACKS.values() for part in parts}


def of_flux(base: str, modules: dict[str, Any]) -> list[str] | None:
    """The modules whose rows, one below the other, are what FLUX' authors call `base`; None where it is none of it."""
    short = next((base[len(prefix) :] for prefix in _PREFIXES if base.startswith(prefix)), base)
    block = _FLUX_BLOCK.fullmatch(short)
    if block:
        kind = "transformer_blocks" if block[1] == "double" else "single_transformer_blocks"
        names = [f"{kind}.{block[2]}.{part}" for part in _FLUX_PARTS.get(block[3].replace(".", "_"), ())]
    else:
        outer = _FLUX_OUTER.get(short.replace(".", "_"))
        # Only beside blocks of FLUX: other models have other things of these names.
        names = [outer] if outer and "single_transformer_blocks.0" in modules else []
    return names if names and all(name in modules for name in names) else None


def parts_of(base: str, modules: dict[str, Any], flat: dict[str, str]) -> list[str] | None:
    """The modules of the model whose rows, one below the other, are what a file calls `base`; None for none."""
    name = resolved(base, modules, flat)
    if name is None:
        return of_flux(base, modules)
    if name in modules:
        return [name]
    parent, dot, leaf = name.rpartition(".")
    parts = [f"{parent}{dot}{part}" for part in _STACKS.get(leaf, ())]
    return parts if parts and all(part in modules for part in parts) else None


def _parts(name: str, down: Tensor, up: Tensor, modules: dict[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """One pair per module of the model: a stack's rows belong to its parts, which share A."""
    parts = None if name in modules else parts_of(name, modules, {})
    if parts is None:
        return {name: (down, up)}
    rows = [modules[part].out_features for part in parts]
    if sum(rows) != up.shape[0]:
        return {parts[0]: (down, up)}  # whose shape the check will name
    return {part: _used(down, b) for part, b in zip(parts, up.split(rows), strict=True)}


def _used(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The directions that these rows use: of a LoRA put together of one per part, those of this part."""
    used = (up != 0).any(0)
    if bool(used.all()) or not bool(used.any()):
        return down, up.contiguous()
    return down[used].contiguous(), up[:, used].contiguous()


def _stacked(state: dict[str, Tensor], modules: dict[str, Any], start: str) -> dict[str, Tensor]:
    """Pairs of modules that the model has as one: A one below the other, B on the diagonal."""
    names = {key[len(start) :].partition(".lora_")[0] for key in state}
    for stack, parts in _STACKS.items():
        for parent in {name.rpartition(".")[0] for name in names if name.rpartition(".")[2] in parts}:
            whole = f"{parent}.{stack}" if parent else stack
            if whole not in modules or any(f"{parent}.{part}" in modules for part in parts):
                continue
            downs, ups = [], []
            rows = modules[whole].out_features // len(parts)
            for i, part in enumerate(parts):
                key = f"{start}{parent}.{part}.lora_"
                if f"{key}A.weight" not in state:
                    continue
                down, up = state.pop(f"{key}A.weight"), state.pop(f"{key}B.weight")
                padded = up.new_zeros(rows * len(parts), up.shape[1])
                padded[i * rows : i * rows + up.shape[0]] = up
                downs.append(down)
                ups.append(padded)
            if downs:
                state[f"{start}{whole}.lora_A.weight"] = torch.cat(downs)
                state[f"{start}{whole}.lora_B.weight"] = torch.cat(ups, 1)
    return state
