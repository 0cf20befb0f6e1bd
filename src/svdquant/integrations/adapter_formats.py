"""Adapters that are no plain LoRA, refactored into one; what diffusers converts itself passes unchanged.

A group of tensors of one module (`base.hada_w1_a`, …) becomes `base.lora_down.weight`, `base.lora_up.weight` and
`base.alpha`: the name of the module stays, so that diffusers' converters know it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import SVDQuantError

# Directions kept: as few as leave out less than this of ΔW (Frobenius), at most MAX_RANK of them.
TOLERANCE, MAX_RANK = 0.005, 128
# The names of what a group may hold, by kind; the first one says that it is there.
_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
_UNSUPPORTED = {
    "hada_t1": "LoHa of a convolution in Tucker form",
    "lokr_t2": "LoKr of a convolution in Tucker form",
    "oft_blocks": "OFT",
    "oft_diag": "OFT",
    "a1.weight": "GLoRA",
    "on_input": "(IA)³",
    "lora_mid.weight": "LoCon in Tucker form",
}
# Names of diffusers' own components, as prefixes.
_DIFFUSERS = ("transformer.", "unet.", "text_encoder.", "text_encoder_2.")
_KINDS = ("nunchaku", "LoHa", "LoKr", "difference", "XLabs", "kohya", "BFL", "PEFT")


@dataclass
class Converted:
    """An adapter in LoRA's form. errors: module → ‖ΔW − BA‖/‖ΔW‖ of those that were refactored."""

    state: dict[str, Tensor]
    errors: dict[str, float] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)

    def sentence(self) -> str:
        """What was refactored and at what cost; empty where nothing was."""
        if not self.errors:
            return ""
        kinds = " and ".join(f"{count} {kind}" for kind, count in self.kinds.items())
        worst = max(self.errors, key=self.errors.__getitem__)
        return (
            f"{kinds} layers became LoRAs of at most {MAX_RANK} directions, which leave out at most "
            f"{self.errors[worst]:.1%} of a layer's change ({worst})"
        )


def kind_of(keys: Any) -> str:
    """Whose names an adapter's keys are: one of nunchaku, LoHa, LoKr, difference, XLabs, kohya, BFL, PEFT, or ""."""
    keys = list(keys)

    def some(*parts: str) -> bool:
        return any(part in key for key in keys for part in parts)

    found = {
        "nunchaku": some(".mlp_fc", "mlp_context_fc1", ".qkv_proj.lora_"),
        "LoHa": some("hada_w1_a"),
        "LoKr": some("lokr_w1"),
        "difference": some(".diff") and not some("lora_"),
        "XLabs": some("processor.") and some("_lora"),
        "kohya": some("lora_unet_", "lora_te", "lora_transformer_", "lycoris_"),
        "BFL": some("double_blocks.", "single_blocks."),
        "PEFT": some("lora_A.", "lora_down.", "lora.down."),
    }
    return next((kind for kind in _KINDS if found[kind]), "")


def needs_conversion(keys: Any) -> bool:
    """Whether diffusers would not understand these keys, or not on quantized models."""
    return any(f".{part}" in key for key in keys for part in ("hada_w1_a", "lokr_w1", "lokr_w1_a", *_UNSUPPORTED))


def to_lora(state: dict[str, Tensor]) -> Converted:
    """LoHa and LoKr as LoRA, everything else as it is.

    Raises `SVDQuantError` for a kind that has no such form, and for a group of tensors that is not whole.
    """
    for key in state:
        for part, kind in _UNSUPPORTED.items():
            if key.endswith(f".{part}"):
                raise SVDQuantError(f"{key}: {kind} cannot be added to a linear layer; take the adapter as a LoRA")
    groups: dict[str, dict[str, Tensor]] = {}
    out = Converted({})
    known = {*_LOHA, *_LOKR, "alpha"}
    bases = {key.rpartition(".")[0] for key in state if key.rpartition(".")[2] in known - {"alpha"}}
    for key, value in state.items():
        base, _, leaf = key.rpartition(".")
        if base in bases and leaf in known:
            groups.setdefault(base, {})[leaf] = value
        elif base in bases:
            raise SVDQuantError(f"{key}: is unknown beside {', '.join(groups.get(base, {}))}; take it as a plain LoRA")
        else:
            out.state[key] = value
    for base, group in groups.items():
        kind, factors = _factors(base, group)
        down, up, out.errors[base] = factors
        out.kinds[kind] = out.kinds.get(kind, 0) + 1
        _put(out.state, base, down, up)
    return out


