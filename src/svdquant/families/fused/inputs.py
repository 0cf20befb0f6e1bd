"""Inputs that several layers read, on a GPU: normalized, quantized and taken down the low-rank branch in one pass.

On a CPU the layers find out by themselves that they read the same (`kernels.cpu.inputs`), on a GPU where they are
called one after another with the same tensor (`kernels.gpu.sharing`); what is to be fused with the norm before has to
be said in advance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels import fused, gpu
from ...kernels.dispatch import backend_of, resolve_activations
from ...nn import SVDQuantLinear
from ...numerics import SVDQuantTensors


@dataclass
class Normalized:
    """layer_norm(x)·(1 + scale) + shift, not computed yet. x [B, L, K]; scale, shift [B or 1, K]."""

    x: Tensor
    scale: Tensor
    shift: Tensor
    eps: float
    # As layers read it: what each has in common with its likes → the prepared input.
    prepared: dict[Any, gpu.Prepared] = field(default_factory=dict)

    def tensor(self) -> Tensor:
        """Computed."""
        return fused.norm_modulate(self.x, self.scale, self.shift, self.eps)


def computed(x: Tensor | Normalized) -> Tensor:
    return x.tensor() if isinstance(x, Normalized) else x


def source(x: Tensor | Normalized) -> Tensor:
    """The tensor behind x: its shape, type and device."""
    return x.x if isinstance(x, Normalized) else x


def on_gpu(x: Tensor) -> bool:
    """Whether Triton's kernels multiply x."""
    return backend_of(x.device) == "triton"


class Rows(NamedTuple):
    """Some outputs of a layer, where a product may have them in another order or with another epilogue."""

    layer: Any
    start: int
    stop: int


def project(
    layers: Sequence[Any],
    x: Tensor | Normalized,
    out: Tensor | None = None,
    gelu: bool = False,
    norm: gpu.HeadNorm | None = None,
    second: Tensor | None = None,
    gated: bool = False,
) -> Tensor | None:
    """What `layers`, or `Rows` of them, make of x, side by side [B, L, ΣN]; None where each has to be called.

    out: written and returned instead. second: further columns of x. norm: of the first layers' heads. gated: x is
    [B, L, 2K], and its first half times silu of its second is what they read.
    """
    parts = [part if isinstance(part, Rows) else Rows(part, 0, 0) for part in layers]
    first, tensor = parts[0].layer, source(x)
    if tensor.dim() != 3 or not on_gpu(tensor) or not all(_bare(part.layer) for part in parts):
        return None
    activations = resolve_activations(first.activations, first.spec, tensor.device)
    known = [_reads(part.layer) for part in parts]
    if not all(k is not None and gpu.takes(k[1], activations, tensor.dtype, tensor.device) for k in known):
        return None
    if len(parts) > 1 and not alike([part.layer for part in parts]):
        return None
    records = [_record(part) for part in parts]
    before = gpu.Before("swiglu") if gated else gpu.Before()
    prepared = _prepared(x, first, records[0], activations, before, second)
    return gpu.project(prepared, records, out, gpu.Epilogue(gelu, norm))


def _record(part: Rows) -> SVDQuantTensors:
    """The record behind a layer, or one that shares the storage of some of its rows."""
    t: SVDQuantTensors = part.layer.tensors()
    if part.stop == 0:
        return t
    here = slice(part.start, part.stop)
    of_rows = ("qweight", "wscales", "wcscales", "wzeros", "proj_up", "bias")
    cut = replace(t, **{name: value[here] for name in of_rows if (value := getattr(t, name)) is not None})
    if not torch.compiler.is_compiling():
        cut.memory = t.memory.setdefault(f"rows {part.start}:{part.stop}", {})
    return cut


def _prepared(
    x: Tensor | Normalized,
    layer: SVDQuantLinear,
    t: SVDQuantTensors,
    activations: str,
    before: gpu.Before,
    second: Tensor | None,
) -> gpu.Prepared:
    if not isinstance(x, Normalized):
        return gpu.prepare(x, t, activations, before, second=second)
    key = reading_key(layer), layer.spec, activations
    found = x.prepared.get(key) if key[0] is not None else None
    if found is None:
        found = gpu.prepare(x.x, t, activations, gpu.Before("layer_norm", x.eps, x.scale, x.shift))
        x.prepared[key] = found
    return found


def _bare(layer: Any) -> bool:
    """Whether nobody would notice that the layer is not called, and its parameters lie where they will be read."""
    hooked = layer._forward_hooks or layer._forward_pre_hooks
    return type(layer) is SVDQuantLinear and "forward" not in layer.__dict__ and not hooked


def alike(layers: Sequence[SVDQuantLinear]) -> bool:
    """Whether the layers make the same codes and take the same low-rank directions of an input."""
    first, *others = layers
    key = reading_key(first)
    return key is not None and all(
        first.spec == other.spec and first.activations == other.activations and reading_key(other) == key
        for other in others
    )


def reading_key(layer: SVDQuantLinear) -> bytes | None:
    """A digest of what a layer does to its input before the product; None where it is unknown (see `_reads`)."""
    known = _reads(layer)
    return None if known is None else known[0]


def _reads(layer: SVDQuantLinear) -> tuple[bytes, str] | None:
    """`gpu.reading_of` a layer. A compiler cannot compute it: None, where nobody has asked before (`install` does)."""
    if torch.compiler.is_compiling():
        known: tuple[bytes, str] | None = layer.__dict__.get("_memory", {}).get("reads")
        return known
    return gpu.reading_of(layer.tensors())
