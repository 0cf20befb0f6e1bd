"""A file of an adapter made ready for diffusers' loaders: whatever they do not know is taken out or made a LoRA."""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SVDQuantError
from . import differences
from .adapter_formats import grouped, kind_of, needs_conversion, to_lora
from .adapter_names import by_module
from .adapter_nunchaku import from_nunchaku
from .adapter_transforms import NEUMANN_TERMS
from .adapter_vectors import (
    DIFFERENCES,
    all_named,
    bias_differences,
    converted,
    module_names,
    take_differences,
    vectors,
    warn_unmatched,
    with_biases,
    with_peft_ends,
)
from .adapter_weights import Names, Probe, Special, take, zero_pair
from .peft_transforms import KEPT, Transform, attach, from_named

_SAVED = re.compile(rf"^(?:transformer\.|unet\.)?(.+)\.{KEPT}\.(\w+)$")


@dataclass
class Prepared:
    """state: for diffusers, in names that it knows. transforms and whole: for `finish`, when the adapter is loaded.

    lora, biases and magnitudes go beside what diffusers' converters make of `state`; metadata: PEFT's configuration.
    """

    state: dict[str, Tensor]
    lora: dict[str, Tensor] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    magnitudes: dict[str, Tensor] = field(default_factory=dict)
    transforms: dict[str, Transform] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)
    metadata: Any = None

    def complete(self, pipeline: Any, outputs: Any, options: dict[str, Any]) -> Any:
        """What `lora_state_dict` has returned for these options, with all that belongs beside it."""
        named = all_named(pipeline, outputs)
        parts = named if isinstance(named, tuple) else (named,)
        tensors = with_peft_ends(parts[0])
        alphas = parts[1] if options.get("return_alphas") and len(parts) > 1 else None
        for key, value in self.lora.items():
            if key in tensors:
                raise SVDQuantError(
                    f"{key}: the adapter holds a LoRA and another change of one layer; take one of them"
                )
            tensors[key] = value
            if alphas and key.endswith(".lora_B.weight"):
                alphas[key.replace(".lora_B.weight", ".alpha")] = value.shape[1]
        if self.biases:
            tensors.update(with_biases(tensors, self.biases, alphas or {}))
        tensors.update(self.magnitudes)
        rest = list(parts[1:])
        if self.metadata is not None and options.get("return_lora_metadata"):
            rest[-1] = self.metadata
        return (tensors, *rest) if isinstance(named, tuple) else tensors


def prepare(
    model: nn.Module, state: dict[str, Tensor], start: str, pipeline: Any = None, metadata: Any = None, terms: int = 5
) -> Prepared:
    """state: the file's tensors; start: what the denoiser's keys begin with; pipeline: whose converters know names.

    Raises `SVDQuantError` for what would mean something else than its file says; what nobody has a place for is named
    in a warning.
    """
    modules = module_names(model)
    state, transforms = saved_transforms(state)
    probe = None if pipeline is None else _probe(pipeline, start)
    special, state = take(state, modules, probe, terms)
    whole = special.whole | take_differences(model, state)
    biases_of = bias_differences(state)
    state = {key: value for key, value in state.items() if not key.endswith(DIFFERENCES)}
    if needs_conversion(state):
        names = Names(modules, probe)
        names.ask(dict.fromkeys(grouped(state), 12))
        refactored = to_lora(state, names.convolution)
        _warn(refactored.sentence())
        state = refactored.state
    _warn(special.sentence())
    if special.unknown:
        warn_unmatched(model, special.unknown)
    if kind_of(state) == "nunchaku":
        state, rest = from_nunchaku(state, model, start)
        if rest:
            warn_unmatched(model, rest)
    if metadata and not any(key.startswith(start) for key in metadata):
        # Saved by a model's own call, and so without its name.
        metadata = {start + key: value for key, value in metadata.items()}
    out = Prepared(state, _prefixed(special, start), whole=whole, metadata=metadata)
    out.transforms = transforms | special.transforms
    # A configuration of PEFT's says what the alphas are, and that the names are diffusers'.
    ours = None if metadata else by_module(state, modules, start)
    doras = {key: value for key, value in state.items() if key.endswith(".dora_scale")}
    if doras:
        found = vectors(pipeline, model, doras, state, start, "lora_magnitude_vector")
        out.magnitudes = {key: _as_pefts(key.removeprefix(start), value, modules) for key, value in found.items()}
    if biases_of:
        out.biases = vectors(pipeline, model, biases_of, state, start, "lora_B.bias")
    out.state = {key: value for key, value in (state if ours is None else ours).items() if key not in doras}
    if not any("lora" in key for key in out.state):
        _carry(out, model, modules, start, special)
    return out


