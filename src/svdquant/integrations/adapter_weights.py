"""What an adapter's file holds that takes the model to make sense of: GLoRA, differences of whole weights, transforms.

Everything becomes a LoRA, a transform or a difference under the model's own names. W is the layer without adapters: a
quantized layer's is what it multiplies by with 16-bit activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SVDQuantError
from .adapter_formats import MAX_RANK, best_of, check_finite
from .adapter_names import parts_of
from .adapter_transforms import LEAF, NEUMANN_TERMS, for_inputs, for_outputs, rows_of
from .peft_transforms import Transform, own_weight

_GLORA = ("a1.weight", "a2.weight", "b1.weight", "b2.weight")
_IA3 = ("on_input", "weight")
# File's name → rows in the file of every module that it is; what diffusers' converters know.
Probe = Callable[[dict[str, int]], dict[str, dict[str, Tensor]]]


@dataclass
class Special:
    """lora: `{module}.lora_A.weight` and `lora_B.weight`; whole: parameter → difference; unknown: keys of no module.

    transforms: module → transform, each with a pair of zeros in `lora` to carry it. errors: module → what a LoRA
    leaves out of a weight's difference.
    """

    lora: dict[str, Tensor] = field(default_factory=dict)
    transforms: dict[str, Transform] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)

    def sentence(self) -> str:
        """What was refactored and at what cost; empty where nothing was."""
        if not self.errors:
            return ""
        worst = max(self.errors, key=self.errors.__getitem__)
        return (
            f"{len(self.errors)} differences of quantized weights became LoRAs of at most {MAX_RANK} directions, which "
            f"leave out at most {self.errors[worst]:.1%} of a layer's change ({worst}); to have all of it, add it to "
            "the 16-bit model and quantize that"
        )


def take(
    state: dict[str, Tensor], modules: dict[str, Any], probe: Probe | None = None, terms: int = NEUMANN_TERMS
) -> tuple[Special, dict[str, Tensor]]:
    """(what takes the model to make sense of, the other tensors of the file).

    modules: name without adapters → module. probe: asks diffusers' converters for names. terms: of the series behind
    PEFT's OFT, see `adapter_transforms.for_inputs`. Raises `SVDQuantError` for groups that are not whole or do not fit.
    """
    groups, rest = _groups(state)
    groups |= _differences(rest, modules, probe)
    found = Names(modules, probe)
    found.ask({base: _rows(group) for base, group in groups.items()})
    out = Special()
    for base, group in groups.items():
        check_finite(base, group)
        parts = found.parts(base)
        if parts is None:
            out.unknown += [f"{base}.{leaf}" for leaf in group]
        elif "a1.weight" in group:
            _glora(out, base, group, parts, modules)
        elif "diff" in group or "diff_b" in group:
            _difference(out, base, group, parts, modules)
        elif "dora_scale" in group:
            _columns(out, base, group["dora_scale"], parts, modules)
        else:
            _transforms(out, base, group, parts, modules, terms)
    for name in out.transforms:
        if out.transforms[name].length is None:
            out.lora |= zero_pair(name, modules[name])
    return out, rest


def _groups(state: dict[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    bases = {key[: m.start()] for key in state if (m := LEAF.search(key)) and m[1] != "rescale"}
    bases |= {key[: -len(end)] for end in (".a1.weight",) for key in state if key.endswith(end)}
    groups: dict[str, dict[str, Tensor]] = {base: {} for base in bases}
    rest = {}
    for key, value in state.items():
        base = next((key[:at] for at in _dots(key) if key[:at] in bases), None)
        if base is not None:
            groups[base][key[len(base) + 1 :]] = value
        elif key.endswith(".dora_scale") and value.dim() > 1 and value.shape[0] == 1 < value.shape[1]:
            groups[key.removesuffix(".dora_scale")] = {"dora_scale": value}
        elif not key.endswith(".reshape_weight"):  # which says what A's shape says
            rest[key] = value
    for base, group in groups.items():
        _check_whole(base, group)
    return groups, rest


def _dots(key: str) -> list[int]:
    return [i for i, letter in enumerate(key) if letter == "."]


def _check_whole(base: str, group: dict[str, Tensor]) -> None:
    wanted: Iterable[str]
    if "a1.weight" in group:
        wanted, allowed = _GLORA, {*_GLORA, "alpha"}
    elif "on_input" in group:
        wanted, allowed = _IA3, {*_IA3}
    elif group.keys() == {"dora_scale"}:
        return
    elif any(leaf.startswith("oft_R.") for leaf in group):
        wanted, allowed = ("oft_R.weight",), {"oft_R.weight", "oft_R.scaled_oft", "alpha"}
    else:
        wanted, allowed = (), {"rescale", "alpha", *(leaf for leaf in group if leaf.startswith("oft_blocks"))}
    if missing := [leaf for leaf in wanted if leaf not in group]:
        raise SVDQuantError(f"{base}.{missing[0]} is missing; download the adapter again")
    if others := [leaf for leaf in group if leaf not in allowed]:
        known = ", ".join(leaf for leaf in group if leaf in allowed)
        raise SVDQuantError(f"{base}.{others[0]}: is unknown beside {known}; take the adapter as a plain LoRA")


def _differences(rest: dict[str, Tensor], modules: dict[str, Any], probe: Probe | None) -> dict[str, dict[str, Tensor]]:
    """Differences of whole weights, taken out of `rest`; what stays there is of norms and biases."""
    names = Names(modules, None)
    groups: dict[str, dict[str, Tensor]] = {}
    for key in [key for key in rest if key.endswith(".diff") and rest[key].dim() > 1]:
        base = key.removesuffix(".diff")
        parts = names.parts(base)
        if parts is None and probe is not None and base not in modules:
            names.known |= probe({base: rest[key].shape[0]})
            parts = names.parts(base)
        if parts is not None:
            groups[base] = {"diff": rest.pop(key)}
            if len(parts) > 1 and f"{base}.diff_b" in rest and f"{base}.lora_down.weight" not in rest:
                groups[base]["diff_b"] = rest.pop(f"{base}.diff_b")
    return groups


class Names:
    """What a file's names are in the model: module → rows in the file (None for all of them)."""

    def __init__(self, modules: dict[str, Any], probe: Probe | None) -> None:
        self.modules, self.probe = modules, probe
        self.flat = {name.replace(".", "_"): name for name in modules}
        self.known: dict[str, dict[str, Tensor]] = {}

    def ask(self, rows: dict[str, int]) -> None:
        lost = {base: n for base, n in rows.items() if parts_of(base, self.modules, self.flat) is None}
        if lost and self.probe is not None:
            self.known |= self.probe(lost)

    def convolution(self, base: str) -> tuple[int, ...] | None:
        """The shape of the weight where `base` is one convolution."""
        parts = self.parts(base)
        weight = None if parts is None or len(parts) > 1 else _plain(self.modules[next(iter(parts))]).weight
        return None if weight is None or weight.dim() < 3 else tuple(weight.shape)

    def parts(self, base: str) -> dict[str, Tensor | None] | None:
        names = parts_of(base, self.modules, self.flat)
        if names is not None and all(hasattr(_plain(self.modules[name]), "weight") for name in names):
            return dict.fromkeys(names)
        found = self.known.get(base)
        if found and all(name in self.modules for name in found):
            return {**found}
        return None


