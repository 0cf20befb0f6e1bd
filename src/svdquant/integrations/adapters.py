"""Adapters by one call, for pipelines and bare models alike, and what a file of them holds."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..checkpoint.header import read_header
from ..errors import SVDQuantError
from . import pixart
from .adapter_formats import kind_of
from .adapter_prepare import finish, oft_terms, prepare
from .adapter_vectors import with_biases
from .lora_loading import check_lora, fetch_state
from .requests import denoisers

# Transformer → the mixin of diffusers that knows the names of its adapters.
_MIXINS = {
    "FluxTransformer2DModel": "FluxLoraLoaderMixin",
    "Flux2Transformer2DModel": "Flux2LoraLoaderMixin",
    "QwenImageTransformer2DModel": "QwenImageLoraLoaderMixin",
    "SanaTransformer2DModel": "SanaLoraLoaderMixin",
    "SD3Transformer2DModel": "SD3LoraLoaderMixin",
    "WanTransformer3DModel": "WanLoraLoaderMixin",
    "ZImageTransformer2DModel": "ZImageLoraLoaderMixin",
}


def load_adapter(
    target: Any, source: str | Path | dict[str, Tensor], name: str | None = None, strength: float = 1.0
) -> str:
    """Loads an adapter beside those that are active, at a strength; returns its name.

    target: a pipeline, or a model whose adapters PEFT keeps. source: a .safetensors file, a folder or Hub id with
    one, or tensors. name: the file's by default. Raises `SVDQuantError` where it fits nothing.
    """
    check_adapter(source)
    name = name or free_name(target, source)
    models = denoisers(target) if not isinstance(target, nn.Module) else [target]
    active = _active(models)
    pipeline = target if hasattr(target, "load_lora_weights") else _bare(models[0])
    try:
        if pipeline is not None:
            pipeline.load_lora_weights(source if isinstance(source, dict) else str(source), adapter_name=name)
        else:
            _load_into(models[0], source, name)
    except SVDQuantError:
        raise
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        what = "these tensors are" if isinstance(source, dict) else f"{source}: is"
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SVDQuantError(f"{what} no adapter that can be loaded ({reason})") from error
    together = active | {name: strength}
    if hasattr(target, "load_lora_weights"):
        # Text encoders too, where the file has something for them.
        target.set_adapters(list(together), list(together.values()))
        return name
    for model in models:
        known = getattr(model, "peft_config", {})
        here = {n: s for n, s in together.items() if n in known}
        if here:
            model.set_adapters(list(here), list(here.values()))  # type: ignore[operator]
    return name


_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def check_adapter(source: str | Path | dict[str, Tensor]) -> None:
    """Raises `SVDQuantError` for a file that is not there or cut off, before anything is loaded for its sake."""
    if isinstance(source, dict):
        return
    path = Path(source)
    if path.is_file() and path.suffix == ".safetensors":
        read_header(path)
    elif not path.exists() and (path.suffix == ".safetensors" or not _HUB_ID.fullmatch(str(source))):
        raise SVDQuantError(f"{source}: does not exist; give an adapter's .safetensors file, its folder or a Hub id")


def _active(models: list[nn.Module]) -> dict[str, float]:
    """Active adapters → strength, as far as every layer agrees in it."""
    from .peft_dense import unit_strength
    from .switching import lora_layers

    found: dict[str, float] = {}
    for model in models:
        for layer in lora_layers(model):
            for name in layer.active_adapters:
                if name not in found and name in getattr(layer, "lora_A", ()):
                    found[name] = float(layer.scaling[name]) / unit_strength(layer, name)
    return found


def set_strength(model: Any, name: str, strength: float) -> None:
    """Changes the strength of one adapter of a model; others stay active as they are."""
    together = _active([model]) | {name: strength}
    model.set_adapters(list(together), list(together.values()))


def remove_adapter(model: Any, name: str) -> None:
    """Takes an adapter out of a model; does nothing where it is not loaded.

    With the last one PEFT's layers go too, and what FLUX' loader has widened for it becomes as it was.
    """
    known = getattr(model, "peft_config", {})
    if name not in known:
        return
    if len(known) > 1:
        model.delete_adapters(name)
        return
    pipeline = _bare(model)
    if pipeline is not None and getattr(model, "_overwritten_params", None) is not None:
        pipeline.unload_lora_weights(reset_to_overwritten_params=True)
        model._overwritten_params = None
    else:
        model.unload_lora()


def free_name(target: Any, source: Any) -> str:
    """A name for an adapter that no other has and that PEFT takes (no dots)."""
    stem = "adapter" if isinstance(source, dict) else re.sub(r"\W+", "_", Path(str(source)).stem) or "adapter"
    models = denoisers(target) if not isinstance(target, nn.Module) else [target]
    taken = {n for model in models for n in getattr(model, "peft_config", {})}
    return next(n for i in range(len(taken) + 1) if (n := stem if not i else f"{stem}_{i + 1}") not in taken)


def _bare(model: Any) -> Any:
    """A pipeline of nothing but this model, for diffusers' loading; None where it has none for such a model."""
    from diffusers.loaders import lora_pipeline

    name = next((cls.__name__ for cls in type(model).__mro__ if cls.__name__ in _MIXINS), None)
    mixin: Any = getattr(lora_pipeline, _MIXINS[name], None) if name else None
    if mixin is None:
        return None

    class Bare(mixin):
        def __init__(self) -> None:
            self.transformer, self.text_encoder = model, None
            self.components = {"transformer": model}
            self.hf_device_map = None

    return Bare()


