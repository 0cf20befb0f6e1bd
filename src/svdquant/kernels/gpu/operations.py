"""`torch.library` operations of the kernels: what a compiler, a fake tensor or a profiler sees.

A record travels as its tensors and the numbers of its `LayerSpec`; both operations put it together again, and choose
the product for themselves, so that a compiler need not follow that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...config import LayerSpec
from ...numerics import SVDQuantTensors, padded_columns
from . import linear
from .choice import choose, products
from .types import Before, Epilogue, HeadNorm, columns_of

if TYPE_CHECKING:
    from .linear import Prepared

_NAMES = ("qweight", "wscales", "wcscales", "smooth_factor", "proj_down", "proj_up", "bias")


def quantize_operation(
    x: Tensor,
    t: SVDQuantTensors,
    activations: str,
    before: Before,
    second: Tensor | None,
    low_scales: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`launch_quantize` as an operation."""
    codes, scales, low = torch.ops.svdquant.quantize(
        x,
        second,
        before.scale,
        before.shift,
        low_scales,
        *(getattr(t, name) for name in _NAMES),
        before.kind,
        before.eps,
        t.in_features,
        *_spec_numbers(t.spec),
        activations,
    )
    return codes, scales, None if t.proj_down is None else low


def multiply_operation(p: Prepared, layers: Sequence[SVDQuantTensors], out: Tensor, epilogue: Epilogue) -> None:
    """`launch_multiply` as an operation that writes `out`."""
    first, norm = layers[0], epilogue.norm
    torch.ops.svdquant.multiply(
        out,
        p.codes,
        p.scales,
        p.low,
        p.batch,
        p.tokens,
        *([getattr(t, name) for t in layers] for name in _NAMES),
        first.in_features,
        *_spec_numbers(first.spec),
        p.activations,
        epilogue.gelu,
        [] if norm is None else list(norm.weights),
        0.0 if norm is None else norm.eps,
        0 if norm is None else norm.head,
        None if norm is None else norm.cosine,
        None if norm is None else norm.sine,
    )


def _spec_numbers(spec: LayerSpec) -> tuple[str, int, list[int], bool]:
    return spec.weights, spec.group_size, [edge for segment in spec.unsigned for edge in segment], spec.rotate


def _record(
    tensors: Sequence[Tensor | None],
    in_features: int,
    weights: str,
    group_size: int,
    unsigned: Sequence[int],
    rotate: bool,
) -> SVDQuantTensors:
    """The record of tensors in the order of `_NAMES`."""
    segments = tuple(zip(unsigned[0::2], unsigned[1::2], strict=True))
    outer = tensors[2]
    blocks = 1 if outer is None or outer.dim() == 1 else outer.shape[1]
    spec = LayerSpec(weights=weights, group_size=group_size, unsigned=segments, rotate=rotate, outer_blocks=blocks)
    return SVDQuantTensors(spec, in_features, *tensors)  # type: ignore[arg-type]


@torch.library.custom_op("svdquant::quantize", mutates_args=())
def _quantize(
    x: Tensor,
    second: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    low_scales: Tensor | None,
    qweight: Tensor,
    wscales: Tensor,
    wcscales: Tensor | None,
    smooth_factor: Tensor | None,
    proj_down: Tensor | None,
    proj_up: Tensor | None,
    bias: Tensor | None,
    kind: str,
    eps: float,
    in_features: int,
    weights: str,
    group_size: int,
    unsigned: list[int],
    rotate: bool,
    activations: str,
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = (qweight, wscales, wcscales, smooth_factor, proj_down, proj_up, bias)
    t = _record(tensors, in_features, weights, group_size, unsigned, rotate)
    codes, scales, low = linear.launch_quantize(x, t, activations, Before(kind, eps, scale, shift), second, low_scales)
    return codes, scales, x.new_empty(0) if low is None else low


@_quantize.register_fake
def _(
    x: Tensor,
    second: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    low_scales: Tensor | None,
    qweight: Tensor,
    wscales: Tensor,
    wcscales: Tensor | None,
    smooth_factor: Tensor | None,
    proj_down: Tensor | None,
    proj_up: Tensor | None,
    bias: Tensor | None,
    kind: str,
    eps: float,
    in_features: int,
    weights: str,
    group_size: int,
    unsigned: list[int],
    rotate: bool,
    activations: str,
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = (qweight, wscales, wcscales, smooth_factor, proj_down, proj_up, bias)
    t = _record(tensors, in_features, weights, group_size, unsigned, rotate)
    name = choose(t, activations, x.dtype, x.device)
    assert name is not None
    reading = products()[name].reading(activations)
    rows = x.shape[0] * x.shape[1]
    columns = columns_of(padded_columns(in_features, t.spec))
    types = {"int8": torch.int8, "int4": torch.int8, "fp8": torch.float8_e4m3fn, "nvfp4": torch.uint8}
    if reading.packed:
        codes = x.new_empty((rows, columns // 2), dtype=torch.uint8)
    else:
        codes = x.new_empty((rows, columns), dtype=types[reading.precision])
    if reading.precision == "nvfp4":
        scales = x.new_empty((rows, columns // 16), dtype=torch.float8_e4m3fn)
    elif reading.precision == "int4":
        scales = x.new_empty((rows, columns // 64), dtype=torch.float32)
    else:
        scales = x.new_empty((rows,), dtype=torch.float32)
    return codes, scales, x.new_empty(0 if proj_down is None else (rows, proj_down.shape[0]))


@torch.library.custom_op("svdquant::multiply", mutates_args=("out",))
def _multiply(
    out: Tensor,
    codes: Tensor,
    scales: Tensor,
    low: Tensor | None,
    batch: int,
    tokens: int,
    qweights: Sequence[Tensor],
    wscales: Sequence[Tensor],
    wcscales: Sequence[Tensor | None],
    smooth_factors: Sequence[Tensor | None],
    proj_downs: Sequence[Tensor | None],
    proj_ups: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    in_features: int,
    weights: str,
    group_size: int,
    unsigned: list[int],
    rotate: bool,
    activations: str,
    gelu: bool,
    norm_weights: Sequence[Tensor | None],
    norm_eps: float,
    head: int,
    cosine: Tensor | None,
    sine: Tensor | None,
) -> None:
    parts = zip(qweights, wscales, wcscales, smooth_factors, proj_downs, proj_ups, biases, strict=True)
    layers = [_record(tensors, in_features, weights, group_size, unsigned, rotate) for tensors in parts]
    norm = None if head == 0 else HeadNorm(tuple(norm_weights), norm_eps, head, cosine, sine)
    p = linear.Prepared(codes, scales, low, batch, tokens, activations, out.dtype)
    linear.launch_multiply(p, layers, out, Epilogue(gelu, norm))


@_multiply.register_fake
def _(out: Tensor, *_args: object) -> None:
    return None