def _rows(group: dict[str, Tensor]) -> int:
    """Outputs that a group speaks of; twelve, which many numbers of parts divide, where it does not say."""
    if "a1.weight" in group:
        return max(group["b1.weight"].shape[0], group["b2.weight"].shape[0])
    if "diff" in group:
        return group["diff"].shape[0]
    return (rows_of(group) if "dora_scale" not in group else None) or 12


def _plain(module: Any) -> Any:
    return module.base_layer if hasattr(module, "lora_A") and hasattr(module, "base_layer") else module


def _features(module: Any, axis: int) -> int:
    return int(_plain(module).weight.shape[axis])


def _in_order(base: str, parts: dict[str, Tensor | None], modules: dict[str, Any]) -> dict[str, int]:
    """Module → outputs. Raises `SVDQuantError` where the file's rows are not these, one below the other."""
    start = 0
    for name, rows in parts.items():
        count = _features(modules[name], 0)
        if rows is not None and rows.tolist() != list(range(start, start + count)):
            raise SVDQuantError(f"{base}: its outputs are in another order in {name}; take the adapter as a LoRA")
        start += count
    return {name: _features(modules[name], 0) for name in parts}


def _transforms(
    out: Special, base: str, group: dict[str, Tensor], parts: dict[str, Any], modules: dict[str, Any], terms: int
) -> None:
    if rows_of(group) is None:
        for name in parts:
            out.transforms[name] = for_inputs(base, group, _features(modules[name], 1), terms)
    else:
        out.transforms |= for_outputs(base, group, _in_order(base, parts, modules))


def _columns(out: Special, base: str, lengths: Tensor, parts: dict[str, Any], modules: dict[str, Any]) -> None:
    if len(parts) > 1 or isinstance(_plain(modules[next(iter(parts))]), nn.Conv2d):
        raise SVDQuantError(
            f"{base}.dora_scale: is the length of columns across {', '.join(parts)}, which this model cannot take; "
            "take the adapter as a plain LoRA"
        )
    (name,) = parts
    if lengths.shape[1] != _features(modules[name], 1):
        raise SVDQuantError(
            f"{base}.dora_scale is for {lengths.shape[1]} inputs, and the layer has {_features(modules[name], 1)}; the "
            "adapter was made for another model"
        )
    out.transforms[name] = Transform("input", length=lengths.float().flatten())


