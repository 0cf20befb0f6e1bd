"""Stored weights as 8-bit ones with one scale per row, made anew for each product in memory that the next one reuses.

What a 4-bit layer costs beside its product: its bytes read once, twice as many written. Reused at once, they mostly
come from the second-level cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...numerics import GELU_SHIFT, SVDQuantTensors
from .arch import Arch, arch_of
from .types import Specialization, columns_of


@dataclass(frozen=True)
class Expanded:
    """Layers side by side, as 8-bit products read them.

    weight: int8 or float8_e4m3fn [ΣN, C or more], zero in columns from Kp to C; rows begin at multiples of 16 bytes.
    scales: [ΣN]; weight·scale is Ŵ up to the rounding to 8 bits. bias: [ΣN], with Ŵ·(shift/s) of unsigned inputs, or
    None. up: [ΣN, R] or None. Scales and bias are float32, or a parameter itself.
    """

    weight: Tensor
    scales: Tensor
    bias: Tensor | None
    up: Tensor | None


@dataclass(frozen=True)
class Launch:
    rows: int
    columns: int
    warps: int


def launch_shape(arch: Arch | None, n: int) -> Launch:
    """Rows and columns that a program turns at a time."""
    if arch is not None and arch.vendor == "interpreter":
        return Launch(rows=128, columns=256, warps=4)
    return Launch(rows=4 if n >= 1024 else 1, columns=1024, warps=4)


def guard(x: Tensor) -> Any:
    """Kernels are launched on the current device, which need not be the tensors'."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def why_not(t: SVDQuantTensors) -> str | None:
    """Why a layer cannot be expanded."""
    if t.wzeros is not None:
        return "weights with zero points are for W4A16 layers only"
    if t.spec.weights in ("int4", "nvfp4") and (t.spec.group_size == 0 or t.spec.group_size % 16):
        return f"groups of {t.spec.group_size} 4-bit weights are no multiple of 16"
    return None


def taken_as_it_is(t: SVDQuantTensors, precision: str) -> bool:
    """Whether the stored weight is what an int8 product reads."""
    q = t.qweight
    plain = t.spec.weights == precision == "int8" and t.wscales.shape[1] == 1
    return (
        plain
        and not t.spec.unsigned
        and columns_of(q.shape[1]) == q.shape[1]
        and q.is_contiguous()
        and q.data_ptr() % 16 == 0
    )


def expand(
    layers: Sequence[SVDQuantTensors], precision: str, extra: int = 0, headroom: float = 1.0
) -> Expanded:  # fmt: skip
    """8-bit weights of layers that read one input, stacked over their outputs. precision: "int8" or "fp8".

    extra: columns left unwritten behind the C. headroom: how much larger scales are than they could be.
    Raises ValueError where `why_not` says that a layer cannot be.
    """
    first = layers[0]
    if len(layers) == 1 and not extra and headroom == 1 and taken_as_it_is(first, precision):
        return Expanded(first.qweight, first.wscales.view(-1), dense(first.bias), dense(first.proj_up))
    rows = sum(t.out_features for t in layers)
    columns = columns_of(_stored_columns(first))
    weight = first.qweight.new_empty((rows, columns + extra), dtype=torch.int8)
    scales = weight.new_empty(rows, dtype=torch.float32)
    wanted = any(t.bias is not None for t in layers) or bool(first.spec.unsigned)
    bias = torch.empty_like(scales) if wanted else None
    up = dense(first.proj_up)
    if up is not None and len(layers) > 1:
        up = up.new_empty((rows, up.shape[1]))
    start = 0
    for t in layers:
        part = slice(start, start + t.out_features)
        _launch(
            t, precision, weight[part], scales[part],
            None if bias is None else bias[part], None if up is None or len(layers) == 1 else up[part], headroom,
        )  # fmt: skip
        start += t.out_features
    return Expanded(weight if precision == "int8" else weight.view(torch.float8_e4m3fn), scales, bias, up)


def effective_bias(t: SVDQuantTensors) -> Tensor:
    """float32 [N]: the bias, and Ŵ·(shift/s) where 4-bit codes of the input would be shifted and others are not."""
    if not t.spec.unsigned:
        return t.qweight.new_zeros(t.out_features, dtype=torch.float32) if t.bias is None else t.bias.float()
    bias = t.qweight.new_empty(t.out_features, dtype=torch.float32)
    _launch(t, "int8", None, None, bias, None)
    return bias


def dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _stored_columns(t: SVDQuantTensors) -> int:
    return t.qweight.shape[1] * (1 if t.spec.weights == "int8" else 2)


