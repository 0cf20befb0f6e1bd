"""What a LoRA's file holds besides pairs of matrices: differences of biases and norms, lengths of a DoRA's rows."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SVDQuantError
from . import differences
from .adapter_names import by_module
from .requests import denoisers


def module_names(model: nn.Module) -> dict[str, nn.Module]:
    """Every module by the name it has without adapters."""
    return {name.replace(".base_layer", ""): m for name, m in model.named_modules() if ".lora_" not in name}


def converted(pipeline: Any, lora: dict[str, Tensor]) -> dict[str, Tensor]:
    """What diffusers' converters make of tensors, by the names that PEFT has for them."""
    # The UNets' mixin needs to know how many blocks there are.
    options = {"unet_config": pipeline.unet.config} if isinstance(getattr(pipeline, "unet", None), nn.Module) else {}
    out = type(pipeline).lora_state_dict(lora, return_alphas=True, **options)
    return with_peft_ends(out[0] if isinstance(out, tuple) else out)


def with_peft_ends(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with PEFT's endings where all of a UNet's keys have those that diffusers had before."""
    ends = (".lora.down.weight", ".lora.up.weight", ".lora_A.weight", ".lora_B.weight")
    if not all(key.endswith(ends) for key in state if key.startswith("unet.") and "lora" in key):
        return state
    return {
        key.replace(ends[0], ends[2]).replace(ends[1], ends[3]) if key.startswith("unet.") else key: value
        for key, value in state.items()
    }


def vectors(
    pipeline: Any, model: nn.Module, vectors: dict[str, Tensor], state: Any, start: str, end: str
) -> dict[str, Tensor]:
    """One number per output of some modules, of a DoRA's magnitudes say, by the names that PEFT has for them.

    Whoever converts the names of a LoRA converts these: they go as the up-projection of a LoRA of rank 1.
    """
    lora: dict[str, Tensor] = {}
    for key, value in vectors.items():
        base = key.rpartition(".")[0]
        down = down_beside(base, state)
        if down is None:
            raise SVDQuantError(f"{key}: has no LoRA beside it; download the adapter again")
        lora[f"{base}.lora_down.weight"] = torch.ones(1, down.shape[1])
        lora[f"{base}.lora_up.weight"] = value.reshape(-1, 1).float()
        lora[f"{base}.alpha"] = torch.tensor(1.0)
    names = by_module(lora, module_names(model), start)
    if names is None and pipeline is None:
        raise SVDQuantError(f"{next(iter(vectors))}: belongs to no module of this {type(model).__name__}")
    if names is None:
        names = all_named(pipeline, converted(pipeline, lora))
    return {
        key.replace(".lora_B.weight", f".{end}"): value[:, 0].contiguous()
        for key, value in names.items()
        if key.endswith(".lora_B.weight")
    }


def down_beside(base: str, state: Any) -> Tensor | None:
    """A of the LoRA of the module that a file calls `base`."""
    names = (f"{base}.{end}.weight" for end in ("lora_down", "lora_A"))
    return next((state[name] for name in names if name in state), None)


DIFFERENCES = tuple(f".{leaf}" for leaf in differences.LEAVES)


def bias_differences(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What an adapter adds to the biases of layers that it has a LoRA for."""
    found = ((key, value) for key, value in state.items() if key.endswith(".diff_b") and bool(value.any()))
    return {key: value for key, value in found if down_beside(key.removesuffix(".diff_b"), state) is not None}


def with_biases(state: dict[str, Tensor], biases: dict[str, Tensor], alphas: dict[str, Any]) -> dict[str, Tensor]:
    """`lora_B.bias` of every pair, as PEFT wants it, zeros where an adapter changes none.

    PEFT multiplies them by alpha/r, which whoever wrote the file did not mean.
    """
    end, out = ".lora_B.weight", {}
    alpha_of = {key.removesuffix(".alpha"): float(alpha) for key, alpha in alphas.items()}
    for key, up in state.items():
        if key.endswith(end):
            module = key.removesuffix(end)
            bias = biases.get(f"{module}.lora_B.bias", up.new_zeros(up.shape[0]))
            out[f"{module}.lora_B.bias"] = (bias * (up.shape[1] / alpha_of.get(module, up.shape[1]))).to(up.dtype)
    return out


def take_differences(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameter → what an adapter adds to it, of norms and of layers without a LoRA; names what nobody takes along."""
    taken = bias_differences(state)
    keys = [key for key, v in state.items() if key.endswith(DIFFERENCES) and key not in taken and bool(v.any())]
    whole, left_out = differences.found_in(model, state, keys)
    if left_out:
        warnings.warn(
            f"{len(left_out)} differences belong to no parameter that this {type(model).__name__} keeps whole and are "
            f"left out: {', '.join(left_out)}",
            stacklevel=4,
        )
    return whole


def all_named(pipeline: Any, outputs: Any) -> Any:
    """What `lora_state_dict` returns, with the denoiser's name before every key that lacks a component's.

    Its loaders pass over keys without one. Those that are no module's either are named in a warning.
    """
    parts = tuple(f"{part}." for part in pipeline._lora_loadable_modules)
    denoiser = denoisers(pipeline)[0]
    start = "unet." if denoiser is getattr(pipeline, "unet", None) else "transformer."
    modules, lost = module_names(denoiser), []

    def named(state: Any) -> Any:
        if not isinstance(state, dict):
            return state
        out = {}
        for key, value in state.items():
            whole = key.startswith(parts) or ".lora_" not in key
            if not whole and key.partition(".lora_")[0] in modules:
                key = start + key
            elif not whole:
                lost.append(key)
            out[key] = value
        return out

    if not isinstance(outputs, tuple):
        outputs = named(outputs)
    else:
        outputs = (named(outputs[0]), *outputs[1:])
    if lost:
        warn_unmatched(denoiser, lost)
    return outputs


def warn_unmatched(model: nn.Module, keys: list[str]) -> None:
    warnings.warn(
        f"{type(model).__name__} has no module for {len(keys)} tensors of the adapter, which are left out: "
        f"{', '.join(keys)}",
        stacklevel=5,
    )