def zero_pair(name: str, module: Any) -> dict[str, Tensor]:
    """A LoRA of a module that changes nothing: PEFT keeps its adapter's name and strength."""
    weight = _plain(module).weight
    down, up = torch.zeros(1, *weight.shape[1:]), torch.zeros(weight.shape[0], 1, *[1] * (weight.dim() - 2))
    return {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}


def _put(out: Special, name: str, module: Any, down: Tensor, up: Tensor) -> None:
    """A pair of matrices for a module, as a convolution's where it is one."""
    shape = _plain(module).weight.shape
    out.lora[f"{name}.lora_A.weight"] = down.reshape(-1, *shape[1:]).contiguous()
    out.lora[f"{name}.lora_B.weight"] = up.reshape(*up.shape, *[1] * (len(shape) - 2)).contiguous()


def _glora(out: Special, base: str, group: dict[str, Tensor], parts: dict[str, Any], modules: dict[str, Any]) -> None:
    """ΔW = (W·A + B)·alpha/r, A and B of rank r: exact as a LoRA of rank 2r (of a convolution, r·k² + r)."""
    weights = [own_weight(_plain(modules[name])) for name in _in_order(base, parts, modules)]
    shape = weights[0].shape
    inputs, outputs, columns = shape[1], sum(len(weight) for weight in weights), shape[1:].numel()
    a1, a2, b1, b2 = (group[name].float().flatten(1) for name in _GLORA)
    # LyCORIS has exchanged the two matrices of each once; ComfyUI tells the forms apart by shape, as here.
    forms = [
        form
        for form in ((a1, a2, b1, b2), (a2, a1, b2, b1))
        if [t.shape for t in form] == [(inputs, r := len(form[1])), (r, inputs), (outputs, r), (r, columns)]
    ]
    if not forms:
        given = ", ".join(f"{leaf} {list(group[leaf].shape)}" for leaf in _GLORA)
        raise SVDQuantError(
            f"{base}: its tensors ({given}) do not fit {' with '.join(parts)} [{outputs}, {columns}]; the adapter was "
            "made for another model"
        )
    a1, a2, b1, b2 = forms[-1]
    rank = len(a2)
    scale = float(group["alpha"]) / rank if "alpha" in group and float(group["alpha"]) != 0 else 1.0
    kernel = shape[2:].numel()
    # Position by position of the kernel: A mixes channels.
    down = torch.einsum("ji,pq->jpiq", a2, torch.eye(kernel)).reshape(rank * kernel, inputs * kernel)
    down = torch.cat([down, b2])
    for name, weight, rows in zip(parts, weights, b1.split([len(w) for w in weights]), strict=True):
        through = torch.einsum("oip,ij->ojp", weight.flatten(2) if kernel > 1 else weight.flatten(1)[..., None], a1)
        _put(out, name, modules[name], down, torch.cat([through.flatten(1), rows], 1) * scale)


def _difference(
    out: Special, base: str, group: dict[str, Tensor], parts: dict[str, Any], modules: dict[str, Any]
) -> None:
    rows = _in_order(base, parts, modules)
    for leaf, parameter in (("diff", "weight"), ("diff_b", "bias")):
        if leaf not in group:
            continue
        if len(group[leaf]) != sum(rows.values()):
            expected = f"{sum(rows.values())} outputs"
            raise SVDQuantError(
                f"{base}.{leaf} has the shape {list(group[leaf].shape)}, and {' with '.join(parts)} {expected}; the "
                "adapter was made for another model"
            )
        for name, change in zip(parts, group[leaf].split([*rows.values()]), strict=True):
            layer = _plain(modules[name])
            if change[0].numel() != (layer.weight[0].numel() if leaf == "diff" else 1):
                raise SVDQuantError(
                    f"{base}.{leaf} has the shape {list(group[leaf].shape)}, and {name} {list(layer.weight.shape)}; "
                    "the adapter was made for another model"
                )
            if leaf == "diff" and hasattr(layer, "spec"):
                if bool(change.any()):
                    down, up, out.errors[name] = best_of(change.float().flatten(1))
                    _put(out, name, modules[name], down, up)
            elif isinstance(getattr(layer, parameter, None), nn.Parameter):
                out.whole[f"{name}.{parameter}"] = change.reshape(getattr(layer, parameter).shape).detach().clone()
            elif bool(change.any()):
                out.unknown.append(f"{base}.{leaf}")
