"""LoRAs that Nunchaku has converted for one of its checkpoints: the adapter taken out of the branch again.

Such a file holds, per linear of the checkpoint, the checkpoint's own low-rank branch with the adapter's directions
behind it, packed; modulations have the adapter alone, in their interleaved order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.nunchaku_layouts import StoredLinear, layout_of
from ..checkpoint.packing import unpack_down, unpack_up
from ..errors import SVDQuantError
from ..nn import SVDQuantLinear

_LEAVES = (("lora_down", "lora_up"), ("proj_down", "proj_up"))


def from_nunchaku(state: dict[str, Tensor], model: nn.Module, start: str) -> tuple[dict[str, Tensor], list[str]]:
    """(the adapter as `{start}{module}.lora_A.weight` and `lora_B.weight`, keys that are no part of it).

    The directions that the model's own branch has are left out. Raises `SVDQuantError` where it has none of them: the
    file was made for another checkpoint.
    """
    layout = layout_of(model, lambda name: True)
    if layout is None:
        raise SVDQuantError(f"{next(iter(state), '')}: Nunchaku has no {type(model).__name__}")
    modules: dict[str, Any] = {name.replace(".base_layer", ""): m for name, m in model.named_modules()}
    state = {key.removeprefix(start): value for key, value in state.items()}
    out: dict[str, Tensor] = {}
    for linear in layout.linears:
        pairs = [_pair(state, piece.name, linear.kind) for piece in linear.pieces]
        if any(pair is not None for pair in pairs):
            _take(out, linear, pairs, modules, start)
    for key in [key for key in state if ".lora_A." in key or ".lora_B." in key]:
        out[start + key] = state.pop(key)
    return out, list(state)


def _pair(state: dict[str, Tensor], name: str, kind: str) -> tuple[Tensor, Tensor] | None:
    """(down [R, K], up [N, R]) in natural order, taken out of the state."""
    for down, up in _LEAVES:
        if f"{name}.{down}" in state and f"{name}.{up}" in state:
            a, b = state.pop(f"{name}.{down}"), state.pop(f"{name}.{up}")
            return (a, b) if kind == "w4a16" else (unpack_down(a), unpack_up(b))
    return None


def _take(out: dict[str, Tensor], linear: StoredLinear, pairs: Any, modules: dict[str, Any], start: str) -> None:
    members = [modules[name] for name in linear.members]
    first = members[0]
    downs, ups = [], []
    for piece, pair in zip(linear.pieces, pairs, strict=True):
        if pair is None:
            continue
        down, up = pair
        if linear.kind == "w4a16":
            up = up.unflatten(0, (-1, linear.chunks)).transpose(0, 1).flatten(0, 1) if linear.chunks else up
        else:
            down, up = _without_base(down, up, first, slice(piece.start, piece.stop), piece.name)
        wide = down.new_zeros(down.shape[0], first.in_features)
        wide[:, piece.start : piece.stop] = down
        downs.append(wide)
        ups.append(up)
    down, up = torch.cat(downs), torch.cat(ups, 1)
    used = down.abs().amax(1) * up.abs().amax(0) > 0
    if not bool(used.any()):
        return
    down, up = down[used], up[:, used]
    for name, rows in zip(linear.members, up.split([m.out_features for m in members]), strict=True):
        if bool(rows.any()):
            out[f"{start}{name}.lora_A.weight"], out[f"{start}{name}.lora_B.weight"] = down, rows.contiguous()


def _without_base(down: Tensor, up: Tensor, layer: Any, columns: slice, name: str) -> tuple[Tensor, Tensor]:
    """Those directions that the layer's own branch does not have."""
    if not isinstance(layer, SVDQuantLinear) or layer.proj_down is None:
        return down, up
    own = layer.proj_down.detach().to("cpu", down.dtype)[:, columns]
    known = {row.numpy().tobytes() for row in own.contiguous().view(torch.int16)}
    rows = down.contiguous().view(torch.int16)
    new = torch.tensor([row.numpy().tobytes() not in known for row in rows])
    if bool(new.all()):
        raise SVDQuantError(
            f"{name}: was converted by Nunchaku for another checkpoint than this; take the LoRA it was made from"
        )
    return down[new], up[:, new]
