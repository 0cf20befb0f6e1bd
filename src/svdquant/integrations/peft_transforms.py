"""Multiplicative adapters (OFT, BOFT, (IA)³): ΔW = (M − I)·W or W·(M − I), of full rank, computed without W.

What they multiply an output or an input by stays beside the layer, under a name in PEFT's LoRA layer whose pair of
matrices is zero: PEFT keeps the adapter's name, strength and activity, and the pair is never multiplied.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SVDQuantError

KEPT = "lora_transform"
# Tensors of a transform, as they are named in a saved adapter behind `{module}.lora_transform.`.
_BLOCKS, _BUTTERFLY, _GAIN, _LENGTH = "blocks", "butterfly", "gain", "length"


class Transform(nn.Module):
    """t ↦ (M − I)·t for the outputs or the inputs of a layer, channels last.

    side: "output" or "input". blocks [m, n, b, b]: m factors of M, each minus I and of n blocks on the diagonal, the
    first to apply first; butterfly: factor i mixes rows that lie 2^i·b/2 apart (BOFT). gain [n·b]: what the result is
    multiplied by, minus 1. length [K]: instead of all these, what the columns of W + ΔW become as long as (a DoRA's
    magnitudes of inputs). Raises `SVDQuantError` for numbers that are not finite.
    """

    def __init__(
        self,
        side: str,
        blocks: Tensor | None = None,
        gain: Tensor | None = None,
        butterfly: bool = False,
        length: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.side, self.butterfly = side, butterfly
        self.blocks: Tensor | None
        self.gain: Tensor | None
        self.length: Tensor | None
        for name, value in ((_BLOCKS, blocks), (_GAIN, gain), (_LENGTH, length)):
            self.register_buffer(name, None if value is None else value.detach().contiguous())

    @property
    def features(self) -> int:
        """Of the outputs or inputs that it takes."""
        if self.blocks is not None:
            return self.blocks.shape[1] * self.blocks.shape[2]
        vector = self.gain if self.gain is not None else self.length
        assert vector is not None
        return vector.shape[0]

    def is_finite(self) -> bool:
        return all(bool(t.isfinite().all()) for t in self.buffers())

    def forward(self, t: Tensor) -> Tensor:
        """t [..., n·b] in any floating type; the result is in that of the transform."""
        t = t.to(next(self.buffers()).dtype)
        delta = None
        if self.blocks is not None:
            for i, factor in enumerate(self.blocks):
                more = self._times(factor, t if delta is None else t + delta, i)
                delta = more if delta is None else delta + more
        if self.gain is not None:
            delta = t * self.gain if delta is None else delta + (t + delta) * self.gain
        assert delta is not None
        return delta

    def _times(self, factor: Tensor, t: Tensor, level: int) -> Tensor:
        size = factor.shape[-1]
        apart = 2**level * (size // 2)
        if self.butterfly:
            t = t.unflatten(-1, (-1, 2, apart)).transpose(-2, -1).flatten(-3)
        t = torch.einsum("kij,...kj->...ki", factor, t.unflatten(-1, (-1, size))).flatten(-2)
        if self.butterfly:
            t = t.unflatten(-1, (-1, apart, 2)).transpose(-2, -1).flatten(-3)
        return t

    def change(self, weight: Tensor) -> Tensor:
        """ΔW at strength 1 of a weight [N, K, …], float32."""
        weight = weight.float()
        if self.side == "output":
            rows = weight.flatten(1).t()
            return self.float_copy()(rows).t().reshape(weight.shape)
        columns = weight.movedim(1, -1)
        if self.gain is not None:
            return (columns * self.gain.float()).movedim(-1, 1)
        assert self.blocks is not None
        factor = self.blocks[0].float()
        changed = torch.einsum("...ki,kij->...kj", columns.unflatten(-1, (-1, factor.shape[-1])), factor)
        return changed.flatten(-2).movedim(-1, 1)

    def float_copy(self) -> Transform:
        parts = (None if t is None else t.float() for t in (self.blocks, self.gain, self.length))
        blocks, gain, length = parts
        return Transform(self.side, blocks, gain, self.butterfly, length)

    def named(self) -> dict[str, Tensor]:
        """Its tensors under names that say what they are; `from_named` makes it again."""
        blocks = _BUTTERFLY if self.butterfly else _BLOCKS
        pairs = ((blocks, self.blocks), (_GAIN, self.gain), (_LENGTH, self.length))
        return {f"{self.side}_{name}": value for name, value in pairs if value is not None}

    # In state dicts the names say what the tensors are, so that a saved adapter needs no configuration.
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for name, value in self.named().items():
            destination[prefix + name] = value

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local: Any, strict: bool, missing: Any, unexpected: Any, errors: Any
    ) -> None:
        for name, value in self.named().items():
            if prefix + name in state_dict:
                value.copy_(state_dict[prefix + name])
            elif strict:
                missing.append(prefix + name)


def from_named(tensors: dict[str, Tensor], where: str) -> Transform:
    """Of what `Transform.named` has given. Raises `SVDQuantError` for other names."""
    sides = {name.partition("_")[0] for name in tensors}
    leaves = {name.partition("_")[2]: value for name, value in tensors.items()}
    if len(sides) != 1 or sides - {"input", "output"} or leaves.keys() - {_BLOCKS, _BUTTERFLY, _GAIN, _LENGTH}:
        raise SVDQuantError(f"{where}: {', '.join(tensors)} is no transform that this version knows; update svdquant")
    (side,) = sides
    butterfly = _BUTTERFLY in leaves
    blocks = leaves.get(_BUTTERFLY if butterfly else _BLOCKS)
    made = Transform(side, blocks, leaves.get(_GAIN), butterfly, leaves.get(_LENGTH))
    if not made.is_finite():
        raise SVDQuantError(f"{where}: holds numbers that are not finite; download the adapter again")
    return made


def attach(layer: Any, adapter: str, transform: Transform, name: str) -> None:
    """Gives a LoRA layer of PEFT the transform of an adapter that it has. name: of the module, for the error.

    Raises `SVDQuantError` where it does not fit the layer.
    """
    base = layer.base_layer
    axis = 0 if transform.side == "output" else 1
    features = base.weight.shape[axis]
    if transform.features != features or (transform.side == "input" and getattr(base, "groups", 1) != 1):
        raise SVDQuantError(
            f"the adapter's {transform.side} transform of {name} is for {transform.features} features, and the layer "
            f"has {features}; it was made for another model"
        )
    if KEPT not in layer._modules:
        layer.add_module(KEPT, nn.ModuleDict())
        # PEFT deletes, and looks for adapters, in what is named here.
        layer.adapter_layer_names = (*layer.adapter_layer_names, KEPT)
    getattr(layer, KEPT)[adapter] = transform.to(base.weight.device)
    if transform.side == "output":
        own_bias(layer)  # for compilers, which cannot find out


def transforms_of(layer: Any) -> dict[str, Any]:
    """Adapter → its transform, of a LoRA layer of PEFT."""
    kept = layer._modules.get(KEPT)
    return {} if kept is None else kept._modules


def channels_last(t: Tensor, conv: bool) -> Tensor:
    """A convolution's channels go last and come back by `channels_back`."""
    return t.movedim(-3, -1) if conv else t


