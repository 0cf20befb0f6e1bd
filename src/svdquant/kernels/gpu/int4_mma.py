"""4-bit codes times 4-bit weights on the INT4 tensor cores of Ampere and Ada, in exactly the stored arithmetic.

Both operands are read as they are stored, two codes per byte in rows; no copy in another layout exists. Sums of a group
of 64 are exact integers, multiplied by both scales and added up in float32, group after group: a row's bits depend
neither on the other rows nor on the tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...config import LayerSpec
from ...numerics import SVDQuantTensors
from .arch import Arch, arch_of
from .expand import guard
from .types import LayerByLayer, Quantized, Reading, Specialization, columns_of

GROUP = 64
_HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Tile:
    """A program's warps_m × warps_n warps, each of 16·row_tiles × 8·column_tiles outputs; steps of 128 columns kept in
    shared memory at a time."""

    row_tiles: int
    column_tiles: int
    warps_m: int
    warps_n: int
    stages: int

    @property
    def rows(self) -> int:
        return 16 * self.row_tiles * self.warps_m

    @property
    def columns(self) -> int:
        return 8 * self.column_tiles * self.warps_n


# 128 x 128 outputs by eight warps, 64 x 128 by four, of which two programs share a multiprocessor, and 16 x 64 for a
# handful of rows. Warps of 64 x 64 would read less from shared memory, but need more than the 255 registers there are.
LARGE = Tile(2, 8, 4, 2, 3)
MEDIUM = Tile(2, 8, 2, 2, 3)
SMALL = Tile(1, 2, 1, 4, 4)


def tile_of(arch: Arch, m: int, n: int) -> Tile:
    """The launch for m rows and n outputs. It changes no bit of the result."""
    if m <= 16:
        return SMALL
    programs = -(-m // LARGE.rows) * -(-n // LARGE.columns)
    return LARGE if programs >= arch.units else MEDIUM


def unsigned_groups(spec: LayerSpec, in_features: int) -> tuple[int, int] | None:
    """First and last + 1 of the groups of unsigned activations, (0, 0) without; None where they are not adjacent."""
    inside: set[int] = set()
    for start, stop in spec.unsigned:
        inside.update(range(start // GROUP, -(-stop // GROUP)))
    if not inside:
        return 0, 0
    first, last = min(inside), max(inside) + 1
    return (first, last) if len(inside) == last - first else None


class Int4MMA(LayerByLayer):
    """The product on INT4 tensor cores (`mma.m16n8k64`), in Gluon."""

    name = "int4_mma"

    def why_not(self, t: SVDQuantTensors, activations: str, dtype: torch.dtype, arch: Arch) -> str | None:
        """Newer NVIDIA chips emulate the instruction, slowly: it multiplies there only if SVDQUANT_BACKEND names it."""
        from .choice import forced

        spec = t.spec
        if activations != "int4":
            return f"{activations} activations are not int4"
        if spec.weights != "int4" or spec.zeros or t.wzeros is not None:
            return "weights are not symmetric int4"
        if spec.group_size != GROUP:
            return f"weights have groups of {spec.group_size}, not of {GROUP}"
        if dtype not in _HALVES or t.wscales.dtype not in _HALVES:
            return "the model or its scales are not in a 16-bit type"
        if arch.vendor != "nvidia" or arch.number < 80:
            return "it needs an NVIDIA GPU, Ampere or newer"
        if unsigned_groups(spec, t.in_features) is None:
            return "unsigned activations in separate ranges of columns"
        if not arch.int4_cores and forced() != self.name:
            return f"sm_{arch.number} has no INT4 tensor cores"
        return None

    def reading(self, activations: str) -> Reading:
        return Reading("int4", packed=True)

    def launch(self, q: Quantized, t: SVDQuantTensors, out: Tensor, gelu: bool) -> None:
        _multiply(q, t, out, gelu)

    def specializations(self) -> list[Specialization]:
        return _specializations()


def _multiply(q: Quantized, t: SVDQuantTensors, out: Tensor, gelu: bool) -> None:
    m, n = q.codes.shape[0], t.out_features
    if m == 0 or n == 0:
        return
    from .int4_mma_kernel import int4_linear

    arch = arch_of(out.device)
    assert arch is not None
    tile = tile_of(arch, m, n)
    grid = (-(-m // tile.rows) * -(-n // tile.columns),)
    arguments, constants = launch_arguments(q, t, out, gelu, tile)
    with guard(out):
        int4_linear[grid](**arguments, **constants, num_warps=tile.warps_m * tile.warps_n)


def launch_arguments(
    q: Quantized, t: SVDQuantTensors, out: Tensor, gelu: bool, tile: Tile
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The kernel's arguments and constants, by name."""
    m, columns = q.codes.shape[0], q.codes.shape[1] * 2
    groups = t.wscales.shape[1]
    adjacent = unsigned_groups(t.spec, t.in_features)
    assert adjacent is not None and columns == columns_of(groups * GROUP)
    codes, weight = _words(q.codes), _words(t.qweight)
    low = up = codes
    ranks = 0
    if q.low is not None and t.proj_up is not None:
        low, up = _words(_whole(q.low)), _words(_whole(t.proj_up.to(q.low.dtype)))
        ranks = low.shape[1] // 8
    arguments = {
        "codes": codes,
        "scales": q.scales.contiguous(),
        "weight": weight,
        "wscales": t.wscales.contiguous(),
        "low": low,
        "up": up,
        "bias": None if t.bias is None else t.bias.contiguous(),
        "out": out,
        "M": m,
        "N": t.out_features,
        "STEPS": columns // 128,
        "RANKS": ranks,
        "FIRST": adjacent[0],
        "LAST": adjacent[1],
        "tokens": q.tokens,
        "batch_stride": out.stride(0),
        "token_stride": out.stride(1),
    }
    return arguments, _constants(adjacent, groups, gelu, tile)


