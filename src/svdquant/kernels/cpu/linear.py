"""The CPU's products: torch tensors in, calls of the compiled library, torch tensors out."""

from __future__ import annotations

from ctypes import byref
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...config import MAX_STORED_RANK, LayerSpec
from ...errors import SVDQuantError
from ...numerics import SVDQuantTensors, groups_of, padded_columns
from . import library
from .inputs import SCRATCH_LIMIT, Quantized, check_shape, describe, give_back, plain, scratch, take
from .results import new_result
from .structures import BLOCK, FORMATS, TYPES, UNSIGNED_INT4, Weight

_GROUPS = (16, 32, 64, 128, 256)
# Multiplications that one thread makes in some microseconds.
_ALONE = 1 << 21
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@lru_cache(maxsize=1)
def operations() -> Any:
    """The library's functions, or None."""
    loaded = library.load()
    return None if loaded is None else loaded.cdll


def supports(tensors: SVDQuantTensors, activations: str, dtype: torch.dtype) -> bool:
    """Whether the compiled products take this layer; the others are dequantized."""
    group = tensors.spec.group_size
    if dtype not in _FLOATS or activations not in ("int8", "int4") or tensors.wzeros is not None:
        return False
    if group and group not in _GROUPS and group % BLOCK:
        return False
    if activations == tensors.spec.weights and group > BLOCK:
        return False  # its activations have groups as large
    if tensors.proj_down is not None and tensors.proj_down.shape[0] > MAX_STORED_RANK:
        return False
    return tensors.qweight.device.type == "cpu" and operations() is not None


def supports_weight_only(qweight: Tensor, wscales: Tensor, dtype: torch.dtype, weights: str) -> bool:
    """The same of a product with 16-bit activations."""
    columns, groups = _columns(qweight, weights), wscales.shape[-1]
    group, step = columns // groups, 64 if weights == "int8" else 128
    # Groups fill a step's lanes evenly, or steps a group.
    even = columns % groups == 0 and group >= 16 and (step % group == 0 or group % step == 0)
    known = dtype in _FLOATS and (groups == 1 or even)
    return known and qweight.device.type == "cpu" and operations() is not None


def _columns(qweight: Tensor, weights: str) -> int:
    return qweight.shape[-1] * (1 if weights == "int8" else 2)


def describe_weight(tensors: SVDQuantTensors) -> tuple[Weight, tuple[Tensor, ...]]:
    """The weight's record, and copies that it points to and that must outlive it."""
    copies: list[Tensor] = []

    def pointer(t: Tensor | None) -> tuple[int | None, int]:
        if t is None:
            return None, 0
        if t.device.type != "cpu" or (t.numel() and not t.data_ptr()):
            raise SVDQuantError(f"a tensor of shape {list(t.shape)} of a quantized layer is not in memory ({t.device})")
        # Codes of weights and 8-bit scales are read as they are.
        read = t.contiguous() if t is tensors.qweight or (t is tensors.wscales and t.dtype in TYPES) else plain(t)
        if read.data_ptr() != t.data_ptr():
            copies.append(read)
        return read.data_ptr(), TYPES.get(read.dtype, 0)

    t, spec = tensors, tensors.spec
    rank = 0 if t.proj_down is None or t.proj_up is None else t.proj_down.shape[0]
    _check(t, rank)
    (scales, scales_type), (outer, outer_type), (zeros, zeros_type) = map(pointer, (t.wscales, t.wcscales, t.wzeros))
    (down, down_type), (up, up_type) = map(pointer, (t.proj_down, t.proj_up) if rank else (None, None))
    bias, bias_type = pointer(t.bias)
    weight = Weight(
        outputs=t.qweight.shape[0],
        columns=_columns(t.qweight, spec.weights),
        row_bytes=t.qweight.shape[1],
        qweight=pointer(t.qweight)[0],
        format=FORMATS[spec.weights] if zeros is None else UNSIGNED_INT4,
        group=spec.group_size,
        scales=scales,
        groups=t.wscales.shape[1],
        outer=outer,
        zeros=zeros,
        down=down,
        up=up,
        bias=bias,
        rank=rank,
        outer_blocks=1 if t.wcscales is None or t.wcscales.dim() == 1 else t.wcscales.shape[1],
        scales_type=scales_type,
        outer_type=outer_type,
        zeros_type=zeros_type,
        down_type=down_type,
        up_type=up_type,
        bias_type=bias_type,
    )
    return weight, tuple(copies)


