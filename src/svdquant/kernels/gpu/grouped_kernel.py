"""The kernel of `grouped.Grouped`: every group of 64 channels has its own integer product."""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl

from .device import INTERPRET, dot16, gelu_tanh, round_to
from .unpack import group_scales, nibble_value

# Both codes of four bytes, each times 16: what is in the upper half of a byte keeps its sign.
_NIBBLES = tl.constexpr("shl.b32 $0, $2, 4; and.b32 $0, $0, 0xf0f0f0f0; and.b32 $1, $2, 0xf0f0f0f0;")


@triton.jit
def _unpack(packed, KIND: tl.constexpr, PTX: tl.constexpr):
    """int8 integers of the low and high nibbles of uint8: 16 times the code (int4), or twice the value (nvfp4)."""
    if KIND == "nvfp4":
        low = (nibble_value(packed.to(tl.int32), 0, True) * 2).to(tl.int8)
        high = (nibble_value(packed.to(tl.int32), 1, True) * 2).to(tl.int8)
    elif PTX:
        low, high = tl.inline_asm_elementwise(_NIBBLES, "=&r,=r,r", [packed], (tl.int8, tl.int8), is_pure=True, pack=4)
    else:
        low = (packed << 4).to(tl.int8, bitcast=True)
        high = (packed & 0xF0).to(tl.int8, bitcast=True)
    return low, high


