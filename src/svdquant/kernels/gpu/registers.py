"""Yᵀ = W·Xᵀ with 4-bit weights that become 8-bit ones in registers: no copy of them in memory at all.

Weights are the first operand because that is the one Hopper's tensor cores read from registers. A byte's low nibble
holds an even column, its high nibble an odd one, so that inputs come in split order and nothing is shuffled. The
8-bit codes are those of `expand`, bit for bit; so are int8 sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...numerics import SVDQuantTensors
from .arch import Arch, arch_of
from .expand import dense, effective_bias, guard
from .types import NO_EPILOGUE, Epilogue, Quantized, Reading, Specialization


@dataclass(frozen=True)
class Tile:
    """A launch: bm rows of x by bn outputs; `group` rows of tiles together."""

    bm: int
    bn: int = 128
    group: int = 8
    warps: int = 4
    stages: int = 3


# Hopper's alternatives, to be timed on the device. The first is `tile`'s choice for many rows.
CANDIDATES: dict[str, Tile] = {
    "128x128": Tile(128),
    "128x128 w8": Tile(128, warps=8),
    "256x128": Tile(256, warps=8),
    "64x128": Tile(64, stages=4),
    "128x64": Tile(128, bn=64, stages=4),
}


def tile(arch: Arch, m: int) -> Tile:
    """The launch for m rows."""
    if arch.vendor == "interpreter":
        return Tile(32, 64)
    if m > 64:
        return CANDIDATES["128x128"] if arch.wgmma else Tile(128, warps=8)
    return Tile(16 if m <= 16 else 64, bn=64, stages=4)


class Registers:
    """The product that unpacks int4 weights in registers, in Triton."""

    name = "registers"

    def why_not(self, t: SVDQuantTensors, activations: str, dtype: torch.dtype, arch: Arch) -> str | None:
        if activations not in ("int8", "fp8"):
            return f"{activations} activations are not 8-bit"
        if activations == "fp8" and not (arch.fp8_cores or arch.vendor == "interpreter"):
            return "this GPU has no fp8 tensor cores"
        if dtype not in (torch.bfloat16, torch.float16):
            return f"{dtype} is not a 16-bit type"
        if t.spec.weights != "int4" or t.wzeros is not None:
            return "only symmetric int4 weights are unpacked in registers"
        if t.spec.group_size == 0 or t.spec.group_size % 64:
            return f"groups of {t.spec.group_size} weights are no multiple of 64"
        return None

    def reading(self, activations: str) -> Reading:
        return Reading(activations, split=True)

    def fuses(self, epilogue: Epilogue, layers: Sequence[SVDQuantTensors]) -> bool:
        return epilogue.norm is None

    def multiply(
        self, q: Quantized, layers: Sequence[SVDQuantTensors], out: Tensor, epilogue: Epilogue = NO_EPILOGUE
    ) -> None:
        arch = arch_of(q.codes.device)
        assert arch is not None
        multiply_with(tile(arch, q.codes.shape[0]), q, layers, out, epilogue)

    def specializations(self) -> list[Specialization]:
        return _specializations()


def multiply_with(
    config: Tile, q: Quantized, layers: Sequence[SVDQuantTensors], out: Tensor, epilogue: Epilogue = NO_EPILOGUE
) -> None:
    """`Registers.multiply` by a launch of the caller's choice. A stack is multiplied layer by layer."""
    start = 0
    for t in layers:
        _multiply(config, q, t, out[..., start : start + t.out_features], epilogue)
        start += t.out_features


