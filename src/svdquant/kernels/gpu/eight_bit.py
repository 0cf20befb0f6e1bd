"""8-bit activations times 8-bit weights made of the stored ones: what Hopper does best, and what any GPU can do.

int8 sums are exact. e4m3 sums: Hopper's tensor cores keep about 14 bits of a running sum, which costs 10⁻³ of relative
error where rounding the operands to e4m3 costs 3·10⁻²; adding parts up in float32 instead would take a quarter of all
issue slots and twice the registers, so `Tile.promote` is off by default.

Batch invariance: a row's int8 sum has one value, and e4m3 and 16-bit products are summed over their columns in one
order by one instruction, whatever the tile: on Hopper tiles have at least 64 rows, below which Triton would take
another one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ...numerics import SVDQuantTensors
from . import expand as expansion
from . import hopper
from .arch import Arch, arch_of
from .expand import Expanded, expand, guard
from .types import NO_EPILOGUE, Epilogue, Quantized, Reading, Specialization

HEADS = (64, 128)


@dataclass(frozen=True)
class Tile:
    """A launch: tile [bm, bn] of the output, bk columns at a time, `group` rows of tiles together.

    tma: operands come by descriptors (Hopper); persistent: as many programs as fit, each takes several tiles; promote:
    columns after which an e4m3 partial sum is added up in float32; gluon: by `hopper_kernel`, which norms no heads.
    """

    bm: int
    bn: int
    bk: int = 128
    group: int = 8
    warps: int = 8
    stages: int = 3
    tma: bool = False
    persistent: bool = False
    promote: int = 0
    gluon: bool = False


# Hopper's alternatives, to be timed on the device. The first is `tile`'s choice for many rows.
CANDIDATES: dict[str, Tile] = {
    "128x128": Tile(128, 128, warps=4, stages=3, tma=True),
    "128x128 w8": Tile(128, 128, warps=8, stages=3, tma=True),
    "128x256": Tile(128, 256, warps=8, stages=4, tma=True),
    "128x256 s3": Tile(128, 256, warps=8, stages=3, tma=True),
    "128x256 persistent": Tile(128, 256, warps=8, stages=3, tma=True, persistent=True),
    "256x128": Tile(256, 128, warps=8, stages=4, tma=True),
    "64x256": Tile(64, 256, warps=4, stages=4, tma=True),
    "128x256 k256": Tile(128, 256, bk=256, warps=8, stages=2, tma=True),
    "128x128 gluon": Tile(128, 128, warps=4, stages=3, tma=True, gluon=True),
    "128x256 gluon": Tile(128, 256, warps=8, stages=4, tma=True, gluon=True),
    "128x128 pointers": Tile(128, 128, warps=4, stages=3),
    "128x256 pointers": Tile(128, 256, warps=8, stages=3),
}


def tile(arch: Arch, m: int, n: int, k: int, precision: str) -> Tile:
    """The launch for m rows, n outputs, k columns."""
    if arch.vendor == "interpreter":
        return Tile(64, 128)
    if arch.wgmma:
        # A tile of 128x128 leaves room for a second program, whose products run while this one writes.
        return CANDIDATES["128x128"] if m > 64 else Tile(64, 128, warps=4, stages=4, tma=True)
    if arch.vendor != "nvidia":
        return Tile(128 if m > 64 else 32, 128, bk=64, warps=8 if m > 64 else 4, stages=2)
    if arch.number in (100, 103):
        return Tile(128, 128, warps=8, stages=3)
    if m <= 64:
        return Tile(16 if m <= 16 else 64, 64, warps=4, stages=4)
    return Tile(128, 128, bk=64, warps=8, stages=4 if arch.number == 80 else 3)


class EightBit:
    """The product of expanded weights (`expand`), in Triton."""

    name = "triton"

    def why_not(self, t: SVDQuantTensors, activations: str, dtype: torch.dtype, arch: Arch) -> str | None:
        if activations not in ("int8", "fp8"):
            return f"{activations} activations are not 8-bit"
        if activations == "fp8" and not (arch.fp8_cores or arch.vendor == "interpreter"):
            return "this GPU has no fp8 tensor cores"
        if dtype not in (torch.bfloat16, torch.float16):
            return f"{dtype} is not a 16-bit type"
        return expansion.why_not(t)

    def reading(self, activations: str) -> Reading:
        return Reading(activations)

    def fuses(self, epilogue: Epilogue, layers: Sequence[SVDQuantTensors]) -> bool:
        norm = epilogue.norm
        if norm is None:
            return True
        whole = all(t.out_features % norm.head == 0 for t in layers)
        return not epilogue.gelu and norm.head in HEADS and len(norm.weights) <= min(2, len(layers)) and whole

    def multiply(
        self, q: Quantized, layers: Sequence[SVDQuantTensors], out: Tensor, epilogue: Epilogue = NO_EPILOGUE
    ) -> None:
        arch = arch_of(q.codes.device)
        assert arch is not None
        n = sum(t.out_features for t in layers)
        config = tile(arch, q.codes.shape[0], n, q.codes.shape[1], q.reading.precision)
        multiply_with(config, q, layers, out, epilogue)

    def specializations(self) -> list[Specialization]:
        return _specializations()


def multiply_with(
    config: Tile,
    q: Quantized,
    layers: Sequence[SVDQuantTensors],
    out: Tensor,
    epilogue: Epilogue = NO_EPILOGUE,
    expanded: Expanded | None = None,
) -> None:
    """`EightBit.multiply` by a launch of the caller's choice, with weights that are already expanded where given."""
    weights = expanded or expand(layers, q.reading.precision)
    if config.gluon:
        if epilogue.norm is not None:
            raise ValueError("the Gluon kernel norms no heads")
        hopper.launch(config, q, weights, out, epilogue.gelu)
        return
    arch = arch_of(q.codes.device)
    m, columns = q.codes.shape
    n = weights.weight.shape[0]
    tiles = -(-m // config.bm) * -(-n // config.bn)
    programs = min(tiles, arch.units) if config.persistent and arch is not None else tiles
    codes: Any = q.codes
    weight: Any = weights.weight
    if config.tma:
        from triton.tools.tensor_descriptor import TensorDescriptor

        codes = TensorDescriptor(codes, [m, columns], [columns, 1], [config.bm, config.bk])
        weight = TensorDescriptor(weight, [n, columns], [weight.stride(0), 1], [config.bn, config.bk])
    low, up = (None, None) if weights.up is None else (q.low, weights.up)
    norm = epilogue.norm
    normed = [t.out_features for t in layers[: len(norm.weights)]] if norm is not None else []
    factors = (*(norm.weights if norm is not None else ()), None, None)
    from .eight_bit_kernel import eight_bit_kernel

    with guard(out):
        eight_bit_kernel[(programs,)](
            codes,
            weight,
            q.scales,
            weights.scales,
            weights.bias,
            low,
            up,
            out,
            factors[0],
            factors[1],
            None if norm is None else norm.cosine,
            None if norm is None else norm.sine,
            sum(normed[:1]),
            sum(normed),
            0.0 if norm is None else float(norm.eps),
            m,
            n,
            columns,
            weights.weight.stride(0),
            0 if up is None else up.shape[1],
            q.tokens,
            out.stride(0),
            out.stride(1),
            FP8=q.reading.precision == "fp8",
            GELU=epilogue.gelu,
            HEAD=0 if norm is None else norm.head,
            **_constants(config, 0 if up is None else up.shape[1], norm is not None),
        )


@lru_cache(maxsize=256)
def _constants(config: Tile, rank: int, norm: bool) -> Mapping[str, Any]:
    named = asdict(config)
    sizes = {name.upper(): named[name] for name in ("bm", "bn", "bk", "group", "tma", "persistent", "promote")}
    sizes["HALVES"] = norm and config.bm >= 128
    sizes |= {"RANK": 16 if rank <= 16 else 32, "num_warps": config.warps, "num_stages": config.stages}
    return MappingProxyType(sizes)


def _specializations() -> list[Specialization]:
    found = []
    expects = {
        "int8": {80: ("IMMA",), 86: ("IMMA",), 89: ("IMMA",), 90: ("IGMMA",), 100: (), 120: ("IMMA",)},
        "fp8": {89: ("QMMA",), 90: ("QGMMA",), 100: (), 120: ("QMMA",)},
    }
    forms = (("", "bf16", 4608), ("gelu", "bf16", 4608), ("norm", "bf16", 4608), ("", "fp16", 4608), ("", "bf16", 16))
    for precision, wanted in expects.items():
        for epilogue, dtype, m in forms:
            # Chips that are launched alike share a specialization.
            alike: dict[Tile, dict[int, tuple[str, ...]]] = {}
            for number, instructions in wanted.items():
                arch = Arch("nvidia", number)
                alike.setdefault(tile(arch, m, 9216, 3072, precision), {})[number] = instructions
            for config, chips in alike.items():
                name = f"{precision} {dtype} {config.bm}x{config.bn} {epilogue}".strip()
                found.append(specialization(name, config, precision, dtype, epilogue, chips))
        for name, config in CANDIDATES.items():
            if config.gluon:
                found.append(hopper.specialization(f"{precision} {name}", config, precision, "bf16", False))
    return found


def specialization(
    name: str, config: Tile, precision: str, dtype: str, epilogue: str, chips: dict[int, tuple[str, ...]]
) -> Specialization:
    """The kernel for a launch, with branch and bias. epilogue: "", "gelu" or "norm" (with rotation, heads of 128)."""
    from .eight_bit_kernel import eight_bit_kernel

    eight = "fp8e4nv" if precision == "fp8" else "i8"
    operands = {"codes": f"*{eight}", "weight": f"*{eight}"}
    if config.tma:
        operands = {
            "codes": f"tensordesc<{eight}[{config.bm}, {config.bk}]>",
            "weight": f"tensordesc<{eight}[{config.bn}, {config.bk}]>",
        }
    pointers = {"row_scales": "*fp32", "scales": "*fp32", "bias": "*fp32"}
    pointers |= dict.fromkeys(("low", "up", "out"), f"*{dtype}")
    normed = {"first_weight": f"*{dtype}", "second_weight": f"*{dtype}", "cosine": "*fp32", "sine": "*fp32"}
    numbers = (
        "M", "N", "columns", "weight_stride", "rank", "length", "batch_stride", "token_stride", "first", "normed",
    )  # fmt: skip
    absent = {} if epilogue == "norm" else dict.fromkeys(normed)
    constants = dict(_constants(config, 32, epilogue == "norm"))
    constants |= {"FP8": precision == "fp8", "GELU": epilogue == "gelu", "HEAD": 128 if epilogue == "norm" else 0}
    warps, stages = constants.pop("num_warps"), constants.pop("num_stages")
    signature = operands | pointers | normed | dict.fromkeys(numbers, "i32") | {"eps": "fp32"}
    return Specialization(
        name=name,
        kernel=eight_bit_kernel,
        signature={k: v for k, v in signature.items() if k not in absent},
        constants=constants | absent,
        num_warps=warps,
        num_stages=stages,
        expects=chips,
        aligned=tuple(name for name in numbers if name not in ("M", "length")),
    )
