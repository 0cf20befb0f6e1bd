"""Adapters that are no plain LoRA but can be one; what diffusers converts itself passes unchanged.

A group of tensors of one module (`base.hada_w1_a`, …) becomes `base.lora_down.weight`, `base.lora_up.weight` and
`base.alpha`: the name of the module stays, so that diffusers' converters know it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import SVDQuantError
from ..ptq.low_rank import truncated_svd

# Directions kept: as few as leave out less than this of ΔW (Frobenius), at most MAX_RANK of them.
TOLERANCE, MAX_RANK = 0.005, 128
# The names of what a group may hold, by kind.
_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_LOHA_TUCKER = ("hada_t1", "hada_t2")
_LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
_LOCON = ("lora_down.weight", "lora_up.weight", "lora_mid.weight")
# Groups that hold one of these need the model's weights or layers: `adapter_weights` takes them.
NEED_MODEL = ("oft_blocks", "oft_R.weight", "on_input", "a1.weight")
_UNSUPPORTED = {
    "oft_diag": "an early form of OFT, which its tools read differently; take it saved by a later LyCORIS",
    "oft_r": "an early form of PEFT's OFT; load and save it with a later PEFT",
    "lambda_layer": "T-LoRA, whose change depends on a decomposition of the 16-bit weights; take it as a plain LoRA",
    "boft_R": "PEFT's BOFT, whose files do not say how its factors are arranged; take it in LyCORIS' form",
    "set_weight": "a whole weight to put in place of the model's; take it as a difference",
}
# Names of diffusers' own components, as prefixes.
_DIFFUSERS = ("transformer.", "unet.", "text_encoder.", "text_encoder_2.")
# What a file is called: kind → a part of its keys, the first that is found.
_KINDS = {
    "nunchaku": (".mlp_fc", "mlp_context_fc1", ".qkv_proj.lora_"),
    "LoHa": ("hada_w1_a",),
    "LoKr": ("lokr_w1",),
    "GLoRA": (".a1.weight",),
    "OFT": (".oft_blocks", ".oft_R.weight"),
    "(IA)³": (".on_input",),
    "difference": (),
    "XLabs": (),
    "kohya": ("lora_unet_", "lora_te", "lora_transformer_", "lycoris_"),
    "BFL": ("double_blocks.", "single_blocks."),
    "PEFT": ("lora_A.", "lora_down.", "lora.down."),
}
# Weight [N, C, k, k] of the module that a file calls so; None where it is no convolution, or not known.
ShapeOf = Callable[[str], tuple[int, ...] | None]


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
    """What kind of adapter keys belong to, or in whose names it is: a name of `_KINDS`, or "" for none.

    BOFT is called OFT: only the shapes of its tensors tell them apart.
    """
    keys = list(keys)

    def some(*parts: str) -> bool:
        return any(part in key for key in keys for part in parts)

    special = {
        "difference": some(".diff") and not some("lora_"),
        "XLabs": some("processor.") and some("_lora"),
    }
    return next((kind for kind, parts in _KINDS.items() if special.get(kind) or some(*parts)), "")


def ends_with(key: str, leaf: str) -> bool:
    return key.endswith(f".{leaf}")


def needs_conversion(keys: Any) -> bool:
    """Whether diffusers would not understand these keys, or not on quantized models."""
    ends = tuple(f".{leaf}" for leaf in (*_LOHA, *_LOHA_TUCKER, *_LOKR, "lora_mid.weight", *_UNSUPPORTED))
    return any(key.endswith(ends) for key in keys)


def grouped(state: dict[str, Tensor]) -> list[str]:
    """The files' names of what `to_lora` makes LoRAs of matrices: LoHa and LoKr."""
    ends = tuple(f".{leaf}" for leaf in (*_LOHA, *_LOKR))
    return list({key.rpartition(".")[0]: None for key in state if key.endswith(ends)})


