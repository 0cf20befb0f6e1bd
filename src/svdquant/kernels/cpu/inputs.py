"""Quantized inputs of the CPU's products, and how linears that read one tensor share its codes."""

from __future__ import annotations

import ctypes
import threading
import weakref
from ctypes import byref
from typing import Any

import torch
from torch import Tensor

from ...config import LayerSpec
from ...errors import SVDQuantError
from ...numerics import GELU_SHIFT, padded_columns
from .structures import BLOCK, FORMATS, TYPES, Input

ACTIVATION_GROUP = 64
# Bytes of codes at a time: an input that has more is multiplied in parts.
SCRATCH_LIMIT = 32 << 20
# Bytes of codes, and as many of scratch, that a thread keeps for its next product: what the system gives back has to be
# mapped again, page by page.
KEPT = 8 << 20


def new_bytes(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.uint8, device="cpu")


def plain(t: Tensor) -> Tensor:
    """Contiguous, and of a type that the library reads."""
    floating = t.dtype in TYPES and t.itemsize > 1
    return (t if floating else t.float()).resolve_neg().contiguous()


def check_shape(name: str, t: Tensor | None, *expected: tuple[int, ...]) -> None:
    """Raises `SVDQuantError` where a tensor of a layer has none of the expected shapes."""
    if t is not None and tuple(t.shape) not in expected:
        shapes = " or ".join(str(list(shape)) for shape in expected)
        raise SVDQuantError(f"{name} of a quantized layer has shape {list(t.shape)}, expected {shapes}")


class Quantized:
    """One input [M, K] of linears that read it alike; `filled` once its buffer holds codes of some input of its kind.

    Keeps alive what `record` points to, but x: whoever multiplies has that.
    """

    __slots__ = ("buffer", "filled", "keep", "kind", "record")

    def __init__(self, record: Input, buffer: Tensor | None, keep: tuple[Any, ...]) -> None:
        self.record, self.buffer, self.keep = record, buffer, keep
        self.filled = False
        self.kind: tuple[Any, ...] = ()

    def fill(self, operations: Any) -> None:
        scratch = new_bytes(operations.svdq_quantize_bytes(byref(self.record)))
        operations.svdq_quantize(byref(self.record), scratch.data_ptr())
        self.filled = True

    def codes(self) -> Tensor:
        """int8 [M, Kp]."""
        r = self.record
        assert self.buffer is not None
        blocks = self.buffer.view(torch.int8)[: r.blocks * r.all_rows * BLOCK].view(r.blocks, r.all_rows, BLOCK)
        return blocks.transpose(0, 1).reshape(r.all_rows, -1)[: r.rows, : r.columns]

    def scales(self) -> Tensor:
        """float32 [M] (8 bits) or [groups, M] (4 bits)."""
        r = self.record
        assert self.buffer is not None
        groups = 1 if r.bits == 8 else r.blocks * BLOCK // r.group
        start = r.blocks * r.all_rows * BLOCK
        scales = self.buffer[start : start + 4 * groups * r.all_rows].view(torch.float32)
        return scales[: r.rows] if r.bits == 8 else scales.view(groups, r.all_rows)[:, : r.rows]


def describe(x: Tensor, spec: LayerSpec, smooth: Tensor | None, activations: str, operations: Any) -> Quantized:
    """The input x [M, K], rows contiguous, of a layer. operations: None where no codes will be made."""
    bits, group = (4 if activations == "int4" else 8), spec.group_size
    # The weight's own group where it is of the same format.
    own = group if spec.weights == "int4" and 0 < group <= BLOCK else ACTIVATION_GROUP
    summed = group if 0 < group < BLOCK else BLOCK
    if smooth is not None:
        check_shape("smooth_factor", smooth, (x.shape[1],))
        if smooth.device.type != "cpu" or not smooth.data_ptr():
            raise SVDQuantError(f"smooth_factor of a quantized layer is not in memory ({smooth.device})")
        smooth = plain(smooth)
    ranges = None
    if spec.unsigned:
        edges = [max(0, min(edge, x.shape[1])) for segment in spec.unsigned for edge in segment]
        ranges = (ctypes.c_int64 * len(edges))(*edges)
    record = Input(
        rows=x.shape[0],
        features=x.shape[1],
        columns=padded_columns(x.shape[1], spec),
        x=x.data_ptr(),
        x_stride=x.stride(0),
        x_type=TYPES[x.dtype],
        bits=bits,
        group=own,
        sum_group=min(summed, own) if bits == 4 else summed,
        smooth=None if smooth is None else smooth.data_ptr(),
        smooth_type=0 if smooth is None else TYPES[smooth.dtype],
        rotate=spec.rotate,
        ranges=None if ranges is None else ctypes.addressof(ranges),
        range_count=len(spec.unsigned),
        shift=GELU_SHIFT,
        threads=torch.get_num_threads(),
        format=FORMATS[spec.weights],
    )
    buffer = None
    if operations is not None:
        buffer = new_bytes(operations.svdq_input_bytes(byref(record)))
        record.buffer = buffer.data_ptr()
    return Quantized(record, buffer, (smooth, ranges))


_per_thread = threading.local()


def take(x: Tensor, spec: LayerSpec, smooth: Tensor | None, activations: str, operations: Any) -> Quantized:
    """The description of x [M, K], with the codes of what this thread quantized last where that looked alike.

    Whether it was the same is the library's to find out: it compares checksums of every row of x and of the smoothing,
    so that linears which read one tensor quantize it once, and a tensor that changed is quantized again, however the
    change was made.
    """
    made = describe(x, spec, smooth, activations, None)
    r = made.record
    kind = (r.rows, r.features, r.columns, r.x_type, r.bits, r.group, r.sum_group, r.smooth_type, r.rotate, r.format)
    made.kind = (*kind, smooth is None, spec.unsigned)
    last: _Last | None = _per_thread.__dict__.pop("last", None)
    before = None if last is None else last.made
    if before is not None and before.kind == made.kind:
        made.buffer, made.filled = before.buffer, before.filled
    else:
        size, made.buffer = operations.svdq_input_bytes(byref(r)), None if before is None else before.buffer
        last = before = None  # frees its codes before others are made
        if made.buffer is None or not size <= made.buffer.numel() <= KEPT:
            made.buffer = None
            made.buffer = new_bytes(size)
    assert made.buffer is not None
    r.buffer = made.buffer.data_ptr()
    return made


def give_back(made: Quantized, source: Tensor) -> None:
    """Its codes may serve this thread's next linear."""
    made.keep = ()
    _per_thread.last = _Last(made, source)


class _Last:
    """The input that a thread quantized last; forgotten with the tensor it was made of."""

    def __init__(self, made: Quantized, source: Tensor) -> None:
        self.made: Quantized | None = made
        self.source = weakref.ref(source, self._forget)

    def _forget(self, _source: weakref.ref[Tensor]) -> None:
        made = self.made
        if made is not None and made.buffer is not None and made.buffer.numel() <= KEPT:
            made.filled = False
        else:
            self.made = None


def scratch(size: int) -> Tensor:
    """At least `size` bytes for one call; what they hold is the next call's."""
    kept: Tensor | None = getattr(_per_thread, "scratch", None)
    if kept is None or kept.numel() < size:
        kept = new_bytes(size)
        if size <= KEPT:
            _per_thread.scratch = kept
    return kept
