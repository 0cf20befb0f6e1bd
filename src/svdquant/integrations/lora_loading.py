"""diffusers' own LoRA calls on quantized models: what they lack, wrapped around them.

A model of another kind goes through unseen: every wrapper asks first.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.layout import PICKLES
from ..errors import SVDQuantError
from . import common, flux_shapes, switching
from .adapter_formats import kind_of, needs_conversion, to_lora
from .adapter_names import by_module
from .adapter_nunchaku import from_nunchaku
from .requests import denoisers
from .switching import is_quantized

_MIXIN, _PIPELINES = "diffusers.loaders.peft", "diffusers.loaders.lora_pipeline"
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"


def register(module: ModuleType) -> None:
    """Wraps the methods that `module`, one of the two above, defines. Idempotent."""
    if module.__name__ == _MIXIN:
        mixin = module.PeftAdapterMixin
        for name, wrapper in (
            ("load_lora_adapter", _checked),
            ("set_adapters", switching.quick),
            ("fuse_lora", _recorded),
            ("unfuse_lora", _recorded),
        ):
            _wrap(mixin, name, wrapper)
    elif module.__name__ == _PIPELINES:
        for cls in list(vars(module).values()):
            if isinstance(cls, type) and cls.__name__.endswith("LoraLoaderMixin"):
                _wrap(cls, "load_lora_weights", _refactored)
        mixin = module.FluxLoraLoaderMixin
        _wrap(mixin, "_maybe_expand_transformer_param_shape_or_error_", flux_shapes.with_shapes_checked)
        _wrap(mixin, "_maybe_expand_lora_state_dict", flux_shapes.without_quantized)


def _wrap(cls: Any, name: str, wrapper: Callable[[Any], Any]) -> None:
    theirs = cls.__dict__.get(name)
    if theirs is None or hasattr(getattr(theirs, "__func__", theirs), "_svdquant"):
        return
    bound = isinstance(theirs, classmethod)
    function: Any = theirs.__func__ if bound else theirs
    ours: Any = wraps(function)(wrapper(function))
    ours._svdquant = True
    setattr(cls, name, classmethod(ours) if bound else ours)


def module_names(model: nn.Module) -> dict[str, nn.Module]:
    """Every module by the name it has without adapters."""
    return {name.replace(".base_layer", ""): m for name, m in model.named_modules() if ".lora_" not in name}


def check_lora(model: nn.Module, state_dict: dict[str, Tensor], where: str = "the adapter") -> list[str]:
    """Compares an adapter in PEFT's names with the model; returns the keys of it that the model has no module for.

    Raises `SVDQuantError` where nothing fits, or a shape does not.
    """
    modules = module_names(model)
    unmatched = []
    for key, value in state_dict.items():
        name, dot, _ = key.partition(".lora_")
        module = modules.get(name) if dot else None
        if module is None:
            unmatched.append(key)
            continue
        if value.dim() == 2 and hasattr(module, "in_features"):
            expected = {_DOWN: (1, module.in_features), _UP: (0, module.out_features)}
            for end, (axis, size) in expected.items():
                if key.endswith(end) and value.shape[axis] != size:
                    raise SVDQuantError(
                        f"{where}: {key} has the shape {list(value.shape)}, which does not fit {name} "
                        f"[{module.out_features}, {module.in_features}]; it was made for another model"
                    )
    if state_dict and len(unmatched) == len(state_dict):
        raise SVDQuantError(
            f"{where}: none of its {len(state_dict)} tensors belongs to a module of this {type(model).__name__} "
            f"(the first is {next(iter(state_dict))}); it was made for another model"
        )
    return unmatched


_FETCHING = (
    "weight_name",
    "use_safetensors",
    "local_files_only",
    "cache_dir",
    "force_download",
    "proxies",
    "token",
    "revision",
    "subfolder",
)


def fetch_state(source: Any, **access: Any) -> tuple[dict[str, Tensor], Any]:
    """(tensors, PEFT's configuration or None) of an adapter: a file, folder or Hub id by diffusers' own function.

    Tensors are returned as they are. Raises `SVDQuantError` for a pickle, which can run code.
    """
    if isinstance(source, dict):
        return source, None
    from diffusers.loaders.lora_base import _fetch_state_dict

    if str(source).endswith(PICKLES) or str(access.get("weight_name")).endswith(PICKLES):
        raise SVDQuantError(f"{source}: is a pickle, which can run code when it is read; convert it to safetensors")
    options = dict.fromkeys(_FETCHING) | {"use_safetensors": True} | access
    agent = {"file_type": "attn_procs_weights", "framework": "pytorch"}
    state, metadata = _fetch_state_dict(source, **options, user_agent=agent, allow_pickle=False)[:2]
    return state, metadata


def _refactored(load_lora_weights: Any) -> Any:
    """What diffusers has no converter for becomes a LoRA first; what its converters leave unnamed is named."""

    def refactored(self: Any, source: Any, *args: Any, **kwargs: Any) -> Any:
        if not any(is_quantized(part) for part in denoisers(self)):
            return load_lora_weights(self, source, *args, **kwargs)
        access = {name: kwargs[name] for name in _FETCHING if name in kwargs}
        state, metadata = fetch_state(source, **access)
        warn_left_out(state)
        differences = bias_differences(state)
        if any(key.endswith(_DIFFERENCES) for key in state) and kind_of(state) != "difference":
            source = state = {key: value for key, value in state.items() if not key.endswith(_DIFFERENCES)}
        if needs_conversion(state):
            converted = to_lora(state)
            warnings.warn(converted.sentence(), stacklevel=3)
            source = state = converted.state
        denoiser = denoisers(self)[0]
        start = "unet." if denoiser is getattr(self, "unet", None) else "transformer."
        if kind_of(state) == "nunchaku":
            source, rest = from_nunchaku(state, denoiser, start)
            state = source
            if rest:
                _warn_unmatched(denoiser, rest)
        # A configuration of PEFT's says what the alphas are, and that the names are diffusers'.
        ours = None if metadata else by_module(state, module_names(denoiser), start)
        if ours is not None:
            source = ours

        magnitudes: dict[str, Tensor] = {}
        if doras := {key: value for key, value in state.items() if key.endswith(".dora_scale")}:
            magnitudes = _vectors(self, doras, state, start, "lora_magnitude_vector")
            source = {key: value for key, value in (ours or state).items() if key not in doras}

        biases = _vectors(self, differences, state, start, "lora_B.bias") if differences else {}

        def lora_state_dict(*given: Any, **options: Any) -> Any:
            named = _all_named(self, type(self).lora_state_dict(*given, **options))
            tensors = named[0] if isinstance(named, tuple) else named
            if biases:
                alphas = named[1] if isinstance(named, tuple) else None
                tensors.update(_with_biases(tensors, biases, alphas or {}))
            tensors.update(magnitudes)
            return named

        self.__dict__["lora_state_dict"] = lora_state_dict
        try:
            return load_lora_weights(self, source, *args, **kwargs)
        finally:
            self.__dict__.pop("lora_state_dict", None)

    return refactored


def _vectors(pipeline: Any, vectors: dict[str, Tensor], state: Any, start: str, end: str) -> dict[str, Tensor]:
    """One number per output of some modules, of a DoRA's magnitudes say, by the names that PEFT has for them.

    Whoever converts the names of a LoRA converts these: they go as the up-projection of a LoRA of rank 1.
    """
    lora: dict[str, Tensor] = {}
    for key, value in vectors.items():
        base = key.rpartition(".")[0]
        down = _down_beside(base, state)
        if down is None:
            raise SVDQuantError(f"{key}: has no LoRA beside it; download the adapter again")
        lora[f"{base}.lora_down.weight"] = torch.ones(1, down.shape[1])
        lora[f"{base}.lora_up.weight"] = value.reshape(-1, 1).float()
        lora[f"{base}.alpha"] = torch.tensor(1.0)
    names = by_module(lora, module_names(denoisers(pipeline)[0]), start)
    if names is None:
        out = type(pipeline).lora_state_dict(lora, return_alphas=True)
        names = _all_named(pipeline, out)[0]
    return {
        key.replace(".lora_B.weight", f".{end}"): value[:, 0].contiguous()
        for key, value in names.items()
        if key.endswith(".lora_B.weight")
    }


def _down_beside(base: str, state: Any) -> Tensor | None:
    """A of the LoRA of the module that a file calls `base`."""
    names = (f"{base}.{end}.weight" for end in ("lora_down", "lora_A"))
    return next((state[name] for name in names if name in state), None)


_DIFFERENCES = (".diff", ".diff_b")


def bias_differences(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What an adapter adds to the biases of layers that it has a LoRA for."""
    found = ((key, value) for key, value in state.items() if key.endswith(".diff_b") and bool(value.any()))
    return {key: value for key, value in found if _down_beside(key.removesuffix(".diff_b"), state) is not None}


def _with_biases(state: dict[str, Tensor], biases: dict[str, Tensor], alphas: dict[str, Any]) -> dict[str, Tensor]:
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


def warn_left_out(state: dict[str, Tensor]) -> None:
    """Names in a warning what nobody takes along: differences of norms, and of layers without a LoRA."""
    taken = bias_differences(state)
    left_out = [
        key for key, value in state.items() if key.endswith(_DIFFERENCES) and key not in taken and bool(value.any())
    ]
    if left_out:
        warnings.warn(
            f"{len(left_out)} differences of norms, or without a LoRA beside them, are left out: {', '.join(left_out)}",
            stacklevel=4,
        )


def _all_named(pipeline: Any, outputs: Any) -> Any:
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
        _warn_unmatched(denoiser, lost)
    return outputs


def _checked(load_lora_adapter: Any) -> Any:
    def checked(self: Any, adapter: Any, prefix: str | None = "transformer", hotswap: bool = False, **kw: Any) -> Any:
        if not is_quantized(self) or not isinstance(adapter, dict):
            out = load_lora_adapter(self, adapter, prefix=prefix, hotswap=hotswap, **kw)
        else:
            start = "" if prefix is None else f"{prefix}."
            mine = {key.removeprefix(start): value for key, value in adapter.items() if key.startswith(start)}
            if any(_DOWN in key for key in mine):
                unmatched = check_lora(self, mine)
                if unmatched:
                    _warn_unmatched(self, unmatched)
                    adapter = {key: v for key, v in adapter.items() if key.removeprefix(start) not in set(unmatched)}
            out = load_lora_adapter(self, adapter, prefix=prefix, hotswap=hotswap, **kw)
        if is_quantized(self):
            from .peft_dense import adopt

            adopt(self)
            if hotswap:
                switching.forget_branches(self)
        return out

    return checked


def _warn_unmatched(model: nn.Module, keys: list[str]) -> None:
    warnings.warn(
        f"{type(model).__name__} has no module for {len(keys)} tensors of the adapter, which are left out: "
        f"{', '.join(keys)}",
        stacklevel=5,
    )


def _recorded(change: Any) -> Any:
    """fuse_lora and unfuse_lora change ranks, which a saved model's configuration states."""

    def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = change(self, *args, **kwargs)
        if is_quantized(self):
            config = common.record_layers(self, self.hf_quantizer.quantization_config)
            self.hf_quantizer.quantization_config = config
            self.register_to_config(quantization_config=config)
        return out

    return recorded


for _name in (_MIXIN, _PIPELINES):
    if _name in sys.modules:
        register(sys.modules[_name])
