"""Quantizing an input for the products of a GPU, together with its low-rank down-projection: one launch."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from ...numerics import SVDQuantTensors, padded_columns
from .arch import arch_of
from .quantize_kernels import down_kernel, quantize_kernel
from .types import Before, Quantized, Reading, Specialization, columns_of

HALVES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
KINDS = ("none", "layer_norm", "gelu", "geglu", "swiglu")
GLU = ("geglu", "swiglu")
# Larger ranks are projected by a kernel of their own.
FUSED_RANK = 128
WARPS = 8
# NVIDIA's assembler would rather spill a register than have more than 80, for programs that are not there.
REGISTERS = 128
DOWN_TILE = {"BM": 64, "BN": 64, "BK": 64}
DOWN_WARPS, DOWN_STAGES = 4, 4


@dataclass(frozen=True)
class Form:
    """What the compiled kernel depends on, besides types and which tensors are there.

    ranges: edges of the columns with unsigned int4 codes, None without. columns, padded: K and C. boundary: K of the
    first of two inputs, else 0. few: rows are too few for tall tiles to occupy the chip. vendor: as in `Arch`.
    """

    kind: str
    reading: Reading
    rotate: bool
    ranges: tuple[int, ...] | None
    rank: int
    columns: int
    padded: int
    boundary: int
    few: bool = False
    vendor: str = "nvidia"


@lru_cache(maxsize=4096)
def constants_of(form: Form) -> dict[str, Any]:
    """The kernel's compile-time arguments.

    `few` only decides how many rows a tile has. A row's columns lie with the same threads in both, and are summed in
    the same order.
    """
    # Tiles of D and x fit into 100 KB of shared memory as often as loads are ahead; a rotation takes 128 columns;
    # a tile lies in one input.
    narrow = not form.rotate and (form.rank > 64 or form.boundary % 128 != 0)
    tile = 64 if narrow else 128
    even = form.columns == form.padded
    ranks = max(16, triton.next_power_of_2(form.rank)) if form.rank else 0
    return {
        "KIND": form.kind,
        "PRECISION": form.reading.precision,
        "PACKED": form.reading.packed,
        "SPLIT": form.reading.split,
        "ROTATE": form.rotate,
        "RANGES": form.ranges,
        "RANKS": ranks,
        "WHOLE": even and form.rank == ranks,
        "EVEN": even,
        "BM": 16 if form.few and not narrow else 32,
        "BK": tile,
        "STAGES": 4 if ranks <= 32 or narrow else 3 if ranks <= 64 else 2,
        "PTX": form.vendor == "nvidia",
    }


def quantize(
    x: Tensor,
    t: SVDQuantTensors,
    reading: Reading,
    before: Before | None = None,
    second: Tensor | None = None,
    proj_down: Tensor | None = None,
    low_scales: Tensor | None = None,
) -> Quantized:
    """Codes and scales of x/s as `reading` asks for them, and x·Dᵀ of the raw x.

    x: bfloat16 or float16 [B, L, K] ([B, L, 2K] before a GLU), any strides; second: [B, L, K2], the columns that follow
    x's (then nothing may come before). proj_down: [R, K], in place of the layer's own. low_scales: float32 [R] or
    [B, R], multiplies x·Dᵀ before it is rounded. int4 groups have 64 channels whatever the weight's have.

    int4 and nvfp4 codes without rotation are those of the reference, bit for bit, where values are not below 1e-20.
    8-bit codes are products with reciprocals of s and of the token's scale, so that one may be the next where a value
    lies between two. A row's bits depend on nothing but the row. Raises ValueError where shapes or types do not fit.
    """
    before = Before() if before is None else before
    down = t.proj_down if proj_down is None else proj_down
    arch = arch_of(x.device)
    if arch is None:
        raise ValueError(f"no Triton kernel runs on {x.device}")
    _check(x, t, reading, before, second, down)
    x, second, down, smooth = _dense(x), *(None if v is None else _dense(v) for v in (second, down, t.smooth_factor))
    if second is not None and (x.shape[2] % 64 or (t.spec.rotate and x.shape[2] % 128)):
        x, second = torch.cat((x, second), -1), None
    batch, tokens = x.shape[:2]
    columns, m = t.in_features, batch * tokens
    padded = columns_of(padded_columns(columns, t.spec))
    rank = 0 if down is None else down.shape[0]
    q = _empty(x, reading, batch, tokens, padded, rank)
    if m == 0:
        return q

    fused = rank <= FUSED_RANK
    boundary = 0 if second is None else x.shape[2]
    form = Form(
        before.kind, reading, t.spec.rotate, _unsigned(t, reading), rank if fused else 0, columns, padded, boundary,
        m < 32 * arch.units, arch.vendor,
    )  # fmt: skip
    constants = constants_of(form)
    # What a projection of its own reads, if that is not simply x.
    kept = None if fused or (before.kind == "none" and second is None) else x.new_empty(m, columns)
    low_scales = None if low_scales is None or down is None else _dense(low_scales.float())
    per_batch = before.kind == "layer_norm" or (low_scales is not None and low_scales.dim() == 2)
    rows = (batch, tokens) if per_batch or not all(_flat(v) for v in (x, second)) else (1, m)
    factor, offset = (None if v is None else _dense(v).expand(batch, -1) for v in (before.scale, before.shift))
    limit = {"maxnreg": REGISTERS} if arch.vendor == "nvidia" else {}
    with on(x.device):
        quantize_kernel[(rows[0] * triton.cdiv(rows[1], constants["BM"]),)](
            x, second, smooth, factor, offset, down if fused else None, low_scales if fused else None,
            _bits(q.codes), _bits(q.scales), q.low if fused else None, kept,
            *_strides(x, rows), *_strides(second, rows), _batch_stride(factor), _batch_stride(offset),
            0 if down is None else down.stride(0), _batch_stride(low_scales),
            rows[1], columns, boundary, padded, rank, float(before.eps), torch.finfo(x.dtype).max,
            **constants, num_warps=WARPS, **limit,
        )  # fmt: skip
        if not fused and down is not None:
            source = x.reshape(m, columns) if kept is None else kept
            tiles = triton.cdiv(m, DOWN_TILE["BM"]) * triton.cdiv(rank, DOWN_TILE["BN"])
            down_kernel[(tiles,)](
                source, down, low_scales, q.low, source.stride(0), down.stride(0), _batch_stride(low_scales),
                m, tokens, columns, rank, **DOWN_TILE, num_warps=DOWN_WARPS, num_stages=DOWN_STAGES, **limit,
            )  # fmt: skip
    return q


def on(device: torch.device) -> AbstractContextManager[None]:
    """Makes a tensor's GPU the current one, on which Triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _check(
    x: Tensor, t: SVDQuantTensors, reading: Reading, before: Before, second: Tensor | None, down: Tensor | None
) -> None:
    if before.kind not in KINDS:
        raise ValueError(f"nothing is known as {before.kind!r} before a quantized linear")
    if x.dtype not in HALVES or x.dim() != 3:
        raise ValueError(f"a quantized input is [B, L, K] in bfloat16 or float16, not {tuple(x.shape)} in {x.dtype}")
    width = x.shape[2] // (2 if before.kind in GLU else 1)
    if second is not None:
        if before.kind != "none":
            raise ValueError(f"{before.kind} is not applied to an input of two parts")
        if second.shape[:2] != x.shape[:2] or second.dtype != x.dtype:
            raise ValueError(f"the parts of an input are alike, not {tuple(x.shape)} and {tuple(second.shape)}")
        width += second.shape[2]
    if width != t.in_features:
        raise ValueError(f"the layer takes {t.in_features} features, not {width}")
    if before.kind == "layer_norm" and (before.scale is None or before.shift is None):
        raise ValueError("a modulated normalization needs scale and shift")
    if down is not None and down.shape[1] != t.in_features:
        raise ValueError(f"a branch takes {t.in_features} features, not {tuple(down.shape)}")
    allowed = {"int8": (False,), "fp8": (False,), "int4": (False, True), "nvfp4": (True,)}
    if reading.packed not in allowed.get(reading.precision, ()) or (reading.packed and reading.split):
        raise ValueError(f"no quantizer makes {reading}")