def to_lora(state: dict[str, Tensor], shape_of: ShapeOf | None = None) -> Converted:
    """LoHa, LoKr and LoCon in Tucker form as LoRA, everything else as it is.

    shape_of: of convolutions, whose files may hold matrices. Raises `SVDQuantError` for a kind that has no such form,
    and for a group of tensors that is not whole, does not fit together, or is not finite.
    """
    for key in state:
        for part, kind in _UNSUPPORTED.items():
            if ends_with(key, part):
                raise SVDQuantError(f"{key}: {kind}")
    out = Converted({})
    mids = {key.removesuffix(".lora_mid.weight") for key in state if ends_with(key, "lora_mid.weight")}
    groups: dict[str, dict[str, Tensor]] = {base: {} for base in mids}
    known = {*_LOHA, *_LOHA_TUCKER, *_LOKR, "alpha"}
    bases = {key.rpartition(".")[0] for key in state if key.rpartition(".")[2] in known - {"alpha"}}
    for key, value in state.items():
        base, _, leaf = key.rpartition(".")
        wide = next((base for base in mids if key.startswith(f"{base}.")), None) if mids else None
        if wide is not None and key[len(wide) + 1 :] in _LOCON:
            groups[wide][key[len(wide) + 1 :]] = value
        elif base in bases and leaf in known:
            groups.setdefault(base, {})[leaf] = value
        elif base in bases and leaf == "dora_scale":
            out.state[f"{_renamed(base)}.dora_scale"] = value
        elif base in bases:
            raise SVDQuantError(f"{key}: is unknown beside {', '.join(groups.get(base, {}))}; take it as a plain LoRA")
        else:
            out.state[key] = value
    for base, group in groups.items():
        check_finite(base, group)
        group = {leaf: value.float() for leaf, value in group.items()}
        if base in mids:
            down, up = _untucked(base, group)
            out.state[f"{base}.lora_down.weight"], out.state[f"{base}.lora_up.weight"] = down, up
            continue
        kind, (down, up, out.errors[base]) = _factors(base, group)
        out.kinds[kind] = out.kinds.get(kind, 0) + 1
        shape = shape_of(base) if shape_of is not None else None
        if shape is not None and len(shape) > 2:
            down, up = _as_convolution(base, down, up, shape)
        _put(out.state, base, down, up)
    return out


def check_finite(base: str, group: dict[str, Tensor]) -> None:
    for leaf, value in group.items():
        if value.is_floating_point() and not bool(value.float().isfinite().all()):
            raise SVDQuantError(f"{base}.{leaf}: holds numbers that are not finite; download the adapter again")
        if leaf in ("alpha", "on_input") and value.numel() != 1:
            raise SVDQuantError(f"{base}.{leaf}: holds {value.numel()} numbers instead of one; download it again")