def _as_pefts(key: str, magnitude: Tensor, modules: dict[str, Any]) -> Tensor:
    """A convolution's lengths of rows [N] as PEFT has them."""
    weight = getattr(modules.get(key.partition(".lora_")[0]), "weight", None)
    dims = 2 if weight is None else weight.dim()
    return magnitude if dims == 2 else magnitude.reshape(1, -1, *[1] * (dims - 2))


def _carry(out: Prepared, model: nn.Module, modules: dict[str, Any], start: str, special: Special) -> None:
    """Without a LoRA of the file's own: what there is becomes it, and a pair of zeros carries what has no pair."""
    if not out.lora and out.whole:
        name = next(n for n, m in modules.items() if isinstance(m, nn.Linear))
        out.lora = {start + key: value for key, value in zero_pair(name, modules[name]).items()}
    if not out.lora:
        if special.unknown:
            raise SVDQuantError(
                f"none of the adapter's {len(special.unknown)} tensors belongs to a module of this "
                f"{type(model).__name__} (the first is {special.unknown[0]}); it was made for another model"
            )
        return
    out.state, out.lora = out.state | out.lora, {}


def finish(model: nn.Module, adapter: str, prepared: Prepared) -> None:
    """What PEFT does not know of an adapter that it has loaded."""
    attach_all(model, adapter, prepared.transforms)
    if prepared.whole:
        differences.keep(model, adapter, prepared.whole)


def attach_all(model: nn.Module, adapter: str, transforms: dict[str, Transform]) -> None:
    """Gives the model's LoRA layers their transforms. Raises `SVDQuantError` where one has no layer."""
    layers: dict[str, Any] = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A")} if transforms else {}
    for name, transform in transforms.items():
        if name not in layers or adapter not in layers[name].lora_A:
            raise SVDQuantError(f"the adapter's {name} has no pair of matrices beside it; download the adapter again")
        attach(layers[name], adapter, transform, name)


def saved_transforms(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Transform]]:
    """(the other tensors, module → transform) of an adapter that was saved from a quantized model."""
    found: dict[str, dict[str, Tensor]] = {}
    rest = {}
    for key, value in state.items():
        match = _SAVED.match(key)
        if match:
            found.setdefault(match[1], {})[match[2]] = value
        else:
            rest[key] = value
    return rest, {name: from_named(tensors, name) for name, tensors in found.items()}


def oft_terms(source: Any) -> int:
    """Terms of the series in PEFT's OFT by the configuration beside a file, 0 for the inverse; its default without."""
    folder = Path(str(source)) if not isinstance(source, dict) else None
    file = None if folder is None else (folder if folder.is_dir() else folder.parent) / "adapter_config.json"
    try:
        config = json.loads(file.read_text()) if file is not None else {}
    except (OSError, ValueError):
        return NEUMANN_TERMS
    if config.get("peft_type") != "OFT":
        return NEUMANN_TERMS
    return int(config.get("num_cayley_neumann_terms", NEUMANN_TERMS)) if config.get("use_cayley_neumann", True) else 0


def _prefixed(special: Special, start: str) -> dict[str, Tensor]:
    return {start + key: value for key, value in special.lora.items()}


def _warn(sentence: str) -> None:
    if sentence:
        warnings.warn(sentence, stacklevel=5)


def _probe(pipeline: Any, start: str) -> Probe:
    """Which rows of a file's module are whose in the model, by what diffusers' converters do to their numbers."""

    def ask(rows: dict[str, int]) -> dict[str, dict[str, Tensor]]:
        found = _asked(pipeline, rows, start)
        if found is None:
            # One name that a converter does not know keeps it from all.
            found = {}
            for base, count in rows.items() if len(rows) > 1 else ():
                found |= _asked(pipeline, {base: count}, start) or {}
        return found

    return ask


def _asked(pipeline: Any, rows: dict[str, int], start: str) -> dict[str, dict[str, Tensor]] | None:
    names = list(rows)
    lora: dict[str, Tensor] = {}
    for number, (base, count) in enumerate(rows.items(), 1):
        stem = re.sub("^(lycoris_|oft_unet_)", "lora_unet_", base)
        lora[f"{stem}.lora_down.weight"] = torch.full((1, 1), float(number))
        lora[f"{stem}.lora_up.weight"] = torch.arange(1.0, count + 1)[:, None]
        lora[f"{stem}.alpha"] = torch.tensor(1.0)
    try:
        tensors = converted(pipeline, lora)
    except Exception:  # whatever they raise, they do not know a name
        return None
    found: dict[str, dict[str, Tensor]] = {}
    for key, down in tensors.items():
        module, end, _ = key.removeprefix(start).partition(".lora_A.weight")
        up = tensors.get(key.replace(".lora_A.", ".lora_B."))
        if end and up is not None and 1 <= int(down.flatten()[0]) <= len(names):
            found.setdefault(names[int(down.flatten()[0]) - 1], {})[module] = up.flatten().long() - 1
    return {base: dict(sorted(parts.items(), key=lambda part: int(part[1][0]))) for base, parts in found.items()}