def channels_back(t: Tensor, conv: bool) -> Tensor:
    return t.movedim(-1, -3) if conv else t


def own_weight(base: Any) -> Tensor:
    """W float32 [N, K, …] that a layer multiplies by without adapters: of a quantized one with 16-bit activations."""
    if base.weight.is_meta or (hasattr(base, "spec") and base.qweight.is_meta):
        raise SVDQuantError("an adapter needs weights that are offloaded; load it before offloading")
    if not hasattr(base, "spec"):
        weight: Tensor = base.weight.detach().float()
        return weight
    weight = base.tensors().dense()[0]
    if getattr(base, "fused_down", None) is not None:
        weight = weight + base.fused_up.float() @ base.fused_down.float()
    return weight.reshape(base.weight.shape)


def own_bias(layer: Any) -> Tensor | None:
    """[N]: what the layer below adds to every output when activations are 16-bit; None for nothing."""
    base = layer.base_layer
    spec = getattr(base, "spec", None)
    if spec is None or not spec.unsigned:
        bias: Tensor | None = base.bias
        return bias
    # A shift of unsigned codes is compensated in the stored bias; the true one takes a pass over the weights.
    known = layer.__dict__.get("_own_bias")
    if known is not None and torch.compiler.is_compiling():
        compiled: Tensor | None = known[1]
        return compiled
    key = [(id(t), t.data_ptr(), 0 if t.is_inference() else t._version) for t in (base.qweight, base.bias)]
    if known is None or known[0] != key:
        with torch.no_grad():
            known = key, base.tensors().dense()[1]
        layer.__dict__["_own_bias"] = known
    found: Tensor | None = known[1]
    return found
