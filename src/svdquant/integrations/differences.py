"""What adapters add to parameters that no low-rank pair can change: weights of norms, biases of layers without a LoRA.

A parameter with differences is its own value plus the sum of strength × difference, made anew from the value it had
whenever the strengths change; where all are 0 it is that value, bit for bit. PEFT's layers say what the strengths are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SVDQuantError
from . import switching
from .adapter_names import of_flux, resolved

_KEPT = "_svdquant_differences"
# Endings of a file's keys → the parameter that they change.
LEAVES = {"diff": "weight", "w_norm": "weight", "diff_b": "bias", "b_norm": "bias"}
_FLUX_NORMS = {
    "double_blocks.{}.img_attn.norm.query_norm": "transformer_blocks.{}.attn.norm_q",
    "double_blocks.{}.img_attn.norm.key_norm": "transformer_blocks.{}.attn.norm_k",
    "double_blocks.{}.txt_attn.norm.query_norm": "transformer_blocks.{}.attn.norm_added_q",
    "double_blocks.{}.txt_attn.norm.key_norm": "transformer_blocks.{}.attn.norm_added_k",
    "single_blocks.{}.norm.query_norm": "single_transformer_blocks.{}.attn.norm_q",
    "single_blocks.{}.norm.key_norm": "single_transformer_blocks.{}.attn.norm_k",
}
_PREFIX = re.compile(r"^(model\.)?diffusion_model[._]|^lora_unet_|^lycoris_|^transformer\.")


@dataclass
class Differences:
    """own: parameter → its value without adapters; adapters: name → parameter → difference; fused: name → strength."""

    own: dict[str, Tensor] = field(default_factory=dict)
    adapters: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    fused: dict[str, float] = field(default_factory=dict)
    applied: dict[str, float] = field(default_factory=dict)


def differences_of(model: Any) -> Differences | None:
    """What is kept for a model; None where no adapter of it changes such parameters."""
    kept: Differences | None = getattr(model, "__dict__", {}).get(_KEPT)
    return kept


def found_in(model: nn.Module, state: Mapping[str, Tensor], keys: list[str]) -> tuple[dict[str, Tensor], list[str]]:
    """(parameter → difference of those `keys` of an adapter that change a parameter kept whole, the other keys).

    Raises `SVDQuantError` where a shape does not fit.
    """
    modules = {name.replace(".base_layer", ""): m for name, m in model.named_modules() if ".lora_" not in name}
    flat = {name.replace(".", "_"): name for name in modules}
    out: dict[str, Tensor] = {}
    rest = []
    for key in keys:
        base, _, leaf = key.rpartition(".")
        name = _module_name(model, base, modules, flat)
        parameter = None if name is None else getattr(_plain(modules[name]), LEAVES[leaf], None)
        packed = name is not None and hasattr(_plain(modules[name]), "spec") and LEAVES[leaf] == "weight"
        if name is None or packed or not isinstance(parameter, nn.Parameter):
            rest.append(key)
            continue
        if parameter.shape != state[key].shape:
            raise SVDQuantError(
                f"{key} has the shape {list(state[key].shape)}, and {name}.{LEAVES[leaf]} {list(parameter.shape)}; the "
                "adapter was made for another model"
            )
        out[f"{name}.{LEAVES[leaf]}"] = state[key].detach()
    return out, rest


def _plain(module: Any) -> Any:
    """The module itself below PEFT's layer around it."""
    return module.base_layer if hasattr(module, "lora_A") and hasattr(module, "base_layer") else module


def _module_name(model: nn.Module, base: str, modules: dict[str, Any], flat: dict[str, str]) -> str | None:
    """The model's name of what a file calls `base`: its own, or that of the checkpoint that the model came from."""
    short = _PREFIX.sub("", base)
    # After this prefix come the names of the model's authors, which may be those of other modules in diffusers.
    if "diffusion_model." in base and (name := _by_converter(model, short)) in modules:
        return name
    if (name := resolved(base, modules, flat)) in modules:
        return name
    for theirs, ours in _FLUX_NORMS.items():
        pattern = re.escape(theirs).replace(r"\{\}", r"(\d+)")
        match = re.fullmatch(pattern, short) or re.fullmatch(pattern.replace(r"\.", "_"), short)
        if match and (name := ours.format(match[1])) in modules:
            return name
    name = _by_converter(model, short)
    if name in modules:
        return name
    parts = of_flux(base, modules)
    return parts[0] if parts and len(parts) == 1 else None


def _by_converter(model: nn.Module, base: str) -> str | None:
    """By diffusers' converter of whole checkpoints, where that only renames and so takes one key alone."""
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    entry = next((SINGLE_FILE_LOADABLE_CLASSES.get(cls.__name__) for cls in type(model).__mro__), None)
    try:
        converted = entry["checkpoint_mapping_fn"](checkpoint={f"{base}.weight": torch.zeros(1)})  # type: ignore[index]
    except Exception:  # most of them look for keys of their own
        return None
    names = list(converted)
    return names[0].removesuffix(".weight") if len(names) == 1 and names[0].endswith(".weight") else None


