"""The CPU's products: torch tensors in, calls of the compiled library, torch tensors out."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...config import LayerSpec
from ...numerics import GELU_SHIFT, SVDQuantTensors, padded_columns
from . import library
from .structures import BLOCK, FORMATS, TYPES, UNSIGNED_INT4, Input, Weight, declare

_GROUPS = (16, 32, 64, 128, 256)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATION_GROUP = 64
# Bytes of codes at a time: more rows than fit are multiplied in parts.
SCRATCH_LIMIT = 32 << 20


@lru_cache(maxsize=1)
def _operations() -> Any:
    loaded = library.load()
    return None if loaded is None else declare(loaded.cdll)


def supports(tensors: SVDQuantTensors, activations: str, dtype: torch.dtype) -> bool:
    """Whether the compiled products take this layer; the others are dequantized."""
    spec = tensors.spec
    group = spec.group_size
    if dtype not in _FLOATS or activations not in ("int8", "int4") or spec.zeros:
        return False
    if group and group not in _GROUPS and group % BLOCK:
        return False
    return tensors.wscales.device.type == "cpu" and _operations() is not None


def supports_weight_only(qweight: Tensor, wscales: Tensor, dtype: torch.dtype, weights: str) -> bool:
    """The same of a product with 16-bit activations."""
    columns = qweight.shape[-1] * (1 if weights == "int8" else 2)
    group = 0 if wscales.shape[-1] == 1 else columns // wscales.shape[-1]
    whole = group in (0, 16) or (group % 32 == 0 and columns % wscales.shape[-1] == 0)
    return dtype in _FLOATS and whole and _operations() is not None


def _pointer(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def _type(t: Tensor | None) -> int:
    return 0 if t is None else TYPES[t.dtype]


@dataclass
class Quantized:
    """The codes of one input [M, K]; keeps alive what `record` points to.

    codes(): int8 [M, columns]; scales: float32 [M] (8 bits) or [groups, M] (4 bits).
    """

    record: Input
    buffers: tuple[Any, ...]
    columns: int

    def codes(self) -> Tensor:
        r = self.record
        blocks = self.buffers[0].view(torch.int8)[: r.blocks * r.all_rows * BLOCK].view(r.blocks, r.all_rows, BLOCK)
        return blocks.transpose(0, 1).reshape(r.all_rows, -1)[: r.rows, : self.columns]

    @property
    def scales(self) -> Tensor:
        r = self.record
        scales = self.buffers[1].view(torch.float32)
        return scales[: r.rows] if r.bits == 8 else scales.view(-1, r.all_rows)[:, : r.rows]


def _rows(x: Tensor) -> Tensor:
    """x [..., K] as [M, K] with contiguous rows."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] <= 1 else rows.contiguous()


def _bytes(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.uint8)


def describe(x: Tensor, spec: LayerSpec, smooth: Tensor | None, activations: str) -> tuple[Input, tuple[Any, ...]]:
    """The input's record without codes; x [M, K] with contiguous rows."""
    columns = padded_columns(x.shape[1], spec)
    r = Input()
    r.rows, r.features, r.columns = x.shape[0], x.shape[1], columns
    r.x, r.x_stride, r.x_type = x.data_ptr(), x.stride(0), TYPES[x.dtype]
    r.bits = 4 if activations == "int4" else 8
    r.group = spec.group_size if spec.weights == "int4" and 0 < spec.group_size <= BLOCK else ACTIVATION_GROUP
    weight_group = spec.group_size if 0 < spec.group_size < BLOCK else BLOCK
    r.sum_group = min(weight_group, r.group) if r.bits == 4 else weight_group
    if smooth is not None:
        smooth = smooth.contiguous()
        r.smooth, r.smooth_type = smooth.data_ptr(), TYPES[smooth.dtype]
    r.rotate = int(spec.rotate)
    edges = [edge for segment in spec.unsigned for edge in segment]
    ranges = (ctypes.c_int64 * max(len(edges), 1))(*edges)
    r.ranges, r.range_count, r.shift = ctypes.addressof(ranges), len(edges) // 2, GELU_SHIFT
    r.threads = torch.get_num_threads()
    return r, (x, smooth, ranges)


