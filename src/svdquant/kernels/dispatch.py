"""Which path multiplies, per device: one table, which `svdquant doctor` prints."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..config import ACTIVATIONS, LayerSpec
from ..errors import SVDQuantError
from ..numerics import SVDQuantTensors, dequantize_weight
from . import cpu, eager, gpu, reference

# What SVDQUANT_BACKEND may hold: the compiled kernels of the device, the path of last resort, the truth, or one product
# of a GPU, which then multiplies wherever it can.
BACKENDS = ("native", "dequantize", "reference", *gpu.PRODUCTS)


@dataclass(frozen=True)
class DevicePath:
    """How one device multiplies.

    backend: "native" (a CPU's library), "triton" (a GPU's kernels), "dequantize" or "reference".
    auto: what "auto" activations mean per stored weight format; why: in words.
    products: of a GPU, per precision of the activations, in the order in which they are tried.
    """

    backend: str
    auto: dict[str, str]
    why: str
    products: dict[str, tuple[str, ...]] = field(default_factory=dict)


def device_path(device: torch.device) -> DevicePath:
    """The path of a device; `SVDQUANT_BACKEND` overrides the backend."""
    backend = backend_of(device)
    auto, why = _auto(device)
    if backend != "triton":
        return DevicePath(backend, auto, why)
    first = gpu.forced()
    products = {precision: ((first,) if first else ()) + order for precision, order in gpu.ORDER.items()}
    return DevicePath(backend, auto, why, products)


def _auto(device: torch.device) -> tuple[dict[str, str], str]:
    """What "auto" activations mean per stored weight format on a device, and why."""
    auto = {"int4": "int8", "nvfp4": "int8", "int8": "int8"}
    why = {"cpu": "a CPU multiplies 8-bit integers at best"}.get(device.type, "8-bit activations run everywhere")
    if device.type == "cuda" and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device)
        why = f"sm_{major}{minor} has no 4-bit tensor cores: 8-bit activations"
        if (7, 5) <= (major, minor) <= (8, 9):
            auto["int4"], why = "int4", f"sm_{major}{minor} has int4 tensor cores"
        elif major in (10, 12):
            auto["nvfp4"], why = "nvfp4", f"sm_{major}{minor} has nvfp4 tensor cores"
    return auto, why


@eager.assume_constant
def _wanted(weights: str, device: torch.device) -> str:
    """`_auto` of one format."""
    return _auto(device)[0][weights]


def backend_of(device: torch.device) -> str:
    """What multiplies on a device: "native" (a CPU's library), "triton", "dequantize" or "reference"."""
    backend = os.environ.get("SVDQUANT_BACKEND") or "native"
    if backend not in BACKENDS:
        raise SVDQuantError(f"SVDQUANT_BACKEND={backend!r} is not one of {', '.join(BACKENDS)}")
    if backend in ("dequantize", "reference"):
        return backend
    if gpu.active(device):
        return "triton"
    return "native" if device.type == "cpu" and cpu.available() else "dequantize"


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
    wanted = _wanted(spec.weights, device)
    bits = {"int4": 4, "nvfp4": 4, "int8": 8, "fp8": 8, "none": 16}
    solved_for = spec.activations if spec.activations != "auto" else wanted
    return solved_for if bits[solved_for] > bits[wanted] else wanted


def svdquant_linear(
    x: Tensor,
    tensors: SVDQuantTensors,
    activations: str = "auto",
    gelu: bool = False,
    out: Tensor | None = None,
    low_scales: Tensor | None = None,
) -> Tensor:
    """y = Q(x/s)·Ŵᵀ + ((x·Dᵀ)·f)·Uᵀ + b, or its GELU (tanh).

    x [..., K] of a floating type, any leading dimensions, none of them required to be non-empty; returns [..., N] in
    x's type. out: [..., N] of x's type, written and returned instead. low_scales: f, float32 [R], one strength per
    direction of the branch, or [B, R], one line per entry of x's first dimension; None = ones. Row i depends on row i
    and its strengths alone, bit for bit. Raises `SVDQuantError` where K, out or low_scales does not fit.
    """
    if x.shape[-1] != tensors.in_features:
        raise SVDQuantError(f"input has {x.shape[-1]} features, the layer takes {tensors.in_features}")
    t = tensors
    if out is not None and (out.shape != (*x.shape[:-1], t.out_features) or out.dtype != x.dtype):
        wanted = f"{[*x.shape[:-1], t.out_features]} {x.dtype}"
        raise SVDQuantError(f"out is {list(out.shape)} {out.dtype}, the result {wanted}")
    if low_scales is not None:
        _check_low_scales(low_scales, x, t)
        if low_scales.dim() == x.dim() == 2:
            # Every row is a batch entry of its own.
            y = svdquant_linear(x[:, None], t, activations, gelu, None if out is None else out[:, None], low_scales)
            return y[:, 0] if out is None else out
    activations = resolve_activations(activations, t.spec, x.device)
    backend = backend_of(x.device)
    if backend == "triton" and eager.is_unwatched(x) and gpu.supports(t, activations, x.dtype, x.device):
        return gpu.svdquant_linear(x, t, activations, gelu, out, low_scales, share=low_scales is None)
    if backend == "native" and eager.is_plain(x) and cpu.supports(t, activations, x.dtype):
        if out is None:
            y = cpu.svdquant_linear(x, t, activations, gelu, low_scales=low_scales)
            return y.view(*x.shape[:-1], y.shape[-1])
        rows = eager.as_rows(out, x)
        if rows is not None:
            cpu.svdquant_linear(x, t, activations, gelu, rows, low_scales)
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
        low_scales,
    )
    if gelu:
        y = torch.nn.functional.gelu(y, approximate="tanh")
    return y if out is None else out.copy_(y)


