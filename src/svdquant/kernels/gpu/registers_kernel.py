"""The kernels of `Registers`: a table of group ratios, and the product that unpacks weights in registers."""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl

from .device import dot16, gelu_tanh
from .unpack import group_ratio, group_scales, pair, row_top, split_eight_bits


@triton.jit
def ratios_kernel(wscales, ratios, scales, N, groups, TOP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """wscales [N, groups] to ratios int32 [groups, N] (transposed; a float16 twice), and the rows' 8-bit scales [N]."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < N
    top = row_top(wscales, None, rows, inside, groups, 0, False, BLOCK)
    for start in range(0, groups, BLOCK):
        group = start + tl.arange(0, BLOCK)[None, :]
        mask = inside[:, None] & (group < groups)
        scale = group_scales(wscales, None, rows[:, None], group, mask, groups, 0, False)
        tl.store(ratios + group * N + rows[:, None], pair(group_ratio(scale, top[:, None], TOP)), mask=mask)
    tl.store(scales + rows, tl.div_rn(top, tl.full(top.shape, TOP, tl.float32)), mask=inside)


@triton.jit(do_not_specialize=["M", "length"])
def registers_kernel(
    codes, stored, ratios, row_scales, scales, bias, low, up, out,
    M, N, columns, groups, rank, length, batch_stride, token_stride,
    FP8: tl.constexpr, GELU: tl.constexpr, PTX: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    GROUP: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """out[m // length, m % length, n] of `Registers.multiply`: a tile of BN outputs by BM rows, transposed.

    codes [M, columns] in split order; stored: bytes [N, columns / 2 or less]; ratios int32 [groups, N] of 64 columns
    times PARTS. A step takes 128 columns: 64 bytes of weights, whose low nibbles meet the even codes, the high ones the
    odd codes.
    """
    index = tl.program_id(0)
    across = tl.cdiv(N, BN)
    first = index // (GROUP * across) * GROUP
    height = tl.minimum(tl.cdiv(M, BM) - first, GROUP)
    m0 = (first + index % (GROUP * across) % height) * BM
    n0 = index % (GROUP * across) // height * BN
    outputs = tl.minimum(n0 + tl.arange(0, BN), N - 1)
    rows = tl.minimum(m0 + tl.arange(0, BM), M - 1)
    byte = tl.arange(0, 64)
    stride = groups * PARTS * 32
    weights = stored + outputs.to(tl.int64)[:, None] * stride + byte[None, :]
    even = codes + rows.to(tl.int64)[None, :] * columns + (byte // 32 * 64 + byte % 32)[:, None]
    acc = tl.zeros((BN, BM), tl.float32 if FP8 else tl.int32)
    for k in range(0, columns, 128):
        group = k // (64 * PARTS)
        upper = tl.minimum((k + 64) // (64 * PARTS), groups - 1)
        near = tl.load(ratios + group * N + outputs)
        far = tl.load(ratios + upper * N + outputs)
        ratio = tl.where(byte[None, :] < 32, near[:, None], far[:, None])
        packed = tl.load(weights, mask=(k // 2 + byte < stride)[None, :], other=0)
        a, b = split_eight_bits(packed, ratio, FP8, PTX)
        if FP8:
            acc = tl.dot(a, tl.load(even), acc)
            acc = tl.dot(b, tl.load(even + 32), acc)
        else:
            acc = tl.dot(a, tl.load(even), acc, out_dtype=tl.int32)
            acc = tl.dot(b, tl.load(even + 32), acc, out_dtype=tl.int32)
        weights += 64
        even += 128
    y = acc.to(tl.float32) * tl.load(row_scales + rows)[None, :] * tl.load(scales + outputs)[:, None]
    if low is not None:
        for start in tl.range(0, rank, RANK, num_stages=1):
            step = start + tl.arange(0, RANK)
            there = step < rank
            u = tl.load(up + outputs.to(tl.int64)[:, None] * rank + step[None, :], mask=there[None, :], other=0.0)
            h = tl.load(low + rows.to(tl.int64)[None, :] * rank + step[:, None], mask=there[:, None], other=0.0)
            y = dot16(u.to(h.dtype), h, y)
    if bias is not None:
        y += tl.load(bias + outputs).to(tl.float32)[:, None]
    if GELU:
        y = gelu_tanh(y)
    row = m0 + tl.arange(0, BM)
    output = n0 + tl.arange(0, BN)
    batch = row // length
    place = batch.to(tl.int64) * batch_stride + (row - batch * length).to(tl.int64) * token_stride
    inside = (row < M)[:, None] & (output < N)[None, :]
    tl.store(out + place[:, None] + output[None, :], tl.trans(y.to(out.dtype.element_ty)), mask=inside)
