"""The kernels of `ScaledMM`: the branch as further columns of both operands."""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl

from .unpack import to_e4m3


@triton.jit
def largest_kernel(up, scales, partial, N, rank, PARTS: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr):
    """partial[i, r]: the largest |up[n, r]|/scales[n] of the i-th of `PARTS` ranges of rows."""
    part = tl.program_id(0)
    ranks = tl.program_id(1) * RANK + tl.arange(0, RANK)
    size = tl.cdiv(N, PARTS)
    top = tl.zeros((RANK,), tl.float32)
    for start in range(part * size, tl.minimum((part + 1) * size, N), ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = rows < tl.minimum((part + 1) * size, N)
        mask = inside[:, None] & (ranks < rank)[None, :]
        u = tl.load(up + rows.to(tl.int64)[:, None] * rank + ranks[None, :], mask=mask, other=0).to(tl.float32)
        top = tl.maximum(top, tl.max(tl.abs(u) / tl.load(scales + rows, mask=inside, other=1.0)[:, None], 0))
    tl.store(partial + part * rank + ranks, top, mask=ranks < rank)


@triton.jit
def _three_terms(value, place, width, mask, FIRST: tl.constexpr):
    """A factor as e4m3 plus its remainder: (high, high, low) where `FIRST`, else (high, low, high)."""
    high = to_e4m3(value)
    low = to_e4m3(value - high.to(tl.float32))
    tl.store(place, high, mask=mask)
    tl.store(place + width, high if FIRST else low, mask=mask)
    tl.store(place + 2 * width, low if FIRST else high, mask=mask)


@triton.jit
def append_up_kernel(
    up, scales, partial, balance, weight, N, rank, width, columns, stride,
    PARTS: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """Columns from `columns` on of weight [N, stride]: up/scales, each direction divided by its `balance`."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    ranks = tl.program_id(1) * RANK + tl.arange(0, RANK)
    parts = tl.arange(0, PARTS)[:, None] * rank + ranks[None, :]
    c = tl.max(tl.load(partial + parts, mask=(ranks < rank)[None, :], other=0), 0) / 448
    c = tl.where(c > 0, c, 1.0)
    if tl.program_id(0) == 0:
        tl.store(balance + ranks, c, mask=ranks < rank)
    inside = rows < N
    mask = inside[:, None] & (ranks < rank)[None, :]
    u = tl.load(up + rows.to(tl.int64)[:, None] * rank + ranks[None, :], mask=mask, other=0).to(tl.float32)
    # Dividing twice may end a bit above.
    b = tl.clamp(u / tl.load(scales + rows, mask=inside, other=1.0)[:, None] / c[None, :], -448.0, 448.0)
    place = weight + rows.to(tl.int64)[:, None] * stride + columns + ranks[None, :]
    _three_terms(b, place, width, inside[:, None] & (ranks < width)[None, :], False)


@triton.jit(do_not_specialize=["M"])
def append_low_kernel(
    codes, row_scales, low, balance, wide, scales, M, rank, width, columns, stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """codes [M, columns] and low·balance/scale as e4m3 wide [M, stride], of one scale per row.

    Where low does not fit, the row's scale is multiplied by a power of two.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < M
    line = rows.to(tl.int64)[:, None]
    scale = tl.load(row_scales + rows, mask=inside, other=1.0)
    top = tl.zeros((ROWS,), tl.float32)
    for start in range(0, rank, RANK):
        ranks = start + tl.arange(0, RANK)
        mask = inside[:, None] & (ranks < rank)[None, :]
        a = tl.load(low + line * rank + ranks[None, :], mask=mask, other=0).to(tl.float32)
        a *= tl.load(balance + ranks, mask=ranks < rank, other=0.0)[None, :]
        top = tl.maximum(top, tl.max(tl.abs(a), 1))
    times = tl.exp2(tl.ceil(tl.log2(tl.maximum(top / scale / 448, 1.0))))
    tl.store(scales + rows, scale * times, mask=inside)
    smaller = (1.0 / times)[:, None]
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        mask = inside[:, None] & (column < columns)
        x = tl.load(codes + line * columns + column, mask=mask).to(tl.float32)
        tl.store(wide + line * stride + column, to_e4m3(x * smaller), mask=mask)
    for start in range(0, width, RANK):
        ranks = start + tl.arange(0, RANK)
        mask = inside[:, None] & (ranks < rank)[None, :]
        a = tl.load(low + line * rank + ranks[None, :], mask=mask, other=0).to(tl.float32)
        a *= tl.load(balance + ranks, mask=ranks < rank, other=0.0)[None, :]
        a = tl.clamp(a / (scale * times)[:, None], -448.0, 448.0)
        place = wide + line * stride + columns + ranks[None, :]
        _three_terms(a, place, width, inside[:, None] & (ranks < width)[None, :], True)