def _check_low_scales(low_scales: Tensor, x: Tensor, t: SVDQuantTensors) -> None:
    """Raises `SVDQuantError` where strengths do not fit the branch, or the batch."""
    rank = 0 if t.proj_down is None else t.proj_down.shape[0]
    shapes = [[rank]] if x.dim() < 2 else [[rank], [x.shape[0], rank]]
    if list(low_scales.shape) not in shapes or low_scales.dtype != torch.float32:
        wanted = " or ".join(map(str, shapes))
        raise SVDQuantError(f"low_scales is {list(low_scales.shape)} {low_scales.dtype}, not {wanted} torch.float32")


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
    low_scales: Tensor | None = None,
) -> Tensor:
    segments = tuple(zip(unsigned[0::2], unsigned[1::2], strict=True))
    outer = 1 if wcscales is None or wcscales.dim() == 1 else wcscales.shape[1]
    spec = LayerSpec(weights=weights, group_size=group_size, unsigned=segments, rotate=rotate, outer_blocks=outer)
    tensors = SVDQuantTensors(spec, x.shape[-1], qweight, wscales, wcscales, smooth_factor, proj_down, proj_up, bias)
    rows = x.reshape(-1, x.shape[-1])
    backend = backend_of(x.device)
    if backend == "triton" and gpu.supports(tensors, activations, x.dtype, x.device):
        y = gpu.svdquant_linear(x, tensors, activations, low_scales=low_scales)
    elif backend == "native" and cpu.supports(tensors, activations, x.dtype):
        y = cpu.svdquant_linear(rows, tensors, activations, low_scales=low_scales)
    else:
        y = reference.svdquant_linear(rows, tensors, activations, compute_dtype(x, backend), low_scales)
    return y.reshape(*x.shape[:-1], qweight.shape[0])


@_linear.register_fake
def _(x: Tensor, qweight: Tensor, *_args: object) -> Tensor:
    return x.new_empty(*x.shape[:-1], qweight.shape[0])


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, qweight, wscales, wcscales, smooth_factor, proj_down, proj_up = inputs[:7]
    weights, group_size, _, rotate = inputs[8:12]
    ctx.save_for_backward(qweight, wscales, wcscales, smooth_factor, proj_down, proj_up, inputs[13])
    ctx.in_features = x.shape[-1]
    ctx.spec = LayerSpec(weights=weights, group_size=group_size, rotate=rotate)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Straight through the rounding of the activations: the gradient of the dense linear, to x only."""
    saved, low_scales = ctx.saved_tensors[:6], ctx.saved_tensors[6]
    grad32, nothing = grad.float(), [None] * 13
    if low_scales is None:
        weight, _ = SVDQuantTensors(ctx.spec, ctx.in_features, *saved).dense()
        return (grad32 @ weight).to(grad.dtype), *nothing
    weight, _ = SVDQuantTensors(ctx.spec, ctx.in_features, *saved[:4]).dense()
    down, up = saved[4:]
    if low_scales.dim() == 2:
        low_scales = low_scales.view(-1, *[1] * (grad.dim() - 2), low_scales.shape[-1])
    low = (grad32 @ up.float()) * low_scales
    return (grad32 @ weight + low @ down.float()).to(grad.dtype), *nothing


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
    backend = backend_of(x.device)
    if backend == "triton" and eager.is_unwatched(x) and gpu.supports_weight_only(qweight, wscales, x.dtype, weights):
        return gpu.w4a16_linear(x, qweight, wscales, bias, weights, wzeros)
    if backend == "native" and eager.is_plain(x) and cpu.supports_weight_only(qweight, wscales, x.dtype, weights):
        y = cpu.w4a16_linear(x, qweight, wscales, bias, weights, wzeros)
        return y.view(*x.shape[:-1], y.shape[-1])
    return torch.ops.svdquant.w4a16_linear(x, qweight, wscales, wzeros, bias, weights)


@torch.library.custom_op("svdquant::w4a16_linear", mutates_args=())
def _w4a16_linear(
    x: Tensor, qweight: Tensor, wscales: Tensor, wzeros: Tensor | None, bias: Tensor | None, weights: str
) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    backend = backend_of(x.device)
    if backend == "triton" and gpu.supports_weight_only(qweight, wscales, x.dtype, weights):
        y = gpu.w4a16_linear(rows, qweight, wscales, bias, weights, wzeros)
    elif backend == "native" and cpu.supports_weight_only(qweight, wscales, x.dtype, weights):
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
