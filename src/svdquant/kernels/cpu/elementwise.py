"""The operations between products, in the compiled library: tensors in, tensors out; `kernels.fused` defines them."""

from __future__ import annotations

from ctypes import byref

import torch
from torch import Tensor

from .linear import operations
from .structures import TYPES, Shape, View


def norm_modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """layer_norm(x)·scale + shift. x [B, L, K]; scale, shift float32 [B or 1, K]; out as x, or None: a new tensor."""
    x = _dense(x)
    y = x.new_empty(x.shape) if out is None else out
    scale, shift = scale.contiguous(), shift.contiguous()
    shape, stride = _shape(x, heads=1), _stride(scale)
    operations().svdq_norm_modulate(
        byref(shape), byref(_view(x)), scale.data_ptr(), shift.data_ptr(), stride, eps, byref(_view(y))
    )
    return y


def norm_rotate(
    x: Tensor, weight: Tensor | None, eps: float, cosine: Tensor | None, sine: Tensor | None, out: Tensor
) -> None:
    """rms_norm(x)·weight per head, rotated, into out.

    x, out [B, L, H, D]; weight float32 [D]; cosine, sine float32 [L, D], or both None.
    """
    x = _dense(x)
    weight, cosine, sine = (None if t is None else t.contiguous() for t in (weight, cosine, sine))
    operations().svdq_norm_rotate(
        byref(_shape(x, heads=x.shape[2])),
        byref(_view(x)),
        None if weight is None else weight.data_ptr(),
        eps,
        None if cosine is None else cosine.data_ptr(),
        None if sine is None else sine.data_ptr(),
        byref(_view(out)),
    )


def gate_add(residual: Tensor, gate: Tensor, x: Tensor, out: Tensor) -> None:
    """residual + gate·x into out. residual, x, out [B, L, K]; gate float32 [B or 1, K]."""
    residual, x, gate = _dense(residual), _dense(x), gate.contiguous()
    operations().svdq_gate_add(
        byref(_shape(x, heads=1)),
        byref(_view(residual)),
        gate.data_ptr(),
        _stride(gate),
        byref(_view(x)),
        byref(_view(out)),
    )


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _shape(x: Tensor, heads: int) -> Shape:
    return Shape(x.shape[0], x.shape[1], heads, x.shape[-1], TYPES[x.dtype], torch.get_num_threads())


def _view(x: Tensor) -> View:
    return View(x.data_ptr(), x.stride(0), x.stride(1), x.stride(2) if x.dim() == 4 else 0)


def _stride(modulation: Tensor) -> int:
    return 0 if modulation.shape[0] == 1 else modulation.shape[1]