def _check(t: SVDQuantTensors, rank: int) -> None:
    """The library trusts sizes. Raises `SVDQuantError` where they contradict each other."""
    n, columns = t.qweight.shape[0], padded_columns(t.in_features, t.spec)
    groups, blocks = groups_of(t.in_features, t.spec), 1
    check_shape("qweight", t.qweight, (n, columns if t.spec.weights == "int8" else columns // 2))
    check_shape("wscales", t.wscales, (n, groups))
    check_shape("wzeros", t.wzeros, (n, groups))
    if t.wcscales is not None:
        blocks = t.wcscales.shape[-1] if t.wcscales.dim() == 2 and groups % t.wcscales.shape[-1] == 0 else 1
    check_shape("wcscales", t.wcscales, (n,), (n, blocks))
    check_shape("bias", t.bias, (n,))
    if rank:
        check_shape("proj_down", t.proj_down, (rank, t.in_features))
        check_shape("proj_up", t.proj_up, (n, rank))


def _addresses(t: SVDQuantTensors) -> tuple[Any, ...]:
    """What a weight's record was made from; another one has other addresses or types."""
    parts: tuple[Tensor | None, ...] = (t.qweight, t.wscales, t.wcscales, t.proj_down, t.proj_up, t.bias, t.wzeros)
    known = (None if p is None else (p.data_ptr(), p.dtype, p.shape, p.is_contiguous(), p.is_neg()) for p in parts)
    return t.in_features, *known


def _weight(tensors: SVDQuantTensors) -> tuple[Weight, tuple[Tensor, ...]]:
    """`describe_weight`, remembered by the tensors while they stay where they are."""
    addresses = _addresses(tensors)
    known = tensors.memory.get("cpu")
    if known is not None and known[0] == addresses and known[2] is tensors.spec:
        return known[1], ()
    weight, copies = describe_weight(tensors)
    # Copies die with this call, so their addresses must not be remembered.
    if not copies:
        tensors.memory["cpu"] = (addresses, weight, tensors.spec)
    return weight, copies


def _rows(x: Tensor) -> Tensor:
    """x [..., K] as [M, K] with contiguous rows."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] <= 1 else rows.contiguous()


def _part(rows: int, bytes_per_row: int) -> int:
    """Rows at a time, in equal parts that keep to `SCRATCH_LIMIT`."""
    most = max(SCRATCH_LIMIT // bytes_per_row, 1)
    return -(-rows // -(-rows // most)) if rows else 1


def _threads(products: int) -> int:
    """Waking threads takes longer than a small product, on a busy machine by far. The bits do not depend on it."""
    return 1 if products < _ALONE else torch.get_num_threads()


def quantize(x: Tensor, spec: LayerSpec, smooth: Tensor | None, activations: str) -> Quantized:
    """Codes of x [M, K] for a layer; see `Quantized`."""
    made = describe(_rows(x), spec, smooth, activations, operations())
    made.fill(operations())
    return made


def svdquant_linear(
    x: Tensor,
    tensors: SVDQuantTensors,
    activations: str,
    gelu: bool = False,
    out: Tensor | None = None,
    low_scales: Tensor | None = None,
) -> Tensor:
    """y = Q(x/s)·Ŵᵀ + ((x·Dᵀ)·f)·Uᵀ + b for x [M, K], or GELU (tanh) of it; [M, N] in x's type. See `supports`.

    out: [M, N] of x's type with contiguous rows, to be written and returned. low_scales: f, float32 [R], or [B, R]
    where every M/B consecutive rows share a line; None = ones.
    """
    ops, source, x = operations(), x, _rows(x)
    if low_scales is not None:
        low_scales = plain(low_scales).view(-1, low_scales.shape[-1])
    y = new_result(x, x.shape[0], tensors.out_features) if out is None else out
    weight, kept = _weight(tensors)
    # Leaves room for the padding of the codes and for what lies beside them.
    part = _part(x.shape[0], weight.columns + 2 * BLOCK)
    for start in range(0, x.shape[0], part):
        rows, out = (x, y) if part >= x.shape[0] else (x[start : start + part], y[start : start + part])
        made = take(rows, tensors.spec, tensors.smooth_factor, activations, ops)
        made.record.threads = _threads(rows.shape[0] * weight.columns * weight.outputs)
        if low_scales is not None:
            made.record.low_scales = low_scales.data_ptr()
            made.record.low_rows, made.record.low_first = x.shape[0] // low_scales.shape[0], start
        record = byref(made.record)
        work = scratch(ops.svdq_linear_bytes(record, byref(weight)))
        ops.svdq_linear(
            record,
            byref(weight),
            not made.filled,
            gelu,
            out.data_ptr(),
            out.stride(0),
            TYPES[out.dtype],
            work.data_ptr(),
        )
        made.filled = True
        give_back(made, source)
    del kept
    return y


def w4a16_linear(
    x: Tensor, qweight: Tensor, wscales: Tensor, bias: Tensor | None, weights: str, wzeros: Tensor | None
) -> Tensor:
    """y = x·Ŵᵀ + b for x [M, K]; returns [M, N] in x's type. See `supports_weight_only`."""
    ops, x = operations(), _rows(x)
    y = new_result(x, x.shape[0], qweight.shape[0])
    columns = _columns(qweight, weights)
    group = columns // wscales.shape[1]
    spec = LayerSpec(kind="w4a16", weights=weights, group_size=group, rank=0)
    weight, kept = describe_weight(SVDQuantTensors(spec, x.shape[1], qweight, wscales, bias=bias, wzeros=wzeros))
    weight.group = 0 if weight.groups == 1 else group
    part = _part(x.shape[0], 4 * columns)
    for start in range(0, x.shape[0], part):
        rows, out = x[start : start + part], y[start : start + part]
        made = describe(rows, spec, None, "int8", None)
        made.record.threads = _threads(rows.shape[0] * columns * y.shape[1])
        work = scratch(ops.svdq_weight_only_bytes(byref(made.record), byref(weight)))
        ops.svdq_weight_only(
            byref(made.record), byref(weight), out.data_ptr(), out.stride(0), TYPES[out.dtype], work.data_ptr()
        )
    del kept
    return y