def _unsigned(t: SVDQuantTensors, reading: Reading) -> tuple[int, ...] | None:
    if reading.precision != "int4" or not t.spec.unsigned:
        return None
    return tuple(edge for segment in t.spec.unsigned for edge in segment)


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _flat(x: Tensor | None) -> bool:
    """Whether all rows of x [B, L, K] have one distance."""
    return x is None or x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)


def _strides(x: Tensor | None, rows: tuple[int, int]) -> tuple[int, int]:
    """Of batch rows and tokens. Where there is one of them its stride means nothing, and may be anything.

    Kernels are compiled for strides of multiples of 16 and for others, and may sum in another order.
    """
    if x is None:
        return 0, 0
    return (x.stride(0) if rows[0] > 1 else x.shape[2], x.stride(1) if rows[1] > 1 else x.shape[2])


def _batch_stride(v: Tensor | None) -> int:
    return v.stride(0) if v is not None and v.dim() == 2 and v.shape[0] > 1 else 0


def _bits(v: Tensor) -> Tensor:
    return v.view(torch.uint8) if v.dtype == torch.float8_e4m3fn else v


def _empty(x: Tensor, reading: Reading, batch: int, tokens: int, padded: int, rank: int) -> Quantized:
    m = batch * tokens
    e4m3 = torch.float8_e4m3fn
    kind = torch.uint8 if reading.packed else e4m3 if reading.precision == "fp8" else torch.int8
    codes = x.new_empty((m, padded // 2 if reading.packed else padded), dtype=kind)
    if reading.precision == "int4":
        scales = x.new_empty((m, padded // 64), dtype=torch.float32)
    elif reading.precision == "nvfp4":
        scales = x.new_empty((m, padded // 16), dtype=e4m3)
    else:
        scales = x.new_empty((m,), dtype=torch.float32)
    return Quantized(reading, batch, tokens, codes, scales, x.new_empty((m, rank)) if rank else None)


def specializations() -> list[Specialization]:
    """What default runs compile: layers with smoothing whose inputs are multiples of 128 wide."""
    readings = [Reading("int8"), Reading("fp8"), Reading("int4", packed=True), Reading("nvfp4", packed=True)]
    orders = [Reading("int8", split=True), Reading("fp8", split=True), Reading("int4"), Reading("int4", split=True)]
    forms = []
    for reading in readings:
        usual = Form("none", reading, False, None, 32, 3072, 3072, 0)
        forms += [replace(usual, rank=rank) for rank in (0, 32, 64, 128)]
        forms += [replace(usual, kind=kind) for kind in KINDS[1:]]
        forms += [replace(usual, few=True), replace(usual, few=True, kind="layer_norm")]
        forms += [replace(usual, rotate=True), replace(usual, boundary=3072, columns=15360, padded=15360)]
    forms += [Form("none", reading, False, None, 32, 3072, 3072, 0) for reading in orders]
    unsigned = Form("none", Reading("int4", packed=True), False, (0, 12288), 32, 12288, 12288, 0)
    forms += [unsigned, replace(unsigned, kind="gelu")]
    forms += [replace(unsigned, ranges=(3072, 15360), columns=15360, padded=15360, boundary=3072)]
    amd = [replace(f, vendor="amd") for f in forms if f.reading.precision in ("int8", "int4") and not f.ranges]
    found = [_specialization(form, "bf16") for form in forms]
    found += [_specialization(form, "fp16") for form in forms if form.kind == "none" and not form.rotate]
    found += [_specialization(form, "bf16") for form in amd if form.rank == 32]
    return [*found, *(_down_specialization(half) for half in HALVES.values())]


def _specialization(form: Form, half: str) -> Specialization:
    x = f"*{half}"
    bits = "*u8" if form.reading.packed or form.reading.precision == "fp8" else "*i8"
    signature = dict.fromkeys(("x", "second", "smooth", "factor", "offset", "down", "low", "kept"), x)
    signature |= {"low_scales": "*fp32", "codes": bits, "eps": "fp32", "largest": "fp32", "tokens": "i32"}
    signature["scales"] = "*u8" if form.reading.precision == "nvfp4" else "*fp32"
    aligned = (
        "x_batch", "x_row", "second_batch", "second_row", "factor_batch", "offset_batch", "down_row",
        "low_scales_batch", "k", "k1", "c", "r",
    )  # fmt: skip
    signature |= dict.fromkeys(aligned, "i32")
    absent = ["low_scales", "kept"]
    absent += [] if form.boundary else ["second"]
    absent += [] if form.kind == "layer_norm" else ["factor", "offset"]
    absent += [] if form.rank else ["down", "low"]
    constants = constants_of(form) | dict.fromkeys(absent)
    machine: tuple[str, ...] = () if form.vendor == "amd" else ("HMMA",) if form.rank else ("STG",)
    words = [
        form.reading.precision,
        "packed" * form.reading.packed,
        "split" * form.reading.split,
        form.kind,
        form.vendor * (form.vendor != "nvidia"),
    ]
    words += ["rotate" * form.rotate, "unsigned" * bool(form.ranges), "second" * bool(form.boundary), "few" * form.few]
    return Specialization(
        name=" ".join(["quantize", *filter(None, words), f"rank {form.rank}", half]),
        kernel=quantize_kernel,
        signature={name: kind for name, kind in signature.items() if name not in constants},
        constants=constants,
        num_warps=WARPS,
        num_stages=3,
        expects=dict.fromkeys(_meant_for(form), machine),
        aligned=aligned,
        maxnreg=REGISTERS if form.vendor == "nvidia" else None,
    )


def _meant_for(form: Form) -> tuple[int, ...]:
    """sm numbers, and AMD's gfx942."""
    if form.vendor == "amd":
        return (942,)
    if form.reading.precision == "nvfp4":
        return (100, 120)
    return (89, 90, 100, 120) if form.reading.precision == "fp8" else (80, 86, 89, 90, 100, 120)


def _down_specialization(half: str) -> Specialization:
    aligned = ("x_row", "down_row", "low_scales_batch", "k", "r")
    signature = dict.fromkeys(("x", "down", "low"), f"*{half}") | dict.fromkeys((*aligned, "m", "tokens"), "i32")
    expects: dict[int, tuple[str, ...]] = {
        80: ("HMMA",),
        86: ("HMMA",),
        89: ("HMMA",),
        90: ("HGMMA",),
        100: ("UTCHMMA",),
        120: ("HMMA",),
    }
    constants = {"low_scales": None, **DOWN_TILE}
    return Specialization(
        f"down {half}", down_kernel, signature, constants, DOWN_WARPS, DOWN_STAGES, expects, False, aligned, REGISTERS
    )
