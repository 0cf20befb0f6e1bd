"""nvfp4 activations times nvfp4 weights on the tensor cores that know the format: Blackwell's."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from ...numerics import SVDQuantTensors
from .arch import Arch, arch_of, interpreting
from .nvfp4_kernel import nvfp4_kernel
from .types import LayerByLayer, Quantized, Reading, Specialization


@dataclass(frozen=True)
class Tile:
    """outputs × tokens of one program, which takes `columns` at a time."""

    outputs: int
    tokens: int
    columns: int
    warps: int
    stages: int


def tile_of(arch: Arch, m: int, blocks: int) -> Tile:
    """blocks: outer scales per row; several need a second accumulator. Bits do not depend on m."""
    if arch.number in (100, 103):
        return Tile(128, 16 if m <= 16 else 128, 256, 4 if blocks == 1 else 8, 3)
    return Tile(128, 16 if m <= 16 else 128 if blocks == 1 else 64, 128, 8, 3)


class NVFP4(LayerByLayer):
    """`tl.dot_scaled` of stored e2m1 codes and e4m3 scales, both operands as they lie in memory."""

    name = "dot_scaled"

    def why_not(self, t: SVDQuantTensors, activations: str, dtype: torch.dtype, arch: Arch) -> str | None:
        if activations != "nvfp4":
            return f"activations are {activations}, not nvfp4"
        if t.spec.weights != "nvfp4" or t.spec.group_size != 16:
            return f"weights are {t.spec.weights} in groups of {t.spec.group_size}, not nvfp4 in groups of 16"
        if dtype not in (torch.bfloat16, torch.float16):
            return f"inputs are {dtype}, not bfloat16 or float16"
        if t.wcscales is None:
            return "the weight has no outer scale"
        if t.wscales.shape[1] % (t.wcscales.numel() // t.out_features):
            return "the outer scales' blocks cut through groups of columns"
        if not arch.nvfp4_cores and arch.vendor != "interpreter":
            return "only sm_100, sm_103, sm_120 and sm_121 have nvfp4 tensor cores"
        return None

    def reading(self, activations: str) -> Reading:
        return Reading("nvfp4", packed=True)

    def launch(self, q: Quantized, t: SVDQuantTensors, out: Tensor, gelu: bool) -> None:
        _multiply(q, t, out, gelu)

    def specializations(self) -> list[Specialization]:
        return specializations()


def _multiply(q: Quantized, t: SVDQuantTensors, out: Tensor, gelu: bool) -> None:
    m = q.codes.shape[0]
    n = t.out_features
    if m == 0:
        return
    arch = arch_of(out.device)
    assert arch is not None and t.wcscales is not None
    weight, wscales, outer = t.qweight.contiguous(), t.wscales.contiguous(), t.wcscales.contiguous()
    a_scales = q.scales
    if interpreting():
        wscales, a_scales = wscales.view(torch.uint8), a_scales.view(torch.uint8)
    blocks = outer.numel() // n
    width = wscales.shape[1] * 16 // blocks
    branch = q.low is not None and t.proj_up is not None
    up = t.proj_up.contiguous() if branch and t.proj_up is not None else None
    bias = None if t.bias is None else t.bias.contiguous()
    if t.spec.unsigned:
        # These codes are not shifted, and the stored bias compensates a shift.
        from .expand import effective_bias

        bias = effective_bias(t)
    tile = tile_of(arch, m, blocks)
    rank = 0 if up is None else up.shape[1]
    grid = (-(-m // tile.tokens), -(-n // tile.outputs))
    with torch.cuda.device(out.device) if out.is_cuda else nullcontext():
        nvfp4_kernel[grid](
            q.codes, a_scales, weight, wscales, outer, q.low if branch else None, up, bias, out,
            m, n, width, q.codes.stride(0), a_scales.stride(0), weight.stride(0), wscales.stride(0), rank,
            q.tokens, out.stride(0), out.stride(1),
            **_constants(blocks, rank, bias is not None, gelu, tile), WHOLE=width % tile.columns == 0,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip


def _constants(blocks: int, rank: int, bias: bool, gelu: bool, tile: Tile) -> dict[str, object]:
    return {
        "BLOCKS": blocks,
        "RC": 0 if rank == 0 else 16 if rank <= 16 else 32 if rank <= 32 else 64,
        "BIAS": bias,
        "GELU": gelu,
        "BN": tile.outputs,
        "BM": tile.tokens,
        "BK": tile.columns,
    }


def specializations() -> list[Specialization]:
    """One outer scale per row with and without GELU, and several; many rows and few."""
    native = {100: ("UTCOMMA",), 120: ("OMMA",)}
    forms = []
    for blocks, gelu, m in ((1, False, 4608), (1, True, 4608), (5, False, 4608), (1, False, 16)):
        for number, wanted in native.items():
            tile = tile_of(Arch("nvidia", number), m, blocks)
            signature = dict.fromkeys(("outer", "low", "up", "bias", "out"), "*bf16")
            signature |= {"codes": "*u8", "weight": "*u8", "a_scales": "*fp8e4nv", "w_scales": "*fp8e4nv"}
            integers = (
                "N",
                "width",
                "a_stride",
                "as_stride",
                "w_stride",
                "ws_stride",
                "rank",
                "batch_stride",
                "token_stride",
            )
            signature |= dict.fromkeys((*integers, "M", "tokens_per_batch"), "i32")
            form = Specialization(
                name=f"nvfp4 outer scales {blocks}{' gelu' if gelu else ''} M={m}",
                kernel=nvfp4_kernel,
                signature=signature,
                constants=_constants(blocks, 32, True, gelu, tile) | {"WHOLE": True},
                num_warps=tile.warps,
                num_stages=tile.stages,
                expects={number: wanted},
                aligned=integers,
            )
            forms.append(form)
    return forms
