"""Launches of `hopper_kernel`, the Gluon twin of `eight_bit_kernel`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from .expand import Expanded, guard
from .types import Quantized, Specialization

if TYPE_CHECKING:
    from .eight_bit import Tile


def launch(config: Tile, q: Quantized, weights: Expanded, out: Tensor, gelu: bool) -> None:
    """`eight_bit.multiply_with` for a tile that is `gluon`."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from .hopper_kernel import hopper_kernel

    m, columns = q.codes.shape
    n, stride = weights.weight.shape[0], weights.weight.stride(0)
    precision = q.reading.precision
    a, b = [config.bm, config.bk], [config.bn, config.bk]
    rank = 0 if weights.up is None else weights.up.shape[1]
    with guard(out):
        hopper_kernel[(-(-m // config.bm) * -(-n // config.bn),)](
            TensorDescriptor(q.codes, [m, columns], [columns, 1], a, _layout(a, precision)),
            TensorDescriptor(weights.weight, [n, columns], [stride, 1], b, _layout(b, precision)),
            q.scales,
            weights.scales,
            weights.bias,
            None if weights.up is None else q.low,
            weights.up,
            out,
            m,
            n,
            columns,
            rank,
            q.tokens,
            out.stride(0),
            out.stride(1),
            FP8=precision == "fp8",
            GELU=gelu,
            **_sizes(config, rank),
            num_warps=config.warps,
        )


def _layout(block: list[int], precision: str) -> Any:
    from triton.experimental.gluon import language as gl

    return gl.NVMMASharedLayout.get_default_for(block, gl.float8e4nv if precision == "fp8" else gl.int8)


def _sizes(config: Tile, rank: int) -> dict[str, Any]:
    sizes = {"BM": config.bm, "BN": config.bn, "BK": config.bk, "GROUP": config.group, "STAGES": config.stages}
    return sizes | {"WARPS": config.warps, "RANK": 16 if rank <= 16 else 32}


def specialization(name: str, config: Tile, precision: str, dtype: str, gelu: bool) -> Specialization:
    """The kernel for a launch, with branch and bias."""
    from .hopper_kernel import hopper_kernel

    eight = "fp8e4nv" if precision == "fp8" else "i8"
    a, b = [config.bm, config.bk], [config.bn, config.bk]
    operands = {
        "codes": f"tensordesc<{eight}{a},{_layout(a, precision)!r}>",
        "weight": f"tensordesc<{eight}{b},{_layout(b, precision)!r}>",
    }
    pointers = dict.fromkeys(("row_scales", "scales", "bias"), "*fp32")
    pointers |= dict.fromkeys(("low", "up", "out"), f"*{dtype}")
    numbers = ("M", "N", "columns", "rank", "length", "batch_stride", "token_stride")
    return Specialization(
        name=name,
        kernel=hopper_kernel,
        signature=operands | pointers | dict.fromkeys(numbers, "i32"),
        constants=_sizes(config, 32) | {"FP8": precision == "fp8", "GELU": gelu},
        num_warps=config.warps,
        num_stages=config.stages,
        expects={90: ("QGMMA",) if precision == "fp8" else ("IGMMA",)},
        gluon=True,
        aligned=("N", "columns", "rank", "batch_stride", "token_stride"),
    )