def _constants(unsigned: tuple[int, int], groups: int, gelu: bool, tile: Tile) -> dict[str, Any]:
    # SIGNED, UNSIGNED or MIXED of the kernel.
    codes = 0 if unsigned[0] == unsigned[1] else 1 if unsigned[0] == 0 and unsigned[1] >= groups else 2
    return {
        "ODD": groups % 2,
        "CODES": codes,
        "GELU": gelu,
        "MF": tile.row_tiles,
        "NF": tile.column_tiles,
        "WM": tile.warps_m,
        "WN": tile.warps_n,
        "STAGES": tile.stages,
    }


def _whole(x: Tensor) -> Tensor:
    """[R, rank] with zeros up to a multiple of 16."""
    return F.pad(x, (0, -x.shape[1] % 16)) if x.shape[1] % 16 else x


def _words(x: Tensor) -> Tensor:
    """Rows as words of 32 bits, starting where 16 bytes do."""
    x = x.contiguous()
    return (x if x.data_ptr() % 16 == 0 else x.clone()).view(torch.int32)


def _specializations() -> list[Specialization]:
    from .int4_mma_kernel import int4_linear

    chips = (80, 86, 89)
    # bfloat16 in every form; rows, outputs and groups as in FLUX.
    cases = (
        ("", (0, 0), "IMMA.16864.S4.S4", 4608, 48, "bf16", False),
        ("gelu", (0, 0), "IMMA.16864.S4.S4", 4608, 48, "bf16", True),
        ("unsigned", (0, 192), "IMMA.16864.U4.S4", 4608, 192, "bf16", False),
        ("unsigned in part", (48, 240), "IMMA.16864.U4.S4", 4608, 240, "bf16", False),
        ("", (0, 0), "IMMA.16864.S4.S4", 4608, 48, "fp16", False),
        ("odd groups", (0, 0), "IMMA.16864.S4.S4", 4608, 49, "bf16", False),
        ("", (0, 0), "IMMA.16864.S4.S4", 256, 48, "bf16", False),
        ("", (0, 0), "IMMA.16864.S4.S4", 16, 48, "bf16", False),
    )
    found = []
    for name, unsigned, instruction, m, groups, dtype, gelu in cases:
        tile = tile_of(Arch("nvidia", 89), m, 3072)
        pointers = dict.fromkeys(("codes", "weight", "low", "up"), "*i32") | {"scales": "*fp32"}
        pointers |= dict.fromkeys(("wscales", "bias", "out"), f"*{dtype}")
        numbers = ("M", "N", "STEPS", "RANKS", "FIRST", "LAST", "tokens", "batch_stride", "token_stride")
        found.append(
            Specialization(
                name=f"int4_mma {dtype} {tile.rows}x{tile.columns} {name}".strip(),
                kernel=int4_linear,
                signature=pointers | dict.fromkeys(numbers, "i32"),
                constants=_constants(unsigned, groups, gelu, tile),
                num_warps=tile.warps_m * tile.warps_n,
                num_stages=3,
                expects=dict.fromkeys(chips, (instruction,)),
                gluon=True,
                aligned=("N", "batch_stride", "token_stride"),
            )
        )
    return found
