"""diffusers' own LoRA calls on quantized models: what they lack, wrapped around them.

A model of another kind goes through unseen: every wrapper asks first.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..checkpoint.layout import PICKLES
from ..errors import SVDQuantError
from . import common, differences, flux_shapes, switching
from .adapter_prepare import Prepared, finish, oft_terms, prepare, saved_transforms
from .adapter_vectors import DIFFERENCES, module_names, take_differences, warn_unmatched
from .peft_transforms import transforms_of
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
            ("save_lora_adapter", _saved),
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
        elif value.dim() > 2 and hasattr(module, "in_channels"):
            weight: Any = module.weight
            fits = value.shape[0] == weight.shape[0] if key.endswith(_UP) else value.shape[1:] == weight.shape[1:]
            if key.endswith((_DOWN, _UP)) and not fits:
                raise SVDQuantError(
                    f"{where}: {key} has the shape {list(value.shape)}, which does not fit {name} "
                    f"{list(weight.shape)}; it was made for another model"
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
        given, metadata = fetch_state(source, **access)
        denoiser: Any = self.transformer_2 if kwargs.get("load_into_transformer_2") else denoisers(self)[0]
        start = "unet." if denoiser is getattr(self, "unet", None) else "transformer."
        prepared = prepare(denoiser, given, start, self, metadata, oft_terms(source))
        if kwargs.get("hotswap"):
            _check_hotswap(denoiser, prepared.transforms, kwargs.get("adapter_name"))

        def lora_state_dict(*given: Any, **options: Any) -> Any:
            return prepared.complete(self, type(self).lora_state_dict(*given, **options), options)

        self.__dict__["lora_state_dict"] = lora_state_dict
        before = set(getattr(denoiser, "peft_config", {}))
        try:
            out = load_lora_weights(self, prepared.state, *args, **kwargs)
        finally:
            self.__dict__.pop("lora_state_dict", None)
        loaded = [name for name in getattr(denoiser, "peft_config", {}) if name not in before]
        if loaded or kwargs.get("hotswap"):
            finish(denoiser, loaded[0] if loaded else kwargs["adapter_name"], prepared)
        return out

    return refactored


def _check_hotswap(model: Any, transforms: Any, adapter: Any) -> None:
    there = [layer for layer in switching.lora_layers(model) if adapter in transforms_of(layer)]
    if transforms or there:
        raise SVDQuantError(
            f"adapter {adapter!r} multiplies outputs or inputs, and such adapters cannot be hot-swapped; load it "
            "beside the other and call set_adapters"
        )


def _checked(load_lora_adapter: Any) -> Any:
    def checked(self: Any, adapter: Any, prefix: str | None = "transformer", hotswap: bool = False, **kw: Any) -> Any:
        if not is_quantized(self):
            return load_lora_adapter(self, adapter, prefix=prefix, hotswap=hotswap, **kw)
        start = "" if prefix is None else f"{prefix}."
        if not isinstance(adapter, dict):
            adapter, metadata = fetch_state(adapter, **{name: kw[name] for name in _FETCHING if name in kw})
            # Of a file that a model has saved, whose names have no prefix; diffusers looks for them with one only.
            kw.setdefault("metadata", metadata)
        mine = {key: value for key, value in adapter.items() if key.startswith(start)}
        others, transforms = saved_transforms(mine)
        bare = {key.removeprefix(start): value for key, value in others.items()}
        whole = take_differences(self, bare)
        bare = {key: value for key, value in bare.items() if not key.endswith(DIFFERENCES)}
        if any(_DOWN in key for key in bare):
            unmatched = check_lora(self, bare)
            if unmatched:
                warn_unmatched(self, unmatched)
                bare = {key: value for key, value in bare.items() if key not in set(unmatched)}
        if hotswap:
            _check_hotswap(self, transforms, kw.get("adapter_name"))
        adapter = {f"{start}{key}": value for key, value in bare.items()}
        before = set(getattr(self, "peft_config", {}))
        out = load_lora_adapter(self, adapter, prefix=prefix, hotswap=hotswap, **kw)
        from .peft_dense import adopt

        adopt(self)
        if hotswap:
            switching.forget_branches(self)
        for name in getattr(self, "peft_config", {}):
            if name not in before:
                finish(self, name, Prepared({}, transforms=transforms, whole=whole))
        return out

    return checked


def _saved(save_lora_adapter: Any) -> Any:
    """A saved adapter holds all of it: what it adds to norms and biases too."""

    def saved(self: Any, save_directory: Any, adapter_name: str = "default", *args: Any, **kwargs: Any) -> Any:
        if not is_quantized(self):
            return save_lora_adapter(self, save_directory, adapter_name, *args, **kwargs)
        given = dict(zip(("upcast_before_saving", "safe_serialization", "weight_name"), args, strict=False)) | kwargs
        if not given.get("safe_serialization", True):
            raise SVDQuantError("adapters are saved as safetensors; leave safe_serialization as it is")
        upcast = given.pop("upcast_before_saving", False)
        kept = differences.differences_of(self)
        changes = {} if kept is None else kept.adapters.get(adapter_name, {})
        # Theirs casts the model, which a quantized one refuses, and not only what it saves.
        self.__dict__["to"] = lambda *_, **__: self
        try:
            out = save_lora_adapter(self, save_directory, adapter_name, **given)
        finally:
            del self.__dict__["to"]
        if changes or upcast:
            name = given.get("weight_name") or "pytorch_lora_weights.safetensors"
            _rewrite(Path(save_directory) / name, differences.named(changes), upcast)
        return out

    return saved


def _rewrite(file: Path, more: dict[str, Tensor], upcast: bool) -> None:
    with safe_open(file, framework="pt") as reader:
        metadata = reader.metadata()
        state = {key: reader.get_tensor(key) for key in reader.keys()}  # noqa: SIM118  (it is no dict)
    state = {key: value.float() if upcast else value for key, value in (state | more).items()}
    save_file({key: value.contiguous() for key, value in state.items()}, file, metadata=metadata)


def _recorded(change: Any) -> Any:
    """fuse_lora and unfuse_lora change ranks, which a saved model's configuration states.

    Of a pipeline too: its unfuse_lora does not call its models'. What cannot be fused is refused before anything is.
    """

    def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
        if change.__name__ == "fuse_lora" and isinstance(self, nn.Module) and is_quantized(self):
            _check_fusable(self, kwargs.get("adapter_names"))
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


def _check_fusable(model: nn.Module, names: list[str] | None) -> None:
    for layer in switching.lora_layers(model):
        check: Any = getattr(layer, "check_fusable", None)
        if check is not None:
            check([name for name in names or layer.active_adapters if name in layer.lora_A])


for _name in (_MIXIN, _PIPELINES):
    if _name in sys.modules:
        register(sys.modules[_name])