def keep(model: Any, adapter: str, differences: dict[str, Tensor]) -> None:
    """Takes up what `adapter`, which PEFT has loaded, adds to parameters of the model; it counts from now on."""
    kept = model.__dict__.setdefault(_KEPT, Differences())
    for name in differences:
        if name not in kept.own:
            kept.own[name] = _parameter(model, name).detach().clone()
    kept.adapters[adapter] = dict(differences)
    kept.applied.pop(adapter, None)
    refresh(model)


def named(changes: dict[str, Tensor]) -> dict[str, Tensor]:
    """Differences under the names that a file has for them."""
    leaves = {"weight": "diff", "bias": "diff_b"}
    return {f"{name.rpartition('.')[0]}.{leaves[name.rpartition('.')[2]]}": value for name, value in changes.items()}


def refresh(model: Any) -> None:
    """Makes the parameters what the adapters' present strengths say. Raises `SVDQuantError` for offloaded ones."""
    kept = differences_of(model)
    if kept is None:
        return
    loaded = getattr(model, "peft_config", {})
    for name in [n for n in kept.adapters if n not in loaded and n not in kept.fused]:
        del kept.adapters[name]
    strengths = {name: kept.fused.get(name, _strength(model, name)) for name in kept.adapters}
    if strengths != kept.applied:
        for name, own in kept.own.items():
            _write(model, name, own, [(s, kept.adapters[a].get(name)) for a, s in strengths.items()])
        kept.applied = strengths
    if not kept.adapters or (not loaded and set(kept.adapters) <= set(kept.fused)):
        # What is fused when the last adapter goes is the model's own from now on.
        del model.__dict__[_KEPT]


def _write(model: nn.Module, name: str, own: Tensor, terms: list[tuple[float, Tensor | None]]) -> None:
    parameter = _parameter(model, name)
    if parameter.is_meta:
        raise SVDQuantError("an adapter changes norms or biases that are offloaded; switch adapters before offloading")
    value, used = own.to(parameter.device), [(s, d) for s, d in terms if s and d is not None]
    if used:
        total = value.float()
        for strength, difference in used:
            total = total + strength * difference.to(total)
        value = total.to(parameter.dtype)
    with torch.no_grad():
        unmerged = _unmerged(model, name)
        if unmerged is None:
            parameter.data.copy_(value)
            return
        # A LoRA is fused into it: that stays until it is taken out again, which gives the parameter written here.
        fused = parameter.float() - unmerged.float()
        unmerged.copy_(value)
        parameter.data.copy_((value.float() + fused).to(parameter.dtype))


def _unmerged(model: nn.Module, name: str) -> Tensor | None:
    """What a parameter was before adapters were fused into it, where some are."""
    module, _, leaf = name.rpartition(".")
    layer: Any = model
    for part in module.split("."):
        layer = getattr(_plain(layer), part)
    before = (
        layer.__dict__.get("_unmerged") if hasattr(layer, "lora_A") and not hasattr(layer.base_layer, "spec") else None
    )
    found: Tensor | None = None if before is None else before[("weight", "bias").index(leaf)]
    return found


def _parameter(model: nn.Module, name: str) -> Tensor:
    """By the name it has without adapters."""
    owner: Any = model
    *path, leaf = name.split(".")
    for part in path:
        owner = _plain(getattr(owner, part))
    found: Tensor = getattr(owner, leaf)
    return found


def _strength(model: nn.Module, adapter: str) -> float:
    """Of the first of PEFT's layers that has the adapter; 0 where it is not active."""
    from .peft_dense import unit_strength

    for layer in switching.lora_layers(model):
        if adapter in layer.lora_A:
            if layer.disable_adapters or adapter not in layer.active_adapters:
                return 0.0
            return float(layer.scaling[adapter]) / unit_strength(layer, adapter)
    return 0.0


def following(change: Any) -> Any:
    """A method of diffusers' that changes which adapters count: parameters with differences follow."""

    @wraps(change)
    def followed(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = change(self, *args, **kwargs)
        refresh(self)
        return out

    return followed


def fused(model: Any, lora_scale: float = 1.0, adapter_names: list[str] | None = None) -> None:
    """After `fuse_lora`: what counts now counts until `unfused`."""
    kept = differences_of(model)
    if kept is not None:
        for name, strength in kept.applied.items():
            if strength and (adapter_names is None or name in adapter_names):
                kept.fused.setdefault(name, strength * lora_scale)
        refresh(model)


def unfused(model: Any) -> None:
    """After `unfuse_lora`."""
    kept = differences_of(model)
    if kept is not None:
        kept.fused.clear()
        refresh(model)


def make_own(model: Any) -> None:
    """The parameters stay as they are when the adapters go: these are part of the weights now."""
    model.__dict__.pop(_KEPT, None)
