"""A stored layer in another stored form, without calibration: for formats that hold something else than it has.

Smoothing and branch stay wherever they can; what changes is rounded to nearest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..config import LayerSpec
from ..errors import SVDQuantError
from ..numerics import (
    FORMATS,
    GELU_SHIFT,
    SVDQuantTensors,
    pad_columns,
    padded_columns,
    quantize_weight,
)
from ..numerics.hadamard import BLOCK, rotate
from .low_rank import truncated_svd

Ranges = tuple[tuple[int, int], ...]
_FOUR_BIT = ("int4", "nvfp4")


def dense_error(new: SVDQuantTensors, old: SVDQuantTensors) -> float:
    """‖W′ − W‖/‖W‖ of the linears that two records mean."""
    return weight_error(new.dense()[0], old.dense()[0])


def weight_error(new: Tensor, old: Tensor) -> float:
    """‖new − old‖/‖old‖ of float32 weights, summed in float64 without a copy in it."""
    off, size = (torch.linalg.vector_norm(t, dtype=torch.float64) for t in (new - old, old))
    return float(off / size.clamp_min(1e-300))


def requantize(
    record: SVDQuantTensors,
    weights: str,
    group_size: int,
    dtype: torch.dtype | None = None,
    unsigned: Ranges | None = None,
) -> SVDQuantTensors:
    """The record with another number format of its residual, unrotated, with one outer scale.

    dtype: of the scales; None = as the layer has. unsigned: columns that follow a GELU, int4 only; None = as the layer
    has. Int4 groups that merely become parts of themselves keep every number.
    """
    spec = record.spec
    dtype = dtype or record.floating_dtype
    columns = unsigned if unsigned is not None else spec.unsigned
    new_spec = replace(
        spec,
        weights=weights,
        group_size=group_size,
        activations=weights if spec.activations in _FOUR_BIT else spec.activations,
        unsigned=columns if weights == "int4" else (),
        rotate=False,
        zeros=False,
        outer_blocks=1,
    )
    same = spec.weights == weights == "int4" and not spec.rotate and spec.unsigned == new_spec.unsigned
    if same and spec.group_size and spec.group_size % group_size == 0:
        return _finer_groups(record, new_spec)
    residual = record.residual()
    residual = (_unrotated(residual) if spec.rotate else residual)[:, : record.in_features]
    if spec.kind == "w4a16":
        return weights_only(residual, record.bias, group_size, dtype)
    new = _quantized(residual, new_spec, dtype)
    new.smooth_factor, new.proj_down, new.proj_up = record.smooth_factor, record.proj_down, record.proj_up
    # What the bias means is only asked for where a shift is in it.
    meant = record.dense()[1] if spec.unsigned or new_spec.unsigned else None
    return _with_bias(new, meant, record.bias, spec.unsigned)


def _unrotated(residual: Tensor) -> Tensor:
    # On a whole weight a product with the small matrix, which is its own inverse, beats the butterflies.
    block = rotate(torch.eye(BLOCK, device=residual.device))
    return (residual.unflatten(1, (-1, BLOCK)) @ block).flatten(1)


def _finer_groups(record: SVDQuantTensors, spec: LayerSpec) -> SVDQuantTensors:
    times = record.spec.group_size // spec.group_size
    columns = padded_columns(record.in_features, spec)
    groups = columns // spec.group_size

    def repeated(t: Tensor) -> Tensor:
        return t.repeat_interleave(times, 1)[:, :groups].contiguous()

    return replace(
        record,
        spec=replace(spec, zeros=record.spec.zeros),
        qweight=record.qweight[:, : columns // 2].contiguous(),
        wscales=repeated(record.wscales),
        wzeros=None if record.wzeros is None else repeated(record.wzeros),
    )


def weights_only(weight: Tensor, bias: Tensor | None, group_size: int, dtype: torch.dtype) -> SVDQuantTensors:
    """A W4A16 record of a float32 weight [N, K]."""
    spec = LayerSpec("w4a16", "int4", group_size, 0, "none", (), False, False)
    new = _quantized(weight, spec, dtype)
    new.bias = None if bias is None else bias.to(dtype)
    return new


def solve_together(
    dense: Sequence[tuple[Tensor, Tensor | None]],
    spec: LayerSpec,
    dtype: torch.dtype,
    generator: torch.Generator,
    smooth: Tensor | None = None,
) -> list[SVDQuantTensors]:
    """Records of linears that read the same input, with one smoothing and one down-projection, data-free.

    dense: float32 weight [N, K] and bias of each. smooth: [K], None = ones. The branch is the best of its rank for the
    stacked W·s; the rest is rounded to nearest.
    """
    stacked = torch.cat([weight for weight, _ in dense])
    factor = stacked.new_ones(stacked.shape[1]) if smooth is None else smooth.to(dtype).float()
    spec = replace(spec, rank=min(spec.rank, *stacked.shape), smooth=smooth is not None, rotate=False)
    smoothed = stacked * factor
    up, down = truncated_svd(smoothed, spec.rank, generator)
    down, up = (down / factor).to(dtype), up.to(dtype)
    # The branch as it is stored: its own rounding is quantized with the rest.
    residual = smoothed - up.float() @ (down.float() * factor)
    out, start = [], 0
    for weight, bias in dense:
        rows = slice(start, start + len(weight))
        start += len(weight)
        new = _quantized(residual[rows], spec, dtype)
        new.smooth_factor = None if smooth is None else smooth.to(dtype)
        if spec.rank:
            new.proj_down, new.proj_up = down.clone(), up[rows].clone()
        stored = None if bias is None else bias.to(dtype)
        out.append(_with_bias(new, bias, stored, ()))
    return out


def common_smoothing(records: Sequence[SVDQuantTensors]) -> Tensor | None:
    """The geometric mean of the layers' smooth factors, float32 [K]; None where none has any."""
    factors = [r.smooth_factor.float() for r in records if r.smooth_factor is not None]
    return torch.stack(factors).log().mean(0).exp() if factors else None