def _untucked(base: str, group: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(down [r, C, k, k], up [N, r, 1, 1]): the middle one multiplied into the first."""
    if missing := [name for name in _LOCON if name not in group]:
        raise SVDQuantError(f"{base}.{missing[0]} is missing; download the adapter again")
    down, up, mid = (group[name] for name in _LOCON)
    if mid.dim() < 3 or mid.shape[1] != down.shape[0] or mid.shape[0] != up.shape[1]:
        raise unfit(base, group)
    return torch.einsum("mn...,nj->mj...", mid, down.flatten(1)), up


def unfit(base: str, group: dict[str, Tensor]) -> SVDQuantError:
    shapes = ", ".join(f"{leaf} {list(value.shape)}" for leaf, value in group.items() if leaf != "alpha")
    return SVDQuantError(f"{base}: its tensors do not fit together ({shapes}); download the adapter again")


def _as_convolution(base: str, down: Tensor, up: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(down [r, C, k, k], up [N, r, 1, 1]) of matrices over C·k·k."""
    if up.shape[0] != shape[0] or down.shape[1] != math.prod(shape[1:]):
        raise SVDQuantError(
            f"{base} is for a weight of [{up.shape[0]}, {down.shape[1]}], which does not fit the convolution's "
            f"{list(shape)}; it was made for another model"
        )
    return down.reshape(-1, *shape[1:]), up.reshape(*up.shape, *[1] * (len(shape) - 2))


def _renamed(base: str) -> str:
    # LyCORIS' own prefix for what kohya's scripts call lora_unet_.
    return base.replace("lycoris_", "lora_unet_", 1) if base.startswith("lycoris_") else base


def _put(state: dict[str, Tensor], base: str, down: Tensor, up: Tensor) -> None:
    name = _renamed(base)
    ours = name.startswith(_DIFFUSERS)
    state[f"{name}.lora_{'A' if ours else 'down'}.weight"] = down.contiguous()
    state[f"{name}.lora_{'B' if ours else 'up'}.weight"] = up.contiguous()
    if not ours:
        # Everybody else's names, which diffusers' converters expect with an alpha.
        state[f"{name}.alpha"] = torch.tensor(float(down.shape[0]))


def _factors(base: str, group: dict[str, Tensor]) -> tuple[str, tuple[Tensor, Tensor, float]]:
    kind = "LoHa" if any(leaf.startswith("hada_") for leaf in group) else "LoKr"
    names: tuple[str, ...] = _LOHA if kind == "LoHa" else ()
    if kind == "LoHa" and any(leaf in group for leaf in _LOHA_TUCKER):
        names = (*_LOHA, *_LOHA_TUCKER)
    if missing := [name for name in names if name not in group]:
        raise SVDQuantError(f"{base}.{missing[0]} is missing; download the adapter again")
    try:
        return kind, (_loha if kind == "LoHa" else _lokr)(base, group)
    except (RuntimeError, IndexError) as error:
        raise unfit(base, group) from error


def _loha(base: str, group: dict[str, Tensor]) -> tuple[Tensor, Tensor, float]:
    """ΔW = (w1_a·w1_b) ∘ (w2_a·w2_b)·alpha/r: a product of row-wise and column-wise Kronecker products.

    In Tucker form each half is t[i, j, k, k]·w_a[i, n]·w_b[j, c], and their product is decomposed whole.
    """
    a1, b1, a2, b2 = (group[name] for name in _LOHA)
    _two_dimensional(base, a1, b1, a2, b2)
    scale = float(group["alpha"]) / b1.shape[0] if "alpha" in group else 1.0
    if "hada_t1" in group:
        halves = (
            torch.einsum("ij...,in,jc->nc...", group[f"hada_t{i}"], a, b) for i, a, b in ((1, a1, b1), (2, a2, b2))
        )
        first, second = halves
        return best_of((first * second * scale).flatten(1))
    if (len(a1), a1.shape[1], b1.shape[1], a2.shape[1]) != (len(a2), len(b1), b2.shape[1], len(b2)):
        raise unfit(base, group)
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
            a, b = group[f"{name}_a"], group[f"{name}_b"]
            tucker = name == "lokr_w2" and "lokr_t2" in group
            halves.append(torch.einsum("ij...,in,jc->nc...", group["lokr_t2"], a, b) if tucker else a @ b)
            ranks.append(b.shape[0])
        else:
            raise SVDQuantError(f"{base}.{name} is missing; download the adapter again")
    # Of a convolution the second half has the kernel, whose columns are the innermost of ΔW's.
    halves[1] = halves[1].flatten(1)
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
            raise SVDQuantError(f"{base}: is of shape {list(part.shape)}, and not a matrix; take it as a plain LoRA")


def best_of(change: Tensor) -> tuple[Tensor, Tensor, float]:
    """(A [r, K], B [N, r], what is left out) of the best approximation of ΔW float32 [N, K] by few directions."""
    up, down = truncated_svd(change, min(MAX_RANK, *change.shape), torch.Generator().manual_seed(0))
    values = up.norm(dim=0)
    total = float(change.double().square().sum())
    kept = values.double().square().cumsum(0)
    enough = int((total - kept > TOLERANCE**2 * total).sum()) + 1
    count = max(1, min(enough, len(values)))
    left_out = max(0.0, 1 - float(kept[count - 1]) / total) ** 0.5 if total else 0.0
    # Half of every value on either side, as adapters have them.
    root = values[:count].clamp_min(torch.finfo(values.dtype).tiny).sqrt()
    return down[:count] * root[:, None], up[:, :count] / root, left_out


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
