"""`svdquant lora merge`: adapters made part of a checkpoint."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.canonical import load_model, save_model
from ..checkpoint.layout import open_checkpoint
from ..config import SVDQuantConfig
from ..errors import SVDQuantError
from ..nn import make_layer, replace_module
from ..numerics import SVDQuantTensors
from ..ptq.requantize import weight_error
from ..ptq.resolve import solve_again
from . import attach, differences
from .adapters import check_adapter, load_adapter
from .convert import check_target
from .peft_dora import dora_change, is_special
from .peft_transforms import own_weight, transforms_of
from .sources import resolve_checkpoint
from .work_folder import check_disk


@dataclass
class MergeReport:
    """errors: layer → ‖Ŵ′ − (Ŵ + ΔW)‖/‖Ŵ + ΔW‖ of those that were solved again; dense: how many stay in 16 bits."""

    source: str
    target: str
    adapters: dict[str, float]
    errors: dict[str, float] = field(default_factory=dict)
    dense: int = 0
    grown: bool = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def merge_adapters(
    source: str | Path,
    adapters: Sequence[tuple[str | Path, float]],
    target: str | Path,
    *,
    grow: bool = False,
    base: str | Path | None = None,
    component: str | None = None,
    overwrite: bool = False,
    seed: int = 0,
    progress: Callable[[str, int, int, str], Any] | None = None,
) -> MergeReport:
    """Writes the quantized model at `source` to `target` with adapters, pairs of file and strength, in its weights.

    Layers that no adapter touches are kept bit for bit; the others are solved again, data-free, with the smoothing and
    rank that they have. grow: they keep their weights instead, and their branch takes the adapters in whole: a larger
    rank, and no error but that of 16 bits (not for modulations, which have no branch).

    Raises `SVDQuantError` as `convert` and `load_adapter` do; `target` is complete or as it was.
    """
    say = progress or (lambda *_: None)
    out = Path(os.path.abspath(target))
    for file, _ in adapters:
        check_adapter(file)
    path = resolve_checkpoint(source)
    check_target(out, open_checkpoint(path, component).path, overwrite)
    say("load", 0, 1, Path(path).name)
    model = load_model(path, component=component, base=base)
    for file, strength in adapters:
        load_adapter(model, file, strength=strength)
    report = MergeReport(str(source), str(out), {str(file): strength for file, strength in adapters}, grown=grow)
    merge_into(model, report, grow=grow, seed=seed, progress=say)
    say("write", 0, 1, out.name)
    parent = next(p for p in (out.parent, *out.parents) if p.exists())
    check_disk(parent, sum(t.nbytes for t in model.state_dict().values()))
    save_model(model, out)
    say("write", 1, 1, out.name)
    return report


@torch.no_grad()
def merge_into(
    model: Any,
    report: MergeReport,
    *,
    grow: bool = False,
    seed: int = 0,
    progress: Callable[[str, int, int, str], Any] = lambda *_: None,
) -> None:
    """Makes the active adapters of `model` part of its weights and unloads them; fills the report."""
    from .peft import FusedLayer

    wrapped = {name: m for name, m in model.named_modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")}
    if not wrapped:
        raise SVDQuantError("no adapter is loaded")
    quantized = {name: m for name, m in wrapped.items() if hasattr(m.base_layer, "spec")}
    _check_biases(quantized)
    for name, layer in wrapped.items():
        if name not in quantized or (grow and isinstance(layer, FusedLayer) and _plain(layer)):
            layer.merge(safe_merge=True)
            report.dense += name not in quantized
    again = {name: layer for name, layer in quantized.items() if not layer.merged_adapters}
    changes = {name: _change(layer) for name, layer in again.items()}
    biases = {name: _bias_change(layer) for name, layer in again.items()}
    records = {name: layer.base_layer.tensors() for name, layer in again.items()}
    activations = {name: layer.base_layer.activations for name, layer in again.items()}
    differences.make_own(model)
    model.unload_lora()
    groups = _groups(records)
    for number, names in enumerate(groups):
        progress("merge", number, len(groups), names[0])
        # Of the first layer's name, so that a result does not depend on which others there are.
        digest = hashlib.blake2b(f"{seed} {names[0]}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        members = [records[name] for name in names]
        for name, new in zip(names, solve_again(members, [changes[n] for n in names], generator), strict=True):
            wanted = records[name].dense()[0] + changes.pop(name)
            report.errors[name] = weight_error(new.dense()[0], wanted)
            if (bias := biases[name]) is not None and new.bias is not None:
                new.bias = (new.bias.float() + bias.to(new.bias.device)).to(new.bias.dtype)
            solved: Any = make_layer(model.get_submodule(name), new)
            solved.activations = activations[name]
            replace_module(model, name, solved)
    held = getattr(getattr(model, "config", None), "quantization_config", None)
    attach(model, held if isinstance(held, SVDQuantConfig) else SVDQuantConfig())


def _active(layer: Any) -> list[str]:
    return [name for name in layer.active_adapters if name in layer.lora_A and float(layer.scaling[name])]


def _plain(layer: Any) -> bool:
    return not any(is_special(layer, name) or layer.lora_bias.get(name) for name in _active(layer))


def _change(layer: Any) -> Tensor:
    """ΔW float32 [N, K] of the active adapters at their strengths."""
    weight = own_weight(layer.base_layer).flatten(1)
    change = torch.zeros_like(weight)
    if getattr(layer.base_layer, "fused_down", None) is not None:
        # Fused before: part of what the layer means, and not of its record.
        change += layer.base_layer.fused_up.float() @ layer.base_layer.fused_down.float()
    for name in _active(layer):
        transform = transforms_of(layer).get(name)
        if name in layer.lora_variant or (transform is not None and transform.length is not None):
            change += dora_change(layer, name, weight)
        elif transform is not None:
            change += float(layer.scaling[name]) * transform.change(weight)
        else:
            down, up = layer.lora_A[name].weight.flatten(1).float(), layer.lora_B[name].weight.flatten(1).float()
            change += float(layer.scaling[name]) * (up @ down)
    if not bool(change.isfinite().all()):
        raise SVDQuantError(
            f"{', '.join(_active(layer))}: an adapter holds numbers that are not finite; download it again"
        )
    return change


def _bias_change(layer: Any) -> Tensor | None:
    """What the active adapters add to the bias, float32 [N]; None for nothing."""
    changes = [
        layer.lora_B[name].bias.float() * float(layer.scaling[name])
        for name in _active(layer)
        if layer.lora_bias.get(name)
    ]
    return sum(changes[1:], changes[0]) if changes else None


def _check_biases(quantized: dict[str, Any]) -> None:
    for name, layer in quantized.items():
        change = _bias_change(layer)
        if layer.base_layer.bias is None and change is not None and bool(change.any()):
            raise SVDQuantError(
                f"{name}: an adapter adds to its bias, and it has none; leave the adapter beside the model"
            )


def _groups(records: dict[str, SVDQuantTensors]) -> list[list[str]]:
    """Names of layers that share their input's smoothing and down-projection, as q, k and v do: they keep sharing."""
    groups: dict[Any, list[str]] = {}
    for name, record in records.items():
        key: Any = name
        if record.proj_down is not None:
            digest = hashlib.blake2b(digest_size=16)
            for t in (record.proj_down, record.smooth_factor):
                if t is not None:
                    digest.update(t.detach().contiguous().view(torch.uint8).cpu().numpy().tobytes())
            key = record.spec, digest.digest()
        groups.setdefault(key, []).append(name)
    return list(groups.values())