def describe_weight(tensors: SVDQuantTensors) -> tuple[Weight, tuple[Any, ...]]:
    """The weight's record, and what it points to."""
    t = SVDQuantTensors(
        tensors.spec, tensors.in_features, **{name: value.contiguous() for name, value in tensors.named().items()}
    )
    w = Weight()
    w.outputs, w.row_bytes = t.qweight.shape
    w.columns = w.row_bytes if t.spec.weights == "int8" else w.row_bytes * 2
    w.format = FORMATS[t.spec.weights] if t.wzeros is None else UNSIGNED_INT4
    w.group, w.groups = t.spec.group_size, t.wscales.shape[1]
    w.qweight, w.scales, w.scales_type = t.qweight.data_ptr(), t.wscales.data_ptr(), TYPES[t.wscales.dtype]
    w.outer, w.outer_type = _pointer(t.wcscales), _type(t.wcscales)
    w.outer_blocks = 1 if t.wcscales is None or t.wcscales.dim() == 1 else t.wcscales.shape[1]
    w.zeros, w.zeros_type = _pointer(t.wzeros), _type(t.wzeros)
    if t.proj_down is not None and t.proj_up is not None and t.proj_down.shape[0]:
        w.rank = t.proj_down.shape[0]
        w.down, w.down_type = t.proj_down.data_ptr(), TYPES[t.proj_down.dtype]
        w.up, w.up_type = t.proj_up.data_ptr(), TYPES[t.proj_up.dtype]
    w.bias, w.bias_type = _pointer(t.bias), _type(t.bias)
    return w, (t,)


def quantize(x: Tensor, spec: LayerSpec, smooth: Tensor | None, activations: str) -> Quantized:
    """Codes of x [M, K] for a layer; see `Quantized`."""
    record, keep = _allocate(_rows(x), spec, smooth, activations)
    _operations().svdq_prepare(ctypes.byref(record), None, None, None)
    return Quantized(record, keep, record.columns)


def _allocate(
    x: Tensor, spec: LayerSpec, smooth: Tensor | None, activations: str
) -> tuple[Input, tuple[Any, ...]]:
    record, keep = describe(x, spec, smooth, activations)
    sizes = (ctypes.c_int64 * 4)()
    _operations().svdq_input_bytes(ctypes.byref(record), sizes)
    buffers = tuple(_bytes(size) for size in sizes)
    record.codes, record.scales, record.sums, record.scratch = (b.data_ptr() for b in buffers)
    return record, (*buffers, keep)


def svdquant_linear(x: Tensor, tensors: SVDQuantTensors, activations: str) -> Tensor:
    """y = Q(x/s)·Ŵᵀ + (x·Dᵀ)·Uᵀ + b for x [M, K]; returns [M, N] in x's type. See `supports`."""
    x = _rows(x)
    y = x.new_empty(x.shape[0], tensors.out_features)
    weight, keep = describe_weight(tensors)
    part = max(SCRATCH_LIMIT // max(weight.columns, 1), 1)
    for start in range(0, x.shape[0], part):
        _multiply(x[start : start + part], tensors, activations, weight, y[start : start + part])
    del keep
    return y


def _multiply(x: Tensor, tensors: SVDQuantTensors, activations: str, weight: Weight, y: Tensor) -> None:
    ops = _operations()
    record, keep = _allocate(x, tensors.spec, tensors.smooth_factor, activations)
    low = scratch = None
    if weight.rank:
        sizes = (ctypes.c_int64 * 2)()
        ops.svdq_low_bytes(ctypes.byref(record), ctypes.byref(weight), sizes)
        low, scratch = _bytes(sizes[0]), _bytes(sizes[1])
    ops.svdq_prepare(ctypes.byref(record), ctypes.byref(weight), _pointer(low), _pointer(scratch))
    work = _bytes(ops.svdq_multiply_bytes(ctypes.byref(record), ctypes.byref(weight)))
    ops.svdq_multiply(
        ctypes.byref(record),
        ctypes.byref(weight),
        _pointer(low),
        y.data_ptr(),
        y.stride(0),
        TYPES[y.dtype],
        work.data_ptr(),
    )
    del keep


def w4a16_linear(
    x: Tensor, qweight: Tensor, wscales: Tensor, bias: Tensor | None, weights: str, wzeros: Tensor | None
) -> Tensor:
    """y = x·Ŵᵀ + b for x [M, K]; returns [M, N] in x's type. See `supports_weight_only`."""
    x = _rows(x)
    y = x.new_empty(x.shape[0], qweight.shape[0])
    columns = qweight.shape[1] * (1 if weights == "int8" else 2)
    group = 0 if wscales.shape[1] == 1 else columns // wscales.shape[1]
    spec = LayerSpec(kind="w4a16", weights=weights, group_size=group, rank=0)
    tensors = SVDQuantTensors(spec, x.shape[1], qweight, wscales, bias=bias, wzeros=wzeros)
    weight, keep = describe_weight(tensors)
    part = max(SCRATCH_LIMIT // max(4 * columns, 1), 1)
    ops = _operations()
    for start in range(0, x.shape[0], part):
        rows, out = x[start : start + part], y[start : start + part]
        record, alive = describe(rows, spec, None, "int8")
        work = _bytes(ops.svdq_weight_only_bytes(ctypes.byref(record), ctypes.byref(weight)))
        ops.svdq_weight_only(
            ctypes.byref(record),
            ctypes.byref(weight),
            out.data_ptr(),
            out.stride(0),
            TYPES[out.dtype],
            work.data_ptr(),
        )
        del alive
    del keep
    return y