def cast(record: SVDQuantTensors, dtype: torch.dtype, keep: Sequence[str] = ()) -> SVDQuantTensors:
    """The record with all floating tensors but e4m3 scales, and those in `keep`, in this type.

    Raises `SVDQuantError` where a number does not fit; the layer's name is the caller's to add.
    """
    new = replace(record)
    for name, value in record.named().items():
        if name in keep or name == "qweight" or value.itemsize == 1 or value.dtype == dtype:
            continue
        moved = value.to(dtype)
        if not bool(torch.isfinite(moved).all()) or (name in ("wscales", "wcscales") and bool((moved == 0).any())):
            raise SVDQuantError(f"has {name} that do not fit into {str(dtype).removeprefix('torch.')}; use bfloat16")
        setattr(new, name, moved)
    if record.spec.unsigned and (new.wscales is not record.wscales or new.smooth_factor is not record.smooth_factor):
        return _with_bias(new, record.dense()[1], new.bias, None)
    return new


def _quantized(weight: Tensor, spec: LayerSpec, dtype: torch.dtype) -> SVDQuantTensors:
    """Codes and scales of a float32 weight [N, K], rounded to nearest; nothing else yet."""
    in_features = weight.shape[1]
    padded = pad_columns(weight, padded_columns(in_features, spec))
    values, wscales, wcscales = quantize_weight(padded, spec.weights, spec.group_size, dtype)
    return SVDQuantTensors(spec, in_features, FORMATS[spec.weights].pack(values), wscales, wcscales)


def _with_bias(
    record: SVDQuantTensors, meant: Tensor | None, stored: Tensor | None, was_unsigned: Ranges | None
) -> SVDQuantTensors:
    """Gives a record the bias that makes it mean `meant`; `stored` as it is where no shift is involved.

    was_unsigned: the columns whose shift `stored` compensates; None = it has to be computed anew.
    """
    if was_unsigned == () and not record.spec.unsigned:
        record.bias = stored
        return record
    weight = record.residual()[:, : record.in_features]
    if record.smooth_factor is not None:
        weight = weight / record.smooth_factor.float()
    bias = weight.new_zeros(record.out_features) if meant is None else meant.clone()
    for start, stop in record.spec.unsigned:
        bias -= GELU_SHIFT * weight[:, start:stop].sum(1)
    record.bias = bias.to(record.floating_dtype if stored is None else stored.dtype)
    return record