def _put(state: dict[str, Tensor], base: str, down: Tensor, up: Tensor) -> None:
    # LyCORIS' own prefix for what kohya's scripts call lora_unet_.
    name = base.replace("lycoris_", "lora_unet_", 1) if base.startswith("lycoris_") else base
    ours = name.startswith(_DIFFUSERS)
    state[f"{name}.lora_{'A' if ours else 'down'}.weight"] = down.contiguous()
    state[f"{name}.lora_{'B' if ours else 'up'}.weight"] = up.contiguous()
    if not ours:
        # Everybody else's names, which diffusers' converters expect with an alpha.
        state[f"{name}.alpha"] = torch.tensor(float(down.shape[0]))


def _factors(base: str, group: dict[str, Tensor]) -> tuple[str, tuple[Tensor, Tensor, float]]:
    group = {leaf: value.float() for leaf, value in group.items()}
    kind, make = ("LoHa", _loha) if "hada_w1_a" in group else ("LoKr", _lokr)
    names = _LOHA if kind == "LoHa" else ()
    if missing := [name for name in names if name not in group]:
        raise SVDQuantError(f"{base}.{missing[0]} is missing; download the adapter again")
    return kind, make(base, group)


def _loha(base: str, group: dict[str, Tensor]) -> tuple[Tensor, Tensor, float]:
    """ΔW = (w1_a·w1_b) ∘ (w2_a·w2_b)·alpha/r: a product of row-wise and column-wise Kronecker products."""
    a1, b1, a2, b2 = (group[name] for name in _LOHA)
    _two_dimensional(base, a1, b1, a2, b2)
    scale = float(group["alpha"]) / b1.shape[0] if "alpha" in group else 1.0
    up = (a1[:, :, None] * a2[:, None, :]).flatten(1) * scale
    down = (b1[:, None, :] * b2[None, :, :]).flatten(0, 1)
    return _compressed(down, up)


def _lokr(base: str, group: dict[str, Tensor]) -> tuple[Tensor, Tensor, float]:
    """ΔW = w1 ⊗ w2·alpha/r: its singular values are products of theirs."""
    halves, ranks = [], []
    for name in ("lokr_w1", "lokr_w2"):
        if name in group:
            halves.append(group[name])
        elif f"{name}_a" in group and f"{name}_b" in group:
            halves.append(group[f"{name}_a"] @ group[f"{name}_b"])
            ranks.append(group[f"{name}_b"].shape[0])
        else:
            raise SVDQuantError(f"{base}.{name} is missing; download the adapter again")
    _two_dimensional(base, *halves)
    # With both halves whole there is no r, and LyCORIS applies no alpha.
    scale = float(group["alpha"]) / ranks[-1] if ranks and "alpha" in group else 1.0
    (u1, s1, v1), (u2, s2, v2) = (torch.linalg.svd(half, full_matrices=False) for half in halves)
    values = (s1[:, None] * s2).flatten() * abs(scale)
    count = _rank(values)
    chosen = values.argsort(descending=True, stable=True)[:count]
    i, j = chosen // len(s2), chosen % len(s2)
    up = (u1[:, None, i] * u2[None, :, j]).flatten(0, 1)
    down = (v1[i, :, None] * v2[j, None, :]).flatten(1)
    root = values[chosen].sqrt()
    sign = 1.0 if scale >= 0 else -1.0
    return down * root[:, None], up * root * sign, _left_out(values, count)


def _two_dimensional(base: str, *parts: Tensor) -> None:
    for part in parts:
        if part.dim() != 2:
            raise SVDQuantError(f"{base}: is of shape {list(part.shape)}, a convolution; take the adapter as a LoRA")


def _compressed(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor, float]:
    """(A, B, what is left out) of the best approximation of up·down by few directions."""
    qu, ru = torch.linalg.qr(up)
    qd, rd = torch.linalg.qr(down.t())
    u, values, v = torch.linalg.svd(ru @ rd.t(), full_matrices=False)
    count = _rank(values)
    root = values[:count].sqrt()
    return (qd @ v[:count].t() * root).t(), qu @ u[:, :count] * root, _left_out(values, count)


def _rank(values: Tensor) -> int:
    """Directions that leave out less than `TOLERANCE`, at least one and at most `MAX_RANK`."""
    energy = values.double().sort(descending=True).values.square()
    rest = energy.sum() - energy.cumsum(0)
    enough = int((rest > TOLERANCE**2 * energy.sum()).sum()) + 1
    return max(1, min(enough, MAX_RANK, len(values)))


def _left_out(values: Tensor, count: int) -> float:
    energy = values.double().sort(descending=True).values.square()
    total = float(energy.sum())
    return float(energy[count:].sum() / total) ** 0.5 if total else 0.0


def strength_of(text: str) -> tuple[str, float]:
    """ "FILE:0.8" as (file, strength); without a number it is 1."""
    file, colon, number = text.rpartition(":")
    try:
        return (file, float(number)) if colon and file else (text, 1.0)
    except ValueError:
        return text, 1.0
