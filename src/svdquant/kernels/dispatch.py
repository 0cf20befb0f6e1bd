"""Which path multiplies, per device: one table, which `svdquant doctor` prints."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import ACTIVATIONS, LayerSpec
from ..errors import SVDQuantError
from ..numerics import SVDQuantTensors, dequantize_weight
from . import cpu, eager, reference

BACKENDS = ("native", "dequantize", "reference")


@dataclass(frozen=True)
class DevicePath:
    """How one device multiplies: backend, what "auto" activations mean per stored weight format, and why."""

    backend: str
    auto: dict[str, str]
    why: str


def device_path(device: torch.device) -> DevicePath:
    """The path of a device; `SVDQUANT_BACKEND` overrides the backend."""
    backend = backend_of(device)
    eight_bit = {"int4": "int8", "nvfp4": "int8", "int8": "int8"}
    if device.type == "cuda" and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device)
        if (7, 5) <= (major, minor) <= (8, 9):
            return DevicePath(backend, eight_bit | {"int4": "int4"}, f"sm_{major}{minor} has int4 tensor cores")
        if major in (10, 12):
            return DevicePath(backend, eight_bit | {"nvfp4": "nvfp4"}, f"sm_{major}{minor} has nvfp4 tensor cores")
        return DevicePath(backend, eight_bit, f"sm_{major}{minor} has no 4-bit tensor cores: 8-bit activations")
    why = {"cpu": "a CPU multiplies 8-bit integers at best"}.get(device.type, "8-bit activations run everywhere")
    return DevicePath(backend, eight_bit, why)


def backend_of(device: torch.device) -> str:
    """What multiplies on a device: one of `BACKENDS`."""
    backend = os.environ.get("SVDQUANT_BACKEND") or "native"
    if backend not in BACKENDS:
        raise SVDQuantError(f"SVDQUANT_BACKEND={backend!r} is not one of {', '.join(BACKENDS)}")
    if backend == "native" and not (device.type == "cpu" and cpu.available()):
        return "dequantize"
    return backend


def compute_dtype(x: Tensor, backend: str) -> torch.dtype:
    """The operands' type in a product: x's own 16-bit type where the device is fast in it, else float32."""
    slow_half = x.device.type == "cpu" and x.dtype == torch.float16
    if backend == "reference" or slow_half or x.dtype not in (torch.bfloat16, torch.float16):
        return torch.float32
    return x.dtype


def resolve_activations(activations: str, spec: LayerSpec, device: torch.device) -> str:
    """The precision that a layer really uses.

    "auto" follows the device, but a layer that was solved for more bits than the device wants keeps them.
    """
    if activations not in ACTIVATIONS:
        raise SVDQuantError(f"activations={activations!r} is not one of {', '.join(ACTIVATIONS)}")
    if activations != "auto":
        return activations
    wanted = device_path(device).auto[spec.weights]
    bits = {"int4": 4, "nvfp4": 4, "int8": 8, "fp8": 8, "none": 16}
    solved_for = spec.activations if spec.activations != "auto" else wanted
    return solved_for if bits[solved_for] > bits[wanted] else wanted


def svdquant_linear(
    x: Tensor,
    tensors: SVDQuantTensors,
    activations: str = "auto",
    gelu: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """y = Q(x/s)·Ŵᵀ + (x·Dᵀ)·Uᵀ + b, or its GELU (tanh).

    x [..., K] of a floating type, any leading dimensions, none of them required to be non-empty; returns [..., N] in
    x's type. out: [..., N] of x's type, written and returned instead. Row i depends on row i alone, bit for bit.
    Raises `SVDQuantError` where K or out does not fit.
    """
    if x.shape[-1] != tensors.in_features:
        raise SVDQuantError(f"input has {x.shape[-1]} features, the layer takes {tensors.in_features}")
    t = tensors
    if out is not None and (out.shape != (*x.shape[:-1], t.out_features) or out.dtype != x.dtype):
        wanted = f"{[*x.shape[:-1], t.out_features]} {x.dtype}"
        raise SVDQuantError(f"out is {list(out.shape)} {out.dtype}, the result {wanted}")
    activations = resolve_activations(activations, t.spec, x.device)
    if eager.is_plain(x) and backend_of(x.device) == "native" and cpu.supports(t, activations, x.dtype):
        if out is None:
            y = cpu.svdquant_linear(x, t, activations, gelu)
            return y.view(*x.shape[:-1], y.shape[-1])
        rows = _as_rows(out, x)
        if rows is not None:
            cpu.svdquant_linear(x, t, activations, gelu, rows)
            if not out.is_inference():
                torch.autograd.graph.increment_version(out)
            return out
    y = torch.ops.svdquant.linear(
        x,
        t.qweight,
        t.wscales,
        t.wcscales,
        t.smooth_factor,
        t.proj_down,
        t.proj_up,
        t.bias,
        t.spec.weights,
        t.spec.group_size,
        [edge for segment in t.spec.unsigned for edge in segment],
        t.spec.rotate,
        activations,
    )
    if gelu:
        y = torch.nn.functional.gelu(y, approximate="tanh")
    return y if out is None else out.copy_(y)


def _as_rows(out: Tensor, x: Tensor) -> Tensor | None:
    """out [..., N] seen as [M, N] with contiguous rows, or None where a copy would be needed."""
    if (
        not eager.is_plain(out)
        or out.stride(-1) != 1
        or out.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    ):
        return None
    try:
        rows = out.view(-1, out.shape[-1])
    except RuntimeError:
        return None
    overlap = rows.shape[0] > 1 and rows.stride(0) < rows.shape[1]
    return None if overlap else rows


@torch.library.custom_op("svdquant::linear", mutates_args=())
def _linear(
    x: Tensor,
    qweight: Tensor,
    wscales: Tensor,
    wcscales: Tensor | None,
    smooth_factor: Tensor | None,
    proj_down: Tensor | None,
    proj_up: Tensor | None,
    bias: Tensor | None,
    weights: str,
    group_size: int,
    unsigned: list[int],
    rotate: bool,
    activations: str,
) -> Tensor:
    segments = tuple(zip(unsigned[0::2], unsigned[1::2], strict=True))
    spec = LayerSpec(weights=weights, group_size=group_size, unsigned=segments, rotate=rotate)
    tensors = SVDQuantTensors(spec, x.shape[-1], qweight, wscales, wcscales, smooth_factor, proj_down, proj_up, bias)
    rows = x.reshape(-1, x.shape[-1])
    backend = backend_of(x.device)
    if backend == "native" and cpu.supports(tensors, activations, x.dtype):
        y = cpu.svdquant_linear(rows, tensors, activations)
    else:
        y = reference.svdquant_linear(rows, tensors, activations, compute_dtype(x, backend))
    return y.reshape(*x.shape[:-1], qweight.shape[0])


@_linear.register_fake
def _(x: Tensor, qweight: Tensor, *_args: object) -> Tensor:
    return x.new_empty(*x.shape[:-1], qweight.shape[0])


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, qweight, wscales, wcscales, smooth_factor, proj_down, proj_up = inputs[:7]
    weights, group_size, _, rotate = inputs[8:12]
    ctx.save_for_backward(qweight, wscales, wcscales, smooth_factor, proj_down, proj_up)
    ctx.in_features = x.shape[-1]
    ctx.spec = LayerSpec(weights=weights, group_size=group_size, rotate=rotate)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Straight through the rounding of the activations: the gradient of the dense linear, to x only."""
    tensors = SVDQuantTensors(ctx.spec, ctx.in_features, *ctx.saved_tensors)
    weight, _ = tensors.dense()
    return (grad.float() @ weight).to(grad.dtype), *([None] * 12)