def _multiply(config: Tile, q: Quantized, t: SVDQuantTensors, out: Tensor, epilogue: Epilogue) -> None:
    from .registers_kernel import ratios_kernel, registers_kernel
    from .unpack import TOP

    precision = q.reading.precision
    arch = arch_of(q.codes.device)
    m, n = q.codes.shape[0], t.out_features
    groups = t.wscales.shape[1]
    ratios = t.qweight.new_empty((groups, n), dtype=torch.int32)
    scales = t.qweight.new_empty(n, dtype=torch.float32)
    shifted = effective_bias(t) if t.spec.unsigned else dense(t.bias)
    up = None if q.low is None else dense(t.proj_up)
    rank = 0 if up is None else up.shape[1]
    tiles = -(-m // config.bm) * -(-n // config.bn)
    with guard(out):
        ratios_kernel[(-(-n // 32),)](
            t.wscales.contiguous(), ratios, scales, n, groups, TOP=TOP["int4", precision], ROWS=32, BLOCK=64
        )
        registers_kernel[(tiles,)](
            q.codes,
            t.qweight.contiguous().view(torch.int8),
            ratios,
            q.scales,
            scales,
            shifted,
            None if up is None else q.low,
            up,
            out,
            m,
            n,
            q.codes.shape[1],
            groups,
            rank,
            q.tokens,
            out.stride(0),
            out.stride(1),
            FP8=precision == "fp8",
            GELU=epilogue.gelu,
            PTX=arch is not None and arch.vendor == "nvidia",
            PARTS=t.spec.group_size // 64,
            **_sizes(config, rank),
            num_warps=config.warps,
            num_stages=config.stages,
        )


def _sizes(config: Tile, rank: int) -> dict[str, Any]:
    return {"BM": config.bm, "BN": config.bn, "GROUP": config.group, "RANK": 16 if rank <= 16 else 32}


def _specializations() -> list[Specialization]:
    from .registers_kernel import ratios_kernel
    from .unpack import TOP

    found = [
        Specialization(
            name="registers ratios",
            kernel=ratios_kernel,
            signature={"wscales": "*bf16", "ratios": "*i32", "scales": "*fp32", "N": "i32", "groups": "i32"},
            constants={"TOP": TOP["int4", "int8"], "ROWS": 32, "BLOCK": 64},
            num_warps=4,
            num_stages=3,
            expects=dict.fromkeys((80, 86, 89, 90, 100, 120), ()),
            aligned=("N", "groups"),
        )
    ]
    expects: dict[str, dict[int, tuple[str, ...]]] = {
        "int8": {80: ("IMMA",), 86: ("IMMA",), 89: ("IMMA",), 90: ("IGMMA",), 100: (), 120: ("IMMA",)},
        "fp8": {89: ("QMMA",), 90: ("QGMMA",), 100: (), 120: ("QMMA",)},
    }
    for precision, wanted in expects.items():
        alike: dict[Tile, dict[int, tuple[str, ...]]] = {}
        for number, instructions in wanted.items():
            alike.setdefault(tile(Arch("nvidia", number), 4608), {})[number] = instructions
        for config, chips in alike.items():
            found.append(specialization(f"registers {precision} {config.bm}x{config.bn}", config, precision, chips))
    return found


def specialization(name: str, config: Tile, precision: str, chips: dict[int, tuple[str, ...]]) -> Specialization:
    """The product for a launch, of bfloat16 with branch and bias."""
    from .registers_kernel import registers_kernel

    eight = "*fp8e4nv" if precision == "fp8" else "*i8"
    pointers = {"codes": eight, "stored": "*i8", "ratios": "*i32", "row_scales": "*fp32", "scales": "*fp32"}
    pointers |= dict.fromkeys(("bias", "low", "up", "out"), "*bf16")
    numbers = ("M", "N", "columns", "groups", "rank", "length", "batch_stride", "token_stride")
    return Specialization(
        name=name,
        kernel=registers_kernel,
        signature=pointers | dict.fromkeys(numbers, "i32"),
        constants=_sizes(config, 32) | {"FP8": precision == "fp8", "GELU": False, "PTX": True, "PARTS": 1},
        num_warps=config.warps,
        num_stages=config.stages,
        expects=chips,
        aligned=tuple(name for name in numbers if name not in ("M", "length")),
    )