@triton.jit
def _pair_scales(
    a_scales, w_scales, outer, row, token, start, columns, groups, A4: tl.constexpr, GROUP: tl.constexpr,
    BLOCKS: tl.constexpr, E4M3: tl.constexpr,
):  # fmt: skip
    """Scales of the 64 columns from `start` and of the next 64: of the weight's rows [BN, 2], where groups are that
    wide, and of the tokens [BM, 2], where they have one per group."""
    pair = tl.arange(0, 2)[None, :]
    group = start // 64 + pair
    a = tl.zeros((1,), dtype=tl.float32)
    if A4:
        a = tl.load(a_scales + token[:, None] * (columns // 64) + group, mask=group < columns // 64, other=0.0)
    s = a
    if GROUP % 64 == 0:
        group = pair * 0 if GROUP == 0 else group // (GROUP // 64)
        s = group_scales(w_scales, outer, row[:, None], group, group < groups, groups, BLOCKS, E4M3)
    return s, a


@triton.jit(do_not_specialize=["M", "tokens_per_batch"])
def grouped_kernel(
    codes,
    a_scales,
    weight,
    w_scales,
    outer,
    low,
    up,
    bias,
    out,
    M,
    N,
    columns,
    stored,
    w_stride,
    groups,
    rank,
    tokens_per_batch,
    batch_stride,
    token_stride,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCKS: tl.constexpr,
    A4: tl.constexpr,
    WHOLE: tl.constexpr,
    RC: tl.constexpr,
    BIAS: tl.constexpr,
    GELU: tl.constexpr,
    PTX: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
):
    """outᵀ [N, M] = Ŵ·Q(x)ᵀ + U·lowᵀ + b. The weight is the first operand, which Hopper multiplies from registers.

    codes: int8 [M, columns], in every 64 first the even ones; a_scales: float32 [M, columns/64] (A4) or [M].
    weight: uint8 [N, stored/2] (KIND "int4", "nvfp4") or int8 [N, stored] ("int8"), rows of w_stride bytes.
    w_scales: [N, groups], outer: [N, BLOCKS] where BLOCKS > 0. GROUP: columns per group, 0 where there is one group.
    low: [M, rank], up: [N, rank], taken RC columns at a time; 0 = no branch. WHOLE: stored is a multiple of 128.

    Sums of a group are exact; they are added in float32 in the order of the groups, whatever the tile.
    """
    UNIT: tl.constexpr = 64 if GROUP % 64 == 0 else 32 if GROUP % 32 == 0 else 16
    E4M3: tl.constexpr = w_scales.dtype.element_ty == tl.uint8
    FACTOR: tl.constexpr = 0.0625 if KIND == "int4" else 0.5 if KIND == "nvfp4" else 1.0
    rows = tl.program_id(1) * BN + tl.arange(0, BN)
    tokens = tl.program_id(0) * BM + tl.arange(0, BM)
    row = tl.where(rows < N, rows, 0).to(tl.int64)
    token = tl.where(tokens < M, tokens, 0).to(tl.int64)
    bytes_ = tl.arange(0, 32)
    x_at = codes + token[None, :] * columns + bytes_[:, None]
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    next_s, next_a = _pair_scales(
        a_scales, w_scales, outer, row, token, 0, columns, groups, A4, GROUP, BLOCKS, E4M3
    )  # fmt: skip
    for first in range(0, stored, 128):
        # A step ahead by hand: only what a dot reads is pipelined by the compiler.
        s2, a2 = next_s, next_a
        next_s, next_a = _pair_scales(
            a_scales, w_scales, outer, row, token, first + 128, columns, groups, A4, GROUP, BLOCKS, E4M3
        )  # fmt: skip
        for half in tl.static_range(2):
            start = first + 64 * half
            even = tl.load(x_at + start)
            odd = tl.load(x_at + start + 32)
            if KIND == "int8":
                wide = tl.arange(0, 64)[None, :]
                at = weight + row[:, None] * w_stride + start + wide
                w = tl.load(at) if WHOLE else tl.load(at, mask=wide < stored - start, other=0)
                w_even, w_odd = tl.split(tl.reshape(w, (BN, 32, 2)))
            else:
                at = weight + row[:, None] * w_stride + start // 2 + bytes_[None, :]
                w = tl.load(at) if WHOLE else tl.load(at, mask=bytes_[None, :] < (stored - start) // 2, other=0)
                w_even, w_odd = _unpack(w, KIND, PTX)
            a = a2
            if A4:
                a = tl.broadcast_to(tl.split(a2)[half][None, :], (BN, BM))
            for unit in tl.static_range(64 // UNIT):
                if UNIT == 64:
                    s = tl.split(s2)[half]
                    part = tl.dot(w_even, even, out_dtype=tl.int32)
                    part = tl.dot(w_odd, odd, part, out_dtype=tl.int32)
                else:
                    # An instruction takes more columns than a group has: the others' weights count as zero.
                    group = tl.full((BN,), 0, tl.int32) + (start + unit * UNIT) // GROUP
                    s = group_scales(w_scales, outer, row, group, group < groups, groups, BLOCKS, E4M3)
                    mine = (bytes_ // (UNIT // 2) == unit)[None, :]
                    part = tl.dot(tl.where(mine, w_even, 0).to(tl.int8), even, out_dtype=tl.int32)
                    part = tl.dot(tl.where(mine, w_odd, 0).to(tl.int8), odd, part, out_dtype=tl.int32)
                s = tl.broadcast_to((s * FACTOR)[:, None], (BN, BM))
                if A4:
                    acc = tl.fma(part.to(tl.float32) * s, a, acc)
                else:
                    acc = tl.fma(part.to(tl.float32), s, acc)
    if not A4:
        acc *= tl.load(a_scales + token)[None, :]
    if RC > 0:
        branch = tl.zeros((BN, BM), dtype=tl.float32)
        for start in range(0, rank, RC):
            r = start + tl.arange(0, RC)
            u = tl.load(up + row[:, None] * rank + r[None, :], mask=(r < rank)[None, :], other=0.0)
            d = tl.load(low + token[None, :] * rank + r[:, None], mask=(r < rank)[:, None], other=0.0)
            if INTERPRET:
                u = u.to(tl.float32)
            branch = dot16(round_to(u, low.dtype.element_ty), d, branch)
        acc += branch
    if BIAS:
        acc += tl.load(bias + row).to(tl.float32)[:, None]
    if GELU:
        acc = gelu_tanh(acc)
    batch = tokens // tokens_per_batch
    inner = tokens - batch * tokens_per_batch
    at = batch.to(tl.int64) * batch_stride + inner.to(tl.int64) * token_stride
    mask = (rows < N)[:, None] & (tokens < M)[None, :]
    tl.store(out + at[None, :] + rows[:, None], round_to(acc, out.dtype.element_ty), mask=mask)