_linear.register_autograd(_backward, setup_context=_save_for_backward)


def w4a16_linear(
    x: Tensor,
    qweight: Tensor,
    wscales: Tensor,
    bias: Tensor | None,
    weights: str = "int4",
    wzeros: Tensor | None = None,
) -> Tensor:
    """y = x·Ŵᵀ + b with quantized weights only.

    x [..., K]; qweight, wscales, wzeros as in `SVDQuantTensors`. Returns [..., N] in x's type.
    """
    native = eager.is_plain(x) and backend_of(x.device) == "native"
    if native and cpu.supports_weight_only(qweight, wscales, x.dtype, weights):
        y = cpu.w4a16_linear(x, qweight, wscales, bias, weights, wzeros)
        return y.view(*x.shape[:-1], y.shape[-1])
    return torch.ops.svdquant.w4a16_linear(x, qweight, wscales, wzeros, bias, weights)


@torch.library.custom_op("svdquant::w4a16_linear", mutates_args=())
def _w4a16_linear(
    x: Tensor, qweight: Tensor, wscales: Tensor, wzeros: Tensor | None, bias: Tensor | None, weights: str
) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    backend = backend_of(x.device)
    if backend == "native" and cpu.supports_weight_only(qweight, wscales, x.dtype, weights):
        y = cpu.w4a16_linear(rows, qweight, wscales, bias, weights, wzeros)
    else:
        y = reference.w4a16_linear(rows, qweight, wscales, weights, bias, compute_dtype(x, backend), wzeros)
    return y.reshape(*x.shape[:-1], qweight.shape[0])


@_w4a16_linear.register_fake
def _(x: Tensor, qweight: Tensor, *_args: object) -> Tensor:
    return x.new_empty(*x.shape[:-1], qweight.shape[0])


def _save_w4a16(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, qweight, wscales, wzeros, _bias, weights = inputs
    ctx.save_for_backward(qweight, wscales, wzeros)
    ctx.in_features, ctx.weights = x.shape[-1], weights


def _backward_w4a16(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    qweight, wscales, wzeros = ctx.saved_tensors
    weight = dequantize_weight(qweight, wscales, None, ctx.weights, torch.float32, wzeros)[:, : ctx.in_features]
    return (grad.float() @ weight).to(grad.dtype), None, None, None, None, None


_w4a16_linear.register_autograd(_backward_w4a16, setup_context=_save_w4a16)
