"""torch's row-wise fp8 product of expanded weights, the low-rank branch as further columns of both operands.

    [X | a | a | a'] · [W | b | b' | b]ᵀ,   a + a' = low·c/sx,   b + b' = U/(c·sw)

where sx, sw are the scales of rows, and each factor is an e4m3 number plus its remainder: together as exact as
bfloat16. c, one number per direction, makes U's columns fill e4m3, whatever the rows of x; the scale of a row of x
whose `low` would not fit grows by a power of two. Weights are expanded with `HEADROOM`, which leaves the branch as much
room.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...numerics import SVDQuantTensors
from . import expand as expansion
from .arch import Arch
from .expand import expand, guard
from .types import NO_EPILOGUE, Epilogue, Quantized, Reading, Specialization

HEADROOM = 32.0
PARTS = 64
ROWS = 64
RANK = 32
# Row-wise products of some versions of torch read scales up to the end of a tile.
SCALES = 256


class ScaledMM:
    """`torch._scaled_mm` with one scale per row; bfloat16 only, as in all its versions.

    Which kernel multiplies is the library's choice and may depend on the number of rows: fp8 sums may then be rounded
    in another order, and a row's last bits depend on its batch. `EightBit` does not have that.
    """

    name = "scaled_mm"

    def why_not(self, t: SVDQuantTensors, activations: str, dtype: torch.dtype, arch: Arch) -> str | None:
        if activations != "fp8":
            return f"torch._scaled_mm multiplies fp8, not {activations}"
        if dtype != torch.bfloat16:
            return f"torch._scaled_mm with a scale per row returns bfloat16, not {dtype}"
        if not (arch.fp8_cores or arch.vendor == "interpreter"):
            return "this GPU has no fp8 tensor cores"
        if t.out_features % 16:
            return f"{t.out_features} outputs are no multiple of 16"
        return expansion.why_not(t)

    def reading(self, activations: str) -> Reading:
        return Reading("fp8")

    def fuses(self, epilogue: Epilogue, layers: Sequence[SVDQuantTensors]) -> bool:
        return epilogue.norm is None

    def multiply(
        self, q: Quantized, layers: Sequence[SVDQuantTensors], out: Tensor, epilogue: Epilogue = NO_EPILOGUE
    ) -> None:
        codes, row_scales, weight, scales, bias = operands(q, layers)
        arguments = (codes, weight.t(), row_scales[:, None], scales[None, :], bias)
        m, n = codes.shape[0], weight.shape[0]
        straight = out.is_contiguous()
        options = {"out_dtype": out.dtype, "use_fast_accum": True}
        with guard(out):
            if straight:
                torch._scaled_mm(*arguments, **options, out=out.view(m, n))
            else:
                out.copy_(torch._scaled_mm(*arguments, **options).view(out.shape))
            if epilogue.gelu:
                out.copy_(F.gelu(out, approximate="tanh"))

    def specializations(self) -> list[Specialization]:
        return _specializations()


def operands(q: Quantized, layers: Sequence[SVDQuantTensors]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """(codes e4m3 [M, C'], their scales [M], weight e4m3 [N, C'], its scales [N], bias) of one product."""
    branch = q.low is not None and layers[0].proj_up is not None
    rank = q.low.shape[1] if branch and q.low is not None else 0
    width = -(-rank // 16) * 16
    weights = expand(layers, "fp8", extra=3 * width, headroom=HEADROOM if rank else 1.0)
    bias = None if weights.bias is None else weights.bias.to(torch.bfloat16)
    codes, row_scales = q.codes, q.scales
    if rank:
        codes, row_scales = _append(q, weights, rank, width)
    return codes, _with_room(row_scales), weights.weight, _with_room(weights.scales), bias


def _with_room(scales: Tensor) -> Tensor:
    """float32 scales, followed by memory that may be read."""
    wide = scales.new_empty(-(-scales.shape[0] // SCALES) * SCALES, dtype=torch.float32)[: scales.shape[0]]
    return wide.copy_(scales)


def _append(q: Quantized, weights: expansion.Expanded, rank: int, width: int) -> tuple[Tensor, Tensor]:
    """Writes the branch's columns of the weight; returns the input with its own, and its scales."""
    from .scaled_mm_kernel import append_low_kernel, append_up_kernel, largest_kernel

    m, columns = q.codes.shape
    n, stride = weights.weight.shape
    # A power of two, as the kernel's blocks are.
    parts = min(PARTS, 1 << (-(-n // ROWS) - 1).bit_length())
    partial = q.scales.new_empty((parts, rank))
    balance = q.scales.new_empty(rank)
    wide = q.codes.new_empty((m, stride))
    scales = torch.empty_like(q.scales)
    blocks = -(-width // RANK)
    with guard(q.codes):
        largest_kernel[(parts, -(-rank // RANK))](
            weights.up, weights.scales, partial, n, rank, PARTS=parts, ROWS=ROWS, RANK=RANK
        )
        append_up_kernel[(-(-n // ROWS), blocks)](
            weights.up, weights.scales, partial, balance, weights.weight, n, rank, width, columns, stride,
            PARTS=parts, ROWS=ROWS, RANK=RANK,
        )  # fmt: skip
        append_low_kernel[(-(-m // 4),)](
            q.codes, q.scales, q.low, balance, wide, scales, m, rank, width, columns, stride,
            ROWS=4, COLUMNS=1024, RANK=RANK,
        )  # fmt: skip
    return wide, scales


def _specializations() -> list[Specialization]:
    from .scaled_mm_kernel import append_low_kernel, append_up_kernel, largest_kernel

    chips: dict[int, tuple[str, ...]] = dict.fromkeys((89, 90, 100, 120), ())
    types = {
        "up": "*bf16", "low": "*bf16", "scales": "*fp32", "partial": "*fp32", "balance": "*fp32", "row_scales": "*fp32",
        "codes": "*fp8e4nv", "wide": "*fp8e4nv", "weight": "*fp8e4nv",
    } | dict.fromkeys(("M", "N", "rank", "width", "columns", "stride"), "i32")  # fmt: skip
    found = []
    for kernel, constants in (
        (largest_kernel, {"PARTS": PARTS, "ROWS": ROWS, "RANK": RANK}),
        (append_up_kernel, {"PARTS": PARTS, "ROWS": ROWS, "RANK": RANK}),
        (append_low_kernel, {"ROWS": 4, "COLUMNS": 1024, "RANK": RANK}),
    ):
        names = [name for name in kernel.arg_names if name not in constants]
        found.append(
            Specialization(
                name=f"scaled_mm {kernel.fn.__name__}",
                kernel=kernel,
                signature={name: types[name] for name in names},
                constants=constants,
                num_warps=4,
                num_stages=3,
                expects=chips,
                aligned=tuple(name for name in names if name in ("rank", "width", "columns", "stride", "N")),
            )
        )
    return found