def _launch(
    t: SVDQuantTensors, precision: str, weight: Tensor | None, scales: Tensor | None, bias: Tensor | None,
    up: Tensor | None, headroom: float = 1.0,
) -> None:  # fmt: skip
    """One layer into its rows of the stack; what is None is not computed."""
    reason = why_not(t)
    if reason is not None:
        raise ValueError(reason)
    from . import expand_kernel

    arch = arch_of(t.qweight.device)
    shape = launch_shape(arch, t.out_features)
    stored = t.qweight.contiguous()
    four = t.spec.weights != "int8"
    wscales = t.wscales.contiguous()
    outer, smooth, given_bias = (dense(v) for v in (t.wcscales, t.smooth_factor, t.bias))
    source_up = None if up is None else dense(t.proj_up)
    columns = columns_of(_stored_columns(t))
    constants = _constants(t, precision, arch, shape, weight is not None, bias is not None, up is not None)
    constants["TOP"] /= headroom
    with guard(stored):
        expand_kernel.expand_kernel[(-(-t.out_features // shape.rows),)](
            stored.view(torch.int32) if four else stored,
            wscales.view(torch.uint8) if wscales.dtype == torch.float8_e4m3fn else wscales,
            outer,
            smooth if constants["UNSIGNED"] else None,
            given_bias,
            source_up,
            weight if weight is None or not four else weight.view(torch.int64),
            scales,
            bias,
            up,
            t.out_features,
            _stored_columns(t),
            columns,
            t.wscales.shape[1],
            0 if weight is None else weight.stride(0),
            0 if up is None else up.shape[1],
            **constants,
            num_warps=shape.warps,
        )


def _constants(
    t: SVDQuantTensors, precision: str, arch: Arch | None, shape: Launch, weight: bool, bias: bool, up: bool
) -> dict[str, Any]:
    from .unpack import TOP

    spec = t.spec
    four = spec.weights != "int8"
    group = spec.group_size or _stored_columns(t)
    # A group in parts of a power of two; parts of stored int8 are single codes.
    part = min(group & -group, 128)
    return {
        "WEIGHTS": spec.weights,
        "FP8": precision == "fp8",
        "TOP": TOP[spec.weights, precision],
        "GROUP": group if four or spec.group_size else 0,
        "PART": part if four else 1,
        "BLOCKS": 0 if t.wcscales is None else t.wcscales.numel() // t.out_features,
        "UNSIGNED": tuple(spec.unsigned) if bias else (),
        "SHIFT": GELU_SHIFT,
        "WEIGHT": weight,
        "BIAS": bias,
        "UP": up,
        "PTX": arch is not None and arch.vendor == "nvidia",
        "ROWS": shape.rows,
        "COLUMNS": shape.columns,
    }


def specializations() -> list[Specialization]:
    """Expansion of FLUX' layers to int8 (every chip) and to e4m3 (where there is one)."""
    from . import expand_kernel, unpack

    found = []
    for weights, precision, unsigned, up in (
        ("int4", "int8", (), False),
        ("int4", "int8", (), True),
        ("int4", "int8", ((3072, 15360),), False),
        ("nvfp4", "int8", (), False),
        ("int4", "fp8", (), False),
        ("nvfp4", "fp8", (), True),
    ):
        shape = launch_shape(None, 3072)
        group = 64 if weights == "int4" else 16
        pointers = {
            "stored": "*i32", "wscales": "*bf16" if weights == "int4" else "*u8", "outer": "*bf16", "smooth": "*bf16",
            "bias": "*bf16", "source_up": "*bf16", "weight": "*i64", "scales": "*fp32", "out_bias": "*fp32",
            "up": "*bf16",
        }  # fmt: skip
        numbers = dict.fromkeys(("N", "stored_columns", "columns", "groups", "stride", "rank"), "i32")
        absent = {} if up else {"source_up": None, "up": None}
        if weights == "int4":
            absent["outer"] = None
        if not unsigned:
            absent["smooth"] = None
        constants = {
            "WEIGHTS": weights, "FP8": precision == "fp8", "TOP": unpack.TOP[weights, precision], "GROUP": group,
            "PART": group, "BLOCKS": int(weights == "nvfp4"), "UNSIGNED": unsigned, "SHIFT": GELU_SHIFT, "WEIGHT": True,
            "BIAS": True, "UP": up, "PTX": True, "ROWS": shape.rows, "COLUMNS": shape.columns,
        }  # fmt: skip
        chips = (80, 86, 89, 90, 100, 120) if precision == "int8" else (89, 90, 100, 120)
        found.append(
            Specialization(
                name=f"expand {weights} to {precision}{' unsigned' if unsigned else ''}{' stacked' if up else ''}",
                kernel=expand_kernel.expand_kernel,
                signature={k: v for k, v in (pointers | numbers).items() if k not in absent},
                constants=constants | absent,
                num_warps=shape.warps,
                num_stages=3,
                expects=dict.fromkeys(chips, ()),
                aligned=("N", "stored_columns", "columns", "groups", "stride", "rank"),
            )
        )
    return found
