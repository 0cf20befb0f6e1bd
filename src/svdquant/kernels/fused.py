"""What lies between a transformer's products, each in one pass: the definitions in plain torch, and who runs them.

All compute in float32 and round once, to the type of their input. `usable` says where that is wanted: on a CPU with
the compiled library, and on a GPU with its kernels, there under a compiler too, which makes its own of the definitions.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cpu, eager, gpu
from .dispatch import backend_of

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def enabled() -> bool:
    """Whether SVDQUANT_FUSE leaves fused operations on."""
    return os.environ.get("SVDQUANT_FUSE") != "0"


def usable(*inputs: Tensor) -> bool:
    """Whether fused forwards may take these: tensors of one type and device, no gradients, no autocast."""
    first = inputs[0]
    if not all(x.dtype == first.dtype and x.device == first.device for x in inputs) or first.dtype not in _FLOATS:
        return False
    backend = backend_of(first.device)
    if backend not in ("native", "triton") or not enabled():
        return False
    if torch.is_grad_enabled() or torch.is_autocast_enabled(first.device.type):
        return False
    if backend == "triton":
        return first.dtype != torch.float32 and (torch.compiler.is_compiling() or _launchable(*inputs))
    return all(eager.is_plain(x) for x in inputs)


def _launchable(*inputs: Tensor) -> bool:
    return all(eager.is_unwatched(x) for x in inputs)


def _kernels(*inputs: Tensor) -> Any:
    """The module whose functions run on these, of `usable` inputs; None: the definitions."""
    if not usable(*inputs) or torch.compiler.is_compiling():
        return None
    if backend_of(inputs[0].device) == "native":
        return cpu
    if not gpu.others_work(inputs[0].dtype, inputs[0].device):
        return None
    from .gpu import elementwise

    return elementwise


def norm_modulate(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """layer_norm(x)·(1 + scale) + shift, as AdaLN modulates.

    x [B, L, K]; scale, shift [B or 1, K]; weight, bias [K]: of the normalization itself. Returns x's shape and type.
    out: a tensor like x, or x itself, to be written and returned.
    """
    factor, offset = 1 + scale.float(), shift.float()
    if bias is not None:
        offset = offset + factor * bias.float()
    if weight is not None:
        factor = factor * weight.float()
    kernels = _kernels(x)
    alike = out is None or (out.shape == x.shape and _kernels(x, out) is kernels and _may_hold(out, x))
    if kernels is not None and alike and _fits(factor, x) and offset.shape == factor.shape:
        y: Tensor = kernels.norm_modulate(x, factor, offset, eps, out)
        return y if out is None else _written(out)
    normalized = F.layer_norm(x.float(), x.shape[-1:], eps=eps)
    y = normalized * factor[:, None] + offset[:, None]
    return y.to(x.dtype) if out is None else out.copy_(y)


def norm_rotate(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    rotary: tuple[Tensor, Tensor] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """rms_norm(x)·weight of every head, then its pairs (2i, 2i+1) rotated: q and k on their way to attention.

    x [B, L, H, D]; weight [D]; rotary: cosines and sines [L, D], as diffusers' FLUX has them. out: a tensor like x,
    or x itself, to be written and returned; its heads and tokens may lie anywhere, their features side by side.
    """
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    cosine, sine = (None, None) if rotary is None else (part.to(x.device, torch.float32) for part in rotary)
    weight = None if weight is None else weight.float()
    kernels = _kernels(x, out)
    if kernels is not None:
        fits = out.shape == x.shape and _may_hold(out, x) and (weight is None or weight.shape == x.shape[-1:])
        if cosine is not None and sine is not None:
            fits = fits and x.shape[-1] % 2 == 0 and cosine.shape == sine.shape == (x.shape[1], x.shape[3])
        if fits:
            kernels.norm_rotate(x, weight, eps, cosine, sine, out)
            return _written(out)
    y = F.rms_norm(x.float(), x.shape[-1:], weight, eps)
    if cosine is not None and sine is not None:
        real, imaginary = y.unflatten(-1, (-1, 2)).unbind(-1)
        y = y * cosine[:, None] + torch.stack([-imaginary, real], dim=-1).flatten(-2) * sine[:, None]
    return out.copy_(y)


def gate_add(residual: Tensor, gate: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
    """residual + gate·x; in float16 what is out of range becomes the largest number, as diffusers has it.

    residual, x [B, L, K]; gate [B or 1, K]. out: a tensor like x, residual or x themselves, to be written and returned.
    """
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    gate = gate.float()
    kernels = _kernels(x, residual, out)
    alike = kernels is not None and x.shape == residual.shape == out.shape and _fits(gate, x)
    if kernels is not None and alike and _may_hold(out, residual, x):
        kernels.gate_add(residual, gate, x, out)
        return _written(out)
    y = residual.float() + gate[:, None] * x.float()
    return out.copy_(y.clamp(-65504, 65504) if x.dtype == torch.float16 else y)


def _may_hold(out: Tensor, *operands: Tensor) -> bool:
    """Whether results can be written to `out` while operands are read: each is `out` itself or lies elsewhere."""
    if out.stride(-1) != 1 or any(
        stride == 0 and size > 1 for stride, size in zip(out.stride(), out.shape, strict=True)
    ):
        return False
    return all(
        _same_place(x, out) or x.untyped_storage().data_ptr() != out.untyped_storage().data_ptr() for x in operands
    )


def _same_place(x: Tensor, out: Tensor) -> bool:
    """Whether both are the same elements. Where a dimension has but one, its stride says nothing."""
    strides = zip(x.shape, x.stride(), out.stride(), strict=True)
    return x.shape == out.shape and x.data_ptr() == out.data_ptr() and all(n == 1 or a == b for n, a, b in strides)


def _written(out: Tensor) -> Tensor:
    """`out` as autograd counts its changes."""
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)
    return out


def _fits(modulation: Tensor, x: Tensor) -> bool:
    """Whether `modulation` is [B or 1, K] for x [B, L, K]."""
    if x.dim() != 3 or modulation.dim() != 2 or modulation.device != x.device:
        return False
    return modulation.shape[0] in (1, x.shape[0]) and modulation.shape[1] == x.shape[2]
