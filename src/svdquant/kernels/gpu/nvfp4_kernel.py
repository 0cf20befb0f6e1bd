"""The kernel of `nvfp4.NVFP4`: `tl.dot_scaled` with what SVDQuant adds to it."""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl

from .device import INTERPRET, dot16, gelu_tanh, round_to
from .unpack import e4m3_float, nibble_value


@triton.jit
def _values(packed, scales, position: tl.constexpr):
    """float32 [R, C/2]: every second value of uint8 [R, C/2] of two, times its scale of [R, C/16]."""
    R: tl.constexpr = packed.shape[0]
    H: tl.constexpr = packed.shape[1]
    spread = tl.broadcast_to(e4m3_float(scales)[:, :, None], (R, H // 8, 8))
    return nibble_value(packed.to(tl.int32), position, True) * tl.reshape(spread, (R, H))


@triton.jit
def _dot_nvfp4(a, a_scales, b, b_scales, acc):
    """acc + a·bᵀ. a, b: uint8 [rows, K/2] of e2m1 pairs; scales: e4m3 [rows, K/16], uint8 in the interpreter.

    The interpreter has no `tl.dot_scaled`, or one that reads every scale as e8m0 (3.9): it gets the formula.
    """
    if INTERPRET:
        acc = tl.dot(_values(a, a_scales, 0), tl.trans(_values(b, b_scales, 0)), acc)
        return tl.dot(_values(a, a_scales, 1), tl.trans(_values(b, b_scales, 1)), acc)
    return tl.dot_scaled(a, a_scales, "e2m1", tl.trans(b), b_scales, "e2m1", acc)


@triton.jit(do_not_specialize=["M", "tokens_per_batch"])
def nvfp4_kernel(
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
    width,
    a_stride,
    as_stride,
    w_stride,
    ws_stride,
    rank,
    tokens_per_batch,
    batch_stride,
    token_stride,
    BLOCKS: tl.constexpr,
    WHOLE: tl.constexpr,
    RC: tl.constexpr,
    BIAS: tl.constexpr,
    GELU: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """outᵀ [N, M] = Ŵ·Q(x)ᵀ + U·lowᵀ + b. The weight is the first operand: what belongs to an output, a thread of
    Blackwell's then has once, and few tokens need no more than few columns of the result.

    codes: uint8 [M, ≥ BLOCKS·width/2], weight: uint8 [N, BLOCKS·width/2], rows of a_stride and w_stride bytes;
    a_scales, w_scales: e4m3, one per 16 columns, row-major, rows of as_stride and ws_stride.
    outer: [N, BLOCKS], the factor of each block of `width` columns. low: [M, rank], up: [N, rank], taken RC columns at
    a time; 0 = no branch. WHOLE: width is a multiple of BK.

    The order of additions over the columns is the same for every tile with the same BK.
    """
    tokens = tl.program_id(0) * BM + tl.arange(0, BM)
    rows = tl.program_id(1) * BN + tl.arange(0, BN)
    # Those beyond M and N read the first one, and are not stored.
    token = tl.where(tokens < M, tokens, 0).to(tl.int64)
    row = tl.where(rows < N, rows, 0).to(tl.int64)
    pairs = tl.arange(0, BK // 2)[None, :]
    groups = tl.arange(0, BK // 16)[None, :]
    a_at = codes + token[:, None] * a_stride + pairs
    as_at = a_scales + token[:, None] * as_stride + groups
    w_at = weight + row[:, None] * w_stride + pairs
    ws_at = w_scales + row[:, None] * ws_stride + groups
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    for block in range(BLOCKS):
        part = tl.zeros((BN, BM), dtype=tl.float32)
        for start in range(0, width, BK):
            at = block * width + start
            if WHOLE:
                at = tl.multiple_of(at, BK)
                a = tl.load(a_at + at // 2)
                a_s = tl.load(as_at + at // 16)
                w = tl.load(w_at + at // 2)
                w_s = tl.load(ws_at + at // 16)
            else:
                pair_ok = pairs < (width - start) // 2
                group_ok = groups < (width - start) // 16
                a = tl.load(a_at + at // 2, mask=pair_ok, other=0)
                a_s = tl.load(as_at + at // 16, mask=group_ok, other=0.0)
                w = tl.load(w_at + at // 2, mask=pair_ok, other=0)
                w_s = tl.load(ws_at + at // 16, mask=group_ok, other=0.0)
            part = _dot_nvfp4(w, w_s, a, a_s, part)
        factor = tl.load(outer + row * BLOCKS + block).to(tl.float32)
        acc = tl.fma(part, tl.broadcast_to(factor[:, None], (BN, BM)), acc)
    if RC > 0:
        for start in range(0, rank, RC):
            r = (start + tl.arange(0, RC))[None, :]
            d = tl.load(low + token[:, None] * rank + r, mask=r < rank, other=0.0)
            u = tl.load(up + row[:, None] * rank + r, mask=r < rank, other=0.0)
            if INTERPRET:
                u = u.to(tl.float32)
            acc = dot16(round_to(u, low.dtype.element_ty), tl.trans(d), acc)
    if BIAS:
        acc += tl.load(bias + row).to(tl.float32)[:, None]
    if GELU:
        acc = gelu_tanh(acc)
    batch = tokens // tokens_per_batch
    inner = tokens - batch * tokens_per_batch
    to = out + (batch.to(tl.int64) * batch_stride + inner.to(tl.int64) * token_stride)[None, :] + rows[:, None]
    tl.store(to, round_to(acc, out.dtype.element_ty), mask=(rows < N)[:, None] & (tokens < M)[None, :])
