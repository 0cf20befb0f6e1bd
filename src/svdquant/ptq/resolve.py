"""Solving layers again whose weights have changed, data-free: what merging an adapter takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..config import LayerSpec
from ..numerics import FORMATS, GELU_SHIFT, SVDQuantTensors, pad_columns, padded_columns, quantize_weight
from ..numerics.hadamard import rotate
from .low_rank import truncated_svd


def solve_again(
    records: Sequence[SVDQuantTensors], changes: Sequence[Tensor], generator: torch.Generator
) -> list[SVDQuantTensors]:
    """Records of the same form that mean W + ΔW, of layers that read one input with one smoothing and one branch.

    changes: ΔW float32 [N, K] of each. Smoothing and rank stay; the branch is the best of its rank for the new W·s,
    and what it leaves is rounded to nearest.
    """
    first = records[0]
    spec = replace(first.spec, zeros=False, outer_blocks=1)
    means = [record.dense() for record in records]
    weights = [weight + change.to(weight) for (weight, _), change in zip(means, changes, strict=True)]
    stacked = torch.cat(weights)
    factor = stacked.new_ones(first.in_features) if first.smooth_factor is None else first.smooth_factor.float()
    residual, down, up = stacked * factor, None, None
    if first.proj_down is not None and first.proj_up is not None:
        dtype = first.proj_down.dtype
        start = first.proj_down.float() * factor
        # Rows that are zero span nothing.
        up, down = truncated_svd(residual, spec.rank, generator, start=start[start.abs().amax(1) > 0])
        down, up = (down / factor).to(dtype), up.to(dtype)
        residual = residual - up.float() @ (down.float() * factor)
    out, begin = [], 0
    for record, (_, bias) in zip(records, means, strict=True):
        rows = slice(begin, begin + record.out_features)
        begin += record.out_features
        new = _rounded(residual[rows], spec, record.floating_dtype)
        new.smooth_factor, new.proj_down = record.smooth_factor, None if down is None else down.clone()
        new.proj_up = None if up is None else up[rows].clone()
        new.bias = _bias(new, record, bias)
        out.append(new)
    return out


def _rounded(weight: Tensor, spec: LayerSpec, dtype: torch.dtype) -> SVDQuantTensors:
    in_features = weight.shape[1]
    padded = pad_columns(weight, padded_columns(in_features, spec))
    if spec.rotate:
        padded = rotate(padded)
    values, wscales, wcscales = quantize_weight(padded, spec.weights, spec.group_size, dtype)
    return SVDQuantTensors(spec, in_features, FORMATS[spec.weights].pack(values), wscales, wcscales)


def _bias(new: SVDQuantTensors, old: SVDQuantTensors, meant: Tensor | None) -> Tensor | None:
    """What compensates the shift of the new weight; the stored bias where there is none."""
    if not new.spec.unsigned or meant is None or old.bias is None:
        return old.bias
    weight = new.residual()
    weight = (rotate(weight) if new.spec.rotate else weight)[:, : new.in_features]
    if new.smooth_factor is not None:
        weight = weight / new.smooth_factor.float()
    bias = meant.clone()
    for start, stop in new.spec.unsigned:
        bias -= GELU_SHIFT * weight[:, start:stop].sum(1)
    return bias.to(old.bias.dtype)
