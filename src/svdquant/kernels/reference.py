"""The truth: SVDQuant's linear in plain torch, on every device. Fast paths are tested against it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import LayerSpec
from ..numerics import (
    GELU_SHIFT,
    SVDQuantTensors,
    dequantize_weight,
    fp8,
    int4,
    int8,
    nvfp4,
    pad_columns,
    padded_columns,
)
from ..numerics.hadamard import rotate
from .rows import linear_rows

ACTIVATION_GROUP = {"int4": 64, "nvfp4": 16}


def shift_vector(spec: LayerSpec, in_features: int, device: torch.device) -> Tensor:
    """float32 [K]: what is added to x before 4-bit codes; zero outside `spec.unsigned`."""
    shift = torch.zeros(in_features, device=device, dtype=torch.float32)
    for start, stop in spec.unsigned:
        shift[start:stop] = GELU_SHIFT
    return shift


def smoothed(x: Tensor, spec: LayerSpec, smooth: Tensor | None, columns: int) -> Tensor:
    """x/s, zero-padded to `columns` and rotated where the layer is. x [M, K] float32; returns [M, columns]."""
    h = x if smooth is None else x / smooth
    if h.shape[-1] < columns:
        h = torch.nn.functional.pad(h, (0, columns - h.shape[-1]))
    return rotate(h) if spec.rotate else h


def prepare_activation(
    x: Tensor, spec: LayerSpec, smooth: Tensor | None, columns: int, activations: str, dtype: torch.dtype
) -> Tensor:
    """What the quantized weight multiplies: shifted, smoothed, rotated, quantized and dequantized.

    x [M, K] float32, smooth [K] float32 or None, columns Kp; dtype: of the model, int4 scales are rounded to it.
    Returns float32 [M, Kp]. `activations` is one of int4, int8, fp8, nvfp4, none.
    """
    if not spec.unsigned:
        return quantize_activation(smoothed(x, spec, smooth, columns), spec, activations, dtype)
    shift = shift_vector(spec, x.shape[-1], x.device)
    if activations == "int4":
        return quantize_activation(smoothed(x + shift, spec, smooth, columns), spec, activations, dtype)
    # Only 4-bit codes need the shift; the others quantize x/s itself, and the weight still expects (x + shift)/s.
    h = quantize_activation(smoothed(x, spec, smooth, columns), spec, activations, dtype)
    return h + smoothed(shift[None], spec, smooth, columns)


def quantize_activation(h: Tensor, spec: LayerSpec, activations: str, dtype: torch.dtype) -> Tensor:
    """Dynamic quantization of float32 h [M, Kp], per token (int8, fp8) or per token and group (int4, nvfp4)."""
    if activations == "none":
        return h
    if activations == "int8":
        return int8.fake_quantize_activation(h)
    if activations == "fp8":
        return fp8.fake_quantize_activation(h)
    half = dtype in (torch.bfloat16, torch.float16)
    if half:
        # As the published kernels: 4-bit codes are those of x/s in the model's own type.
        h = h.to(dtype).float()
    # The weight's own group where it is of the same format.
    same = spec.weights == activations and spec.group_size
    group = spec.group_size if same else ACTIVATION_GROUP[activations]
    padded = pad_columns(h, group)
    if activations == "nvfp4":
        return nvfp4.fake_quantize_activation(padded, group)[:, : h.shape[1]]
    unsigned = None
    if spec.unsigned:
        unsigned = torch.zeros(padded.shape[1] // group, dtype=torch.bool, device=h.device)
        for start, stop in spec.unsigned:
            unsigned[start // group : -(-stop // group)] = True
    return int4.fake_quantize_activation(padded, group, unsigned, dtype if half else torch.float32)[:, : h.shape[1]]


def svdquant_linear(
    x: Tensor,
    tensors: SVDQuantTensors,
    activations: str,
    compute_dtype: torch.dtype,
    low_scales: Tensor | None = None,
) -> Tensor:
    """y = Q(x/s)·Ŵᵀ + ((x·Dᵀ)·f)·Uᵀ + b for x [M, K]; returns [M, N] in x's type.

    Operands of the products are `compute_dtype`; their sum and the bias are added in float32. low_scales: f, float32
    [R], or [B, R] where every M/B consecutive rows share a line; None = ones.
    """
    smooth = None if tensors.smooth_factor is None else tensors.smooth_factor.float()
    columns = padded_columns(tensors.in_features, tensors.spec)
    h = prepare_activation(x.float(), tensors.spec, smooth, columns, activations, x.dtype).to(compute_dtype)
    y = linear_rows(h, tensors.residual(compute_dtype)).float()
    if tensors.proj_down is not None and tensors.proj_up is not None:
        low = linear_rows(x.to(compute_dtype), tensors.proj_down.to(compute_dtype))
        if low_scales is not None:
            low = scaled(low, low_scales)
        y += linear_rows(low, tensors.proj_up.to(compute_dtype)).float()
    if tensors.bias is not None:
        y += tensors.bias.float()
    return y.to(x.dtype)


def scaled(low: Tensor, low_scales: Tensor) -> Tensor:
    """low [M, R] times its strengths, in float32, in low's type."""
    if low_scales.dim() == 2 and low.numel():
        low_scales = low_scales.repeat_interleave(low.shape[0] // low_scales.shape[0], 0)
    return (low.float() * low_scales).to(low.dtype) if low.numel() else low


def w4a16_linear(
    x: Tensor,
    qweight: Tensor,
    wscales: Tensor,
    weights: str,
    bias: Tensor | None,
    compute_dtype: torch.dtype,
    wzeros: Tensor | None = None,
) -> Tensor:
    """y = x·Ŵᵀ + b for x [M, K]; weights only are quantized. Returns [M, N] in x's type."""
    weight = dequantize_weight(qweight, wscales, None, weights, compute_dtype, wzeros)[:, : x.shape[1]]
    y = linear_rows(x.to(compute_dtype), weight)
    if bias is not None:
        y = y.float() + bias.float()
    return y.to(x.dtype)
