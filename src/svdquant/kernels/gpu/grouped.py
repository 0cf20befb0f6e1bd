"""The product that keeps every group's scale: exact int4 × int4 and int4 × int8 on any GPU that multiplies int8."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from ...numerics import SVDQuantTensors
from .arch import Arch, arch_of
from .grouped_kernel import grouped_kernel
from .types import LayerByLayer, Quantized, Reading, Specialization


@dataclass(frozen=True)
class Tile:
    """outputs × tokens of one program."""

    outputs: int
    tokens: int
    warps: int
    stages: int


def tile_of(arch: Arch, m: int, group: int, activations: str) -> Tile:
    """group: columns per weight scale. Bits do not depend on the tile."""
    # Groups that are no multiple of 64 take a product each; int4's tokens take a register for each scale.
    few = m <= 16 and arch.vendor in ("nvidia", "interpreter")  # AMD's instruction, and its order, depend on the tile
    if group % 64:
        return Tile(64, 16 if few else 32, 4, 3)
    if few:
        return Tile(64, 16, 4, 4)
    if m <= 64 or arch.vendor != "nvidia" or (activations == "int4" and not arch.wgmma):
        return Tile(64, 64, 4, 3)
    return Tile(128, 64, 8, 3)


class Grouped(LayerByLayer):
    """Integer products of one group at a time, each scaled in float32."""

    name = "grouped"

    def why_not(self, t: SVDQuantTensors, activations: str, dtype: torch.dtype, arch: Arch) -> str | None:
        spec = t.spec
        if activations not in ("int4", "int8"):
            return f"activations are {activations}, not int4 or int8"
        if dtype not in (torch.bfloat16, torch.float16):
            return f"inputs are {dtype}, not bfloat16 or float16"
        if t.wzeros is not None:
            return "weights have zero points"
        if t.wscales.shape[1] > 1 and spec.group_size % 16:
            return f"groups of {spec.group_size} are no multiples of 16"
        if activations == spec.weights == "int4" and spec.group_size != 64:
            return f"int4 activations would have groups of {spec.group_size}, as the weight has, not of 64"
        return None

    def reading(self, activations: str) -> Reading:
        return Reading(activations, packed=False, split=True)

    def launch(self, q: Quantized, t: SVDQuantTensors, out: Tensor, gelu: bool) -> None:
        _multiply(q, t, out, gelu)

    def specializations(self) -> list[Specialization]:
        return specializations()


def _multiply(q: Quantized, t: SVDQuantTensors, out: Tensor, gelu: bool) -> None:
    m, columns = q.codes.shape
    n = t.out_features
    if m == 0:
        return
    arch = arch_of(out.device)
    assert arch is not None
    weight, wscales = t.qweight.contiguous(), t.wscales.contiguous()
    if wscales.itemsize == 1:
        wscales = wscales.view(torch.uint8)  # Not every chip's Triton has e4m3.
    outer = None if t.wcscales is None else t.wcscales.contiguous()
    branch = q.low is not None and t.proj_up is not None
    up = t.proj_up.contiguous() if branch and t.proj_up is not None else None
    bias = _bias(t, q.reading.precision)
    stored = weight.shape[1] * (1 if t.spec.weights == "int8" else 2)
    tile = tile_of(arch, m, stored // wscales.shape[1], q.reading.precision)
    constants = _constants(
        t.spec.weights, stored // wscales.shape[1], wscales.shape[1], 0 if outer is None else outer.numel() // n,
        q.reading.precision, 0 if up is None else up.shape[1], bias is not None, gelu, arch, tile,
    )  # fmt: skip
    grid = (-(-m // tile.tokens), -(-n // tile.outputs))
    with torch.cuda.device(out.device) if out.is_cuda else nullcontext():
        grouped_kernel[grid](
            q.codes, q.scales, weight, wscales, outer, q.low if branch else None, up, bias, out,
            m, n, columns, stored, weight.stride(0), wscales.shape[1], 0 if up is None else up.shape[1],
            q.tokens, out.stride(0), out.stride(1), **constants, WHOLE=stored % 128 == 0,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip


def _bias(t: SVDQuantTensors, activations: str) -> Tensor | None:
    if not t.spec.unsigned or activations == "int4":
        return None if t.bias is None else t.bias.contiguous()
    # Codes of 8 bits are not shifted, and the stored bias compensates a shift.
    from .expand import effective_bias

    return effective_bias(t)


def _constants(
    weights: str, group: int, groups: int, blocks: int, activations: str, rank: int, bias: bool, gelu: bool,
    arch: Arch, tile: Tile,
) -> dict[str, object]:  # fmt: skip
    return {
        "KIND": weights,
        "GROUP": group if groups > 1 else 0,
        "BLOCKS": blocks,
        "A4": activations == "int4",
        "RC": 0 if rank == 0 else 16 if rank <= 16 else 32 if rank <= 32 else 64,
        "BIAS": bias,
        "GELU": gelu,
        "PTX": arch.vendor == "nvidia",
        "BN": tile.outputs,
        "BM": tile.tokens,
    }


def specializations() -> list[Specialization]:
    """int4 weights with both precisions on every chip; what else it takes, on one."""
    every: dict[int, tuple[str, ...]] = dict.fromkeys((80, 86, 89, 120), ("IMMA",))
    every |= {90: ("IGMMA",), 100: ("IMMA", "UTCI"), 942: ("v_mfma_i32",)}
    hopper: dict[int, tuple[str, ...]] = {90: ("IGMMA",)}
    cases: list[tuple[str, int, str, int, dict[int, tuple[str, ...]]]] = [
        ("int4", 64, "int4", 4608, every),
        ("int4", 64, "int8", 4608, every),
        ("int4", 64, "int4", 16, hopper),
        ("int4", 32, "int8", 4608, hopper),
        ("nvfp4", 16, "int8", 4608, hopper),
        ("int8", 3072, "int8", 4608, hopper),
    ]
    forms = []
    for weights, group, activations, m, expects in cases:
        for number, wanted in expects.items():
            arch = Arch("amd") if number == 942 else Arch("nvidia", number)
            tile = tile_of(arch, m, group, activations)
            blocks = 1 if weights == "nvfp4" else 0
            constants = _constants(weights, group, 3072 // group, blocks, activations, 32, True, False, arch, tile)
            signature = dict.fromkeys(("low", "up", "bias", "out", "outer"), "*bf16") | {
                "codes": "*i8",
                "a_scales": "*fp32",
                "weight": "*i8" if weights == "int8" else "*u8",
                "w_scales": "*u8" if weights == "nvfp4" else "*bf16",
            }
            integers = ("M", "N", "columns", "stored", "w_stride", "groups", "rank", "tokens_per_batch")
            signature |= dict.fromkeys((*integers, "batch_stride", "token_stride"), "i32")
            form = Specialization(
                name=f"grouped W {weights} group {group} A {activations} M={m}",
                kernel=grouped_kernel,
                signature=signature,
                constants=constants | {"WHOLE": True},
                num_warps=tile.warps,
                num_stages=tile.stages,
                expects={number: wanted},
                aligned=("N", "columns", "stored", "w_stride", "groups", "rank", "batch_stride", "token_stride"),
            )
            forms.append(form)
    return forms
