"""The operations between products, on a GPU; `kernels.fused` defines them. float32 inside, one rounding."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
import triton
from torch import Tensor

from .elementwise_kernels import gate_add_kernel, norm_modulate_kernel, norm_rotate_kernel
from .quantize import HALVES, on
from .types import Specialization

TESTED = (80, 86, 89, 90, 100, 120)


def norm_modulate(x: Tensor, factor: Tensor, offset: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """layer_norm(x)·factor + offset.

    x: 16-bit [B, L, K], any strides; factor, offset: float32 [B or 1, K]. out: like x, or x itself, features side by
    side; a new tensor otherwise. Returns out.
    """
    x = _dense(x)
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    batch, tokens, k = x.shape
    if out.numel() == 0:
        return out
    factor, offset = _per_batch(factor, batch), _per_batch(offset, batch)
    tile, warps = norm_modulate_tile(k)
    with on(x.device):
        norm_modulate_kernel[(batch * triton.cdiv(tokens, tile["ROWS"]),)](
            x, factor, offset, out, *x.stride()[:2], factor.stride(0), offset.stride(0), *out.stride()[:2],
            tokens, k, eps, **tile, num_warps=warps,
        )  # fmt: skip
    return out


def norm_rotate(
    x: Tensor, weight: Tensor | None, eps: float, cosine: Tensor | None, sine: Tensor | None, out: Tensor
) -> None:
    """rms_norm(x)·weight of every head, its pairs (2i, 2i+1) rotated, into out.

    x, out: 16-bit [B, L, H, D], any strides, out's features side by side; out may be x. weight: [D] or None. cosine,
    sine: float32 [L, D] with D even, or both None.
    """
    if out.numel() == 0:
        return
    x = _dense(x)
    batch, tokens, heads, d = x.shape
    weight, cosine, sine = (None if v is None else v.contiguous() for v in (weight, cosine, sine))
    tile, warps = norm_rotate_tile(heads, d)
    with on(x.device):
        norm_rotate_kernel[(batch * tokens * triton.cdiv(heads, tile["HEADS"]),)](
            x, weight, cosine, sine, out, *x.stride()[:3], *out.stride()[:3], 0 if cosine is None else d,
            tokens, heads, d, eps, **tile, num_warps=warps,
        )  # fmt: skip


def gate_add(residual: Tensor, gate: Tensor, x: Tensor, out: Tensor) -> None:
    """residual + gate·x into out, in float16 limited to ±65504.

    residual, x, out: 16-bit [B, L, K], any strides, out's features side by side; out may be x or residual. gate:
    float32 [B or 1, K].
    """
    if out.numel() == 0:
        return
    residual, x = _dense(residual), _dense(x)
    batch, tokens, k = x.shape
    gate = _per_batch(gate, batch)
    programs = batch * triton.cdiv(tokens, GATE_ADD_TILE["ROWS"]) * triton.cdiv(k, GATE_ADD_TILE["BK"])
    with on(x.device):
        gate_add_kernel[(programs,)](
            residual, gate, x, out, *residual.stride()[:2], gate.stride(0), *x.stride()[:2], *out.stride()[:2],
            tokens, k, **GATE_ADD_TILE, num_warps=4,
        )  # fmt: skip


GATE_ADD_TILE = {"ROWS": 4, "BK": 512}


def norm_modulate_tile(k: int) -> tuple[dict[str, int], int]:
    """Tile and warps: the whole row in registers, 16 columns per thread; factor and offset serve several rows."""
    columns = max(triton.next_power_of_2(k), 128)
    return {"ROWS": 4, "BK": columns}, min(max(columns // 512, 1), 16)


def norm_rotate_tile(heads: int, d: int) -> tuple[dict[str, int], int]:
    features = max(triton.next_power_of_2(d), 2)
    block = max(min(triton.next_power_of_2(heads), 4096 // features), 1)
    return {"HEADS": block, "BD": features}, min(max(block * features // 512, 1), 8)


def specializations() -> list[Specialization]:
    """What transformers of 3072 features and heads of 128 compile, and of Wan's 5120 with a norm across the heads."""
    forms = []
    for half, (heads, d), rotary in product(HALVES.values(), ((24, 128), (1, 5120)), (True, False)):
        tile, warps = norm_rotate_tile(heads, d)
        pointers = {"x": f"*{half}", "weight": f"*{half}", "cosine": "*fp32", "sine": "*fp32", "out": f"*{half}"}
        absent: dict[str, Any] = {} if rotary else {"cosine": None, "sine": None}
        strides = ("x_batch", "x_row", "x_head", "out_batch", "out_row", "out_head", "rotary_row", "d")
        numbers = dict.fromkeys((*strides, "tokens", "heads"), "i32") | {"eps": "fp32"}
        name = f"norm_rotate {half} {heads}x{d}{' rotary' if rotary else ''}"
        forms.append(_form(name, norm_rotate_kernel, pointers | numbers, tile | absent, warps, strides))
    for half in HALVES.values():
        tile, warps = norm_modulate_tile(3072)
        pointers = {"x": f"*{half}", "factor": "*fp32", "offset": "*fp32", "out": f"*{half}"}
        rows = ("x_batch", "x_row", "factor_batch", "offset_batch", "out_batch", "out_row", "k")
        numbers = dict.fromkeys((*rows, "tokens"), "i32") | {"eps": "fp32"}
        forms.append(_form(f"norm_modulate {half}", norm_modulate_kernel, pointers | numbers, tile, warps, rows))
        pointers = {"residual": f"*{half}", "gate": "*fp32", "x": f"*{half}", "out": f"*{half}"}
        strides = ("residual_batch", "residual_row", "gate_batch", "x_batch", "x_row", "out_batch", "out_row", "k")
        numbers = dict.fromkeys((*strides, "tokens"), "i32")
        forms.append(_form(f"gate_add {half}", gate_add_kernel, pointers | numbers, GATE_ADD_TILE, 4, strides))
    return forms


def _form(
    name: str, kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int, aligned: tuple[str, ...]
) -> Specialization:
    signature = {key: value for key, value in types.items() if key not in constants}
    return Specialization(name, kernel, signature, constants, warps, 3, dict.fromkeys(TESTED, ("LDG",)), False, aligned)


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _per_batch(v: Tensor, batch: int) -> Tensor:
    """[B or 1, K] as [B, K], features side by side."""
    return _dense(v.float()).expand(batch, -1)
