"""y = x·Ŵᵀ + b with 16-bit inputs and weights of 4 or 8 bits: what layers with one row per sample need.

A few rows are bound by the bytes of the weight: tiles are small enough for every multiprocessor to have several.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from .arch import Arch, arch_of
from .types import Specialization
from .weight_only_kernel import weight_only_kernel

_STEP = 256
_POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16"}


@dataclass(frozen=True)
class Tile:
    """outputs × tokens of one program, of four warps, and the depth of its pipeline."""

    outputs: int
    tokens: int
    stages: int


def tile_of(arch: Arch, m: int, n: int) -> Tile:
    """Bits do not depend on the tile where one instruction serves all of them, as NVIDIA's 16 × 8 does."""
    if arch.vendor not in ("nvidia", "interpreter") or m > 16:
        return Tile(32, 32, 3)
    # At least two programs per multiprocessor, while that leaves each the 16 rows of an instruction.
    outputs = 32 if n >= 2 * 32 * arch.units else 16
    return Tile(outputs, 8, 4) if m <= 8 else Tile(outputs, 16, 3)


def why_not(qweight: Tensor, wscales: Tensor, dtype: torch.dtype, weights: str, arch: Arch) -> str | None:
    """Why `w4a16_linear` cannot take the layer for inputs of `dtype`; None where it can."""
    if dtype not in _POINTERS:
        return f"inputs are {dtype}, not bfloat16 or float16"
    if weights not in ("int4", "int8", "nvfp4"):
        return f"weights are {weights}"
    stored = qweight.shape[1] * (1 if weights == "int8" else 2)
    groups = wscales.shape[1]
    if groups > 1 and (stored % groups or stored // groups % 16):
        return f"{stored} columns in {groups} groups: not multiples of 16"
    if weights != "int8" and stored % 4:
        return f"{stored} columns are no multiple of 4"
    return None


def w4a16_linear(
    x: Tensor,
    qweight: Tensor,
    wscales: Tensor,
    bias: Tensor | None,
    weights: str,
    wzeros: Tensor | None = None,
) -> Tensor:
    """x [M, K] bfloat16 or float16, rows of any stride; returns [M, N] in x's type.

    qweight: uint8 [N, Kp/2] (int4, nvfp4) or int8 [N, Kp], Kp ≥ K; wscales, wzeros: [N, groups]; bias [N] or None.
    Codes are multiplied exactly and summed in float32, sums of groups that are multiples of 64 columns then multiplied
    by their scales in float32; weights of other groups are scaled and rounded to x's type (nvfp4's without loss).
    Row i depends on row i alone, bit for bit.
    """
    m, k = x.shape
    n = qweight.shape[0]
    out = x.new_empty(m, n)
    if m == 0:
        return out
    arch = arch_of(x.device)
    assert arch is not None
    if x.stride(1) != 1:
        x = x.contiguous()
    qweight, wscales = qweight.contiguous(), wscales.contiguous()
    if wscales.itemsize == 1:
        wscales = wscales.view(torch.uint8)  # Not every chip's Triton has e4m3.
    wzeros, bias = (None if v is None else v.contiguous() for v in (wzeros, bias))
    int8 = weights == "int8"
    stored = qweight.shape[1] * (1 if int8 else 2)
    groups = wscales.shape[1]
    words = qweight if int8 else qweight.view(torch.int16)
    constants = _constants(weights, 0 if groups == 1 else stored // groups, wzeros is not None, bias is not None, arch)
    tile = tile_of(arch, m, n)
    grid = (-(-m // tile.tokens), -(-n // tile.outputs))
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        weight_only_kernel[grid](
            x, words, wscales, wzeros, bias, out, m, n, k, stored, groups, x.stride(0), words.stride(0),
            **constants, WHOLE=k == stored and k % _STEP == 0, BN=tile.outputs, BM=tile.tokens,
            num_warps=4, num_stages=tile.stages,
        )  # fmt: skip
    return out


def _constants(weights: str, group: int, zeros: bool, bias: bool, arch: Arch) -> dict[str, object]:
    kind = {"int8": "int8", "nvfp4": "e2m1", "int4": "unsigned" if zeros else "signed"}[weights]
    return {"KIND": kind, "GROUP": group, "ZEROS": zeros, "BIAS": bias, "PTX": arch.vendor == "nvidia"}


def specializations() -> list[Specialization]:
    """int4 on every chip, with one row and with many; what else it takes, on one."""
    every = dict.fromkeys((80, 86, 89, 90, 100, 120), "HMMA") | {942: "v_mfma_f32"}
    hopper = {90: "HMMA"}
    cases = [
        ("int4", 64, False, "bf16", 1, every),
        ("int4", 64, False, "bf16", 4096, every),
        ("int4", 64, False, "fp16", 16, hopper),
        ("int4", 64, True, "bf16", 4096, hopper),
        ("int8", 0, False, "bf16", 1, hopper),
        ("nvfp4", 16, False, "bf16", 1, hopper),
    ]
    forms = []
    for weights, group, zeros, dtype, m, targets in cases:
        for number, wanted in targets.items():
            arch = Arch("amd") if number == 942 else Arch("nvidia", number)
            constants = _constants(weights, group, zeros, True, arch)
            tile = tile_of(arch, m, 18432)
            signature = dict.fromkeys(("x", "scales", "zeros", "bias", "out"), f"*{dtype}")
            signature |= {"weight": "*i8" if weights == "int8" else "*i16"}
            signature |= {"scales": "*u8"} if weights == "nvfp4" else {}
            absent: dict[str, object] = {} if zeros else {"zeros": None}
            integers = ("M", "N", "K", "stored", "groups", "x_stride", "w_stride")
            form = Specialization(
                name=f"weight_only {weights}{' with zeros' if zeros else ''} {dtype} M={m}",
                kernel=weight_only_kernel,
                signature=signature | dict.fromkeys(integers, "i32"),
                constants=constants | absent | {"WHOLE": True, "BN": tile.outputs, "BM": tile.tokens},
                num_warps=4,
                num_stages=tile.stages,
                expects={number: (wanted,)},
                aligned=integers[1:],
            )
            forms.append(form)
    return forms
