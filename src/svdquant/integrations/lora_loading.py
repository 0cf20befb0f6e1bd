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

from torch import Tensor, nn

from ..checkpoint.layout import PICKLES
from ..errors import SVDQuantError
from . import common, differences, flux_shapes, switching
from .adapter_formats import kind_of, needs_conversion, to_lora
from .adapter_names import by_module
from .adapter_nunchaku import from_nunchaku
from .adapter_vectors import (
    DIFFERENCES,
    all_named,
    bias_differences,
    module_names,
    take_differences,
    vectors,
    warn_unmatched,
    with_biases,
)
from .requests import denoisers
from .switching import is_quantized

_MIXIN, _PIPELINES = "diffusers.loaders.peft", "diffusers.loaders.lora_pipeline"
_SWITCHING = (
    "set_adapter",
    "disable_adapters",
    "enable_adapters",
    "disable_lora",
    "enable_lora",
    "delete_adapters",
    "unload_lora",
)
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"


def register(module: ModuleType) -> None:
    """Wraps the methods that `module`, one of the two above, defines. Idempotent."""
    if module.__name__ == _MIXIN:
        mixin = module.PeftAdapterMixin
        for name, wrapper in (
            ("load_lora_adapter", _checked),
            ("set_adapters", lambda theirs: differences.following(switching.quick(theirs))),
            ("fuse_lora", _recorded),
            ("unfuse_lora", _recorded),
            *((name, differences.following) for name in _SWITCHING),
        ):
            _wrap(mixin, name, wrapper)
    elif module.__name__ == _PIPELINES:
        for cls in list(vars(module).values()):
            if isinstance(cls, type) and cls.__name__.endswith("LoraLoaderMixin"):
                _wrap(cls, "load_lora_weights", _refactored)
        _wrap(module.LoraBaseMixin, "unfuse_lora", _recorded)
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
        denoiser = denoisers(self)[0]
        whole = take_differences(denoiser, state)
        biases_of = bias_differences(state)
        if any(key.endswith(DIFFERENCES) for key in state) and kind_of(state) != "difference":
            source = state = {key: value for key, value in state.items() if not key.endswith(DIFFERENCES)}
        if needs_conversion(state):
            converted = to_lora(state)
            warnings.warn(converted.sentence(), stacklevel=3)
            source = state = converted.state
        start = "unet." if denoiser is getattr(self, "unet", None) else "transformer."
        if kind_of(state) == "nunchaku":
            source, rest = from_nunchaku(state, denoiser, start)
            state = source
            if rest:
                warn_unmatched(denoiser, rest)
        # A configuration of PEFT's says what the alphas are, and that the names are diffusers'.
        ours = None if metadata else by_module(state, module_names(denoiser), start)
        if ours is not None:
            source = ours

        magnitudes: dict[str, Tensor] = {}
        if doras := {key: value for key, value in state.items() if key.endswith(".dora_scale")}:
            magnitudes = vectors(self, doras, state, start, "lora_magnitude_vector")
            source = {key: value for key, value in (ours or state).items() if key not in doras}

        biases = vectors(self, biases_of, state, start, "lora_B.bias") if biases_of else {}

        def lora_state_dict(*given: Any, **options: Any) -> Any:
            named = all_named(self, type(self).lora_state_dict(*given, **options))
            tensors = named[0] if isinstance(named, tuple) else named
            if biases:
                alphas = named[1] if isinstance(named, tuple) else None
                tensors.update(with_biases(tensors, biases, alphas or {}))
            tensors.update(magnitudes)
            return named

        self.__dict__["lora_state_dict"] = lora_state_dict
        before = set(getattr(denoiser, "peft_config", {}))
        try:
            out = load_lora_weights(self, source, *args, **kwargs)
        finally:
            self.__dict__.pop("lora_state_dict", None)
        if whole:
            loaded = [n for n in getattr(denoiser, "peft_config", {}) if n not in before]
            differences.keep(denoiser, loaded[0] if loaded else kwargs["adapter_name"], whole)
        return out

    return refactored


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
                    warn_unmatched(self, unmatched)
                    adapter = {key: v for key, v in adapter.items() if key.removeprefix(start) not in set(unmatched)}
            out = load_lora_adapter(self, adapter, prefix=prefix, hotswap=hotswap, **kw)
        if is_quantized(self):
            from .peft_dense import adopt

            adopt(self)
            if hotswap:
                switching.forget_branches(self)
        return out

    return checked


def _recorded(change: Any) -> Any:
    """fuse_lora and unfuse_lora change ranks, which a saved model's configuration states.

    Of a pipeline too: its unfuse_lora does not call its models'.
    """

    def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = change(self, *args, **kwargs)
        for model in [self] if isinstance(self, nn.Module) else denoisers(self):
            if not is_quantized(model):
                continue
            if change.__name__ == "unfuse_lora":
                differences.unfused(model)
            else:
                differences.fused(model, *args[:1], **{k: v for k, v in kwargs.items() if k != "safe_fusing"})
            config = common.record_layers(model, model.hf_quantizer.quantization_config)
            model.hf_quantizer.quantization_config = config
            model.register_to_config(quantization_config=config)
        return out

    return recorded


for _name in (_MIXIN, _PIPELINES):
    if _name in sys.modules:
        register(sys.modules[_name])