def _load_into(model: Any, source: Any, name: str) -> None:
    """Without a pipeline that knows the names: they have to be the model's own."""
    from diffusers.loaders.peft import PeftAdapterMixin

    start = "transformer."
    prepared = prepare(model, dict(fetch_state(source)[0]), start, terms=oft_terms(source))
    state = prepared.state | prepared.lora
    state = {k if k.startswith(start) else start + k.removeprefix("unet."): v for k, v in state.items()}
    bare = {k.removeprefix(start): v for k, v in state.items()}
    check_lora(model, bare, "these tensors" if isinstance(source, dict) else str(source))
    if prepared.biases:
        state |= with_biases(state, prepared.biases, {})
    state |= prepared.magnitudes
    if not isinstance(model, PeftAdapterMixin):
        pixart.adopt(model)
    model.load_lora_adapter(state, adapter_name=name)
    finish(model, name, prepared)


@dataclass
class AdapterInfo:
    """What `svdquant lora inspect` shows.

    kind: whose names (see `adapter_formats.kind_of`). modules: how many are changed. ranks: rank → modules.
    alphas: alpha → modules, where the file holds them. extras: tensors that belong to no low-rank pair, by kind.
    """

    path: str
    kind: str
    modules: int
    parts: dict[str, int]
    ranks: dict[int, int]
    alphas: dict[str, int]
    extras: dict[str, int]
    dtypes: dict[str, int]
    total_bytes: int
    metadata: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


_PAIR = re.compile(
    r"\.?_?(lora_A|lora_B|lora_down|lora_mid|lora_up|lora\.down|lora\.up|down|up|hada_w[12]_[ab]|hada_t[12]"
    r"|lokr_w[12](_[ab])?|lokr_t2|(?<=\.)[ab][12](?=\.weight)|oft_blocks(\.\d+)?|oft_R|on_input|diff)(\.weight)?$"
)
_LEAF_RANK = {"lora_A": 0, "lora_down": 0, "lora.down": 0, "down": 0, "hada_w1_b": 0, "lokr_w2_b": 0, "a2": 0}
# Tensors of a group that are no change of their own.
_BESIDE = re.compile(r"(alpha|\.oft_R\.scaled_oft)$")


def inspect_adapter(path: str | Path) -> AdapterInfo:
    """Reads what an adapter's file says. Raises `SVDQuantError` where it is none."""
    file = Path(path)
    if not file.is_file():
        raise SVDQuantError(f"{file}: is no file; give an adapter's .safetensors")
    tensors, metadata = read_header(file)
    kind = kind_of(tensors)
    ranks: Counter[int] = Counter()
    extras: Counter[str] = Counter()
    modules: set[str] = set()
    parts: Counter[str] = Counter()
    for name, info in tensors.items():
        found = _PAIR.search(name)
        if not found or (found[1] == "diff" and len(info.shape) < 2):
            if name.endswith(".weight") and f"{name.removesuffix('.weight')}.on_input" in tensors:
                continue
            if not _BESIDE.search(name):
                extras[name.rpartition(".")[2]] += 1
            continue
        module = name[: found.start()]
        if module not in modules:
            modules.add(module)
            parts[_part(module)] += 1
        axis = _LEAF_RANK.get(found[1])
        if axis is not None and kind != "nunchaku":
            # GLoRA has had its matrices both ways round.
            ranks[min(info.shape) if found[1] == "a2" else info.shape[axis]] += 1
        elif kind == "nunchaku" and found[1] == "lora_down":
            ranks[info.shape[1]] += 1
    if not modules:
        raise SVDQuantError(
            f"{file}: holds no adapter ({len(tensors)} tensors, the first is {next(iter(tensors), '')})"
        )
    return AdapterInfo(
        str(file),
        kind,
        len(modules),
        dict(parts),
        dict(sorted(ranks.items())),
        _alphas(file, [name for name in tensors if name.endswith("alpha")]),
        dict(extras),
        dict(Counter(info.dtype for info in tensors.values())),
        sum(info.nbytes for info in tensors.values()),
        {key: value for key, value in metadata.items() if len(value) <= 200},
    )


def _part(module: str) -> str:
    """Which model of a pipeline a module belongs to."""
    for start, part in (("lora_te", "text encoder"), ("text_encoder", "text encoder"), ("lora_unet", "denoiser")):
        if module.startswith(start):
            return part
    return "denoiser"


def _alphas(file: Path, names: list[str]) -> dict[str, int]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as reader:
        values = [float(reader.get_tensor(name)) for name in names]
    return {f"{value:g}": count for value, count in sorted(Counter(values).items())}
