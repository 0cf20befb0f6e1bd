"""Kernels of `quantize`: an input's codes, scales and down-projection from one reading of it."""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from .device import dot16, round_to
from .quantize_parts import (
    ROUNDING,
    divisors,
    e4m3,
    half_of,
    int4_codes,
    logistic,
    nvfp4_codes,
    once,
    smoothed,
    store_codes,
    within,
)

# Below, the reciprocal of a scale is infinite; a token so small counts as zeros.
SMALLEST = tl.constexpr(1.1754944e-38)


@triton.jit
def before(
    x_rows, second_rows, k0, cols, k, k1, mean, rstd, factor, offset,
    KIND: tl.constexpr, SECOND: tl.constexpr, EVEN: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """The tile [BM, BK] at columns `cols` of what is quantized, in the input's type; zeros beyond column k."""
    rows = x_rows
    if SECOND:
        # A branch, because Triton 3.9 loses the alignment of pointers that `tl.where` selects.
        if k0 < k1:
            rows = x_rows
        else:
            rows = second_rows - k1
    inside = (cols < k)[None, :]
    if EVEN:
        x = tl.load(rows + cols[None, :])
    else:
        x = tl.load(rows + cols[None, :], mask=inside, other=0.0)
    if KIND == "layer_norm":
        if EVEN:
            f = tl.load(factor + cols).to(tl.float32)
            o = tl.load(offset + cols).to(tl.float32)
        else:
            f = tl.load(factor + cols, mask=cols < k, other=0.0).to(tl.float32)
            o = tl.load(offset + cols, mask=cols < k, other=0.0).to(tl.float32)
        v = x.to(tl.float32) * rstd[:, None] - (mean * rstd)[:, None]
        v = v * (1.0 + f)[None, :] + o[None, :]
        return half_of(v if EVEN else tl.where(inside, v, 0.0), x.dtype, PTX)
    if KIND == "gelu":
        v = x.to(tl.float32)
        # GELU's tanh form is x times a logistic function.
        z = 1.5957691216057308 * (v + 0.044715 * v * v * v)
        return half_of(v * logistic(z, PTX), x.dtype, PTX)
    if KIND == "geglu" or KIND == "swiglu":
        if EVEN:
            gate = tl.load(rows + k + cols[None, :]).to(tl.float32)
        else:
            gate = tl.load(rows + k + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        if KIND == "geglu":
            gate = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
        else:
            gate = gate * logistic(gate, PTX)
        return half_of(x.to(tl.float32) * gate, x.dtype, PTX)
    return x


@triton.jit
def moments(x_rows, k, eps, BM: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr):
    """(mean, 1/√(variance + eps)) of every row, by Welford's sums for every column of a tile."""
    mean = tl.zeros((BM, BK), tl.float32)
    spread = tl.zeros((BM, BK), tl.float32)
    count = 0.0
    for k0 in tl.range(0, k, BK, num_stages=STAGES):
        cols = k0 + tl.arange(0, BK)
        count += 1.0
        if EVEN:
            x = tl.load(x_rows + cols[None, :]).to(tl.float32)
            delta = x - mean
        else:
            x = tl.load(x_rows + cols[None, :], mask=(cols < k)[None, :], other=0.0).to(tl.float32)
            delta = tl.where((cols < k)[None, :], x - mean, 0.0)
        step = delta * (1.0 / count)
        mean += step
        spread += delta * (delta - step)
    # How many columns of the row each column of the tile has seen.
    counts = ((k - 1 - tl.arange(0, BK) + BK) // BK).to(tl.float32)[None, :]
    total = tl.sum(mean * counts, 1) / k
    off = mean - total[:, None]
    variance = tl.sum(spread + counts * off * off, 1) / k
    return total, 1.0 / tl.sqrt_rn(variance + eps)


@triton.jit
def down_project(x, low, down, down_row, ranks, r, cols, k, WHOLE: tl.constexpr):
    """low + x·Dᵀ of a tile. WHOLE: no column and no rank is beyond the end."""
    if WHOLE:
        d = tl.load(down + ranks[None, :] * down_row + cols[:, None])
    else:
        d = tl.load(
            down + ranks[None, :] * down_row + cols[:, None], mask=(ranks < r)[None, :] & (cols < k)[:, None], other=0.0
        )
    return dot16(x, round_to(d.to(tl.float32), x.dtype) if d.dtype != x.dtype else d, low)


@triton.jit(do_not_specialize=["tokens"])
def quantize_kernel(
    x, second, smooth, factor, offset, down, low_scales, codes, scales, low, kept,
    x_batch, x_row, second_batch, second_row, factor_batch, offset_batch, down_row, low_scales_batch,
    tokens, k, k1, c, r, eps, largest,
    KIND: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr, SPLIT: tl.constexpr, ROTATE: tl.constexpr,
    RANGES: tl.constexpr, RANKS: tl.constexpr, WHOLE: tl.constexpr, EVEN: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """One program: BM tokens of one batch row. Arguments as `quantize` names them; absent tensors are None.

    RANGES: columns whose int4 codes are unsigned, None where there are none. RANKS: r rounded up to what tensor cores
    take, or 0. EVEN: k is a multiple of BK and equals c; WHOLE: r also equals RANKS. kept [M, k]: gets what is
    quantized, after `before`. largest: the largest number of the scales' type.
    """
    blocks = tl.cdiv(tokens, BM)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    token = (tl.program_id(0) % blocks) * BM + tl.arange(0, BM)
    valid = token < tokens
    rows = b * tokens + token
    # Rows beyond the end read the last one, so that loads need no mask.
    token = tl.minimum(token, tokens - 1).to(tl.int64)
    x_rows = x + b * x_batch + token[:, None] * x_row
    SECOND: tl.constexpr = second is not None
    second_rows = x_rows
    if SECOND:
        second_rows = second + b * second_batch + token[:, None] * second_row
    mean = tl.zeros((BM,), tl.float32)
    rstd = mean
    if KIND == "layer_norm":
        factor += b * factor_batch
        offset += b * offset_batch
        mean, rstd = moments(x_rows, k, eps, BM, BK, EVEN, STAGES)

    PER_TOKEN: tl.constexpr = PRECISION == "int8" or PRECISION == "fp8"
    TOP: tl.constexpr = 127.0 if PRECISION == "int8" else 448.0
    ranks = tl.arange(0, RANKS if RANKS else 1)
    acc = tl.zeros((BM, RANKS if RANKS else 1), tl.float32)
    amax = tl.zeros((BM, BK), tl.float32)
    s = divisors(smooth, tl.arange(0, BK), k)
    for k0 in tl.range(0, c, BK, num_stages=STAGES):
        cols = k0 + tl.arange(0, BK)
        s_next = divisors(smooth, cols + BK, k)
        v = before(x_rows, second_rows, k0, cols, k, k1, mean, rstd, factor, offset, KIND, SECOND, EVEN, PTX)
        if RANKS:
            v = once(v, KIND, PTX)
            acc = down_project(v, acc, down, down_row, ranks, r, cols, k, WHOLE)
        if kept is not None:
            tl.store(kept + rows[:, None] * k + cols[None, :], v, mask=valid[:, None] & (cols < k)[None, :])
        h = smoothed(v, cols, s, BM, smooth is not None, not PER_TOKEN, RANGES, ROTATE, PTX)
        s = s_next
        if PER_TOKEN:
            amax = tl.maximum(amax, tl.abs(h), propagate_nan=tl.PropagateNan.ALL)
        else:
            # 4-bit codes are those of values in the input's own type.
            h = half_of(h, x.dtype.element_ty, PTX)
            if PRECISION == "int4":
                unsigned = None
                if RANGES is not None:
                    unsigned = within(k0 + 64 * tl.arange(0, BK // 64), RANGES)
                q, exact = int4_codes(h, unsigned, BM, BK)
                groups = k0 // 64 + tl.arange(0, BK // 64)
                stored = tl.minimum(exact, largest, propagate_nan=tl.PropagateNan.ALL)
                stored = round_to(stored, x.dtype.element_ty).to(tl.float32)
                tl.store(scales + rows[:, None] * (c // 64) + groups[None, :], stored, mask=valid[:, None])
            else:
                q, exact = nvfp4_codes(h, BM, BK)
                groups = k0 // 16 + tl.arange(0, BK // 16)
                tl.store(scales + rows[:, None] * (c // 16) + groups[None, :], e4m3(exact), mask=valid[:, None])
            store_codes(codes, q, rows, valid, k0, c, BM, BK, PACKED, SPLIT)

    if RANKS:
        if low_scales is not None:
            factors = tl.load(low_scales + b * low_scales_batch + ranks, mask=ranks < r, other=0.0)
            acc = acc * factors[None, :]
        at = low + rows[:, None] * r + ranks[None, :]
        tl.store(at, round_to(acc, low.dtype.element_ty), mask=valid[:, None] & (ranks < r)[None, :])

    if PER_TOKEN:
        scale = tl.div_rn(tl.max(amax, 1), tl.full((BM,), TOP, tl.float32))
        # The maximum of a row leaves NaN out; a row that holds one, or an infinity, must not look like numbers.
        scale = tl.where(scale < SMALLEST, 1.0, scale) + tl.sum(amax * 0.0, 1)
        tl.store(scales + rows, scale, mask=valid)
        top = (1.0 / scale)[:, None]
        s = divisors(smooth, tl.arange(0, BK), k)
        for k0 in tl.range(0, c, BK, num_stages=STAGES):
            cols = k0 + tl.arange(0, BK)
            s_next = divisors(smooth, cols + BK, k)
            v = before(x_rows, second_rows, k0, cols, k, k1, mean, rstd, factor, offset, KIND, SECOND, EVEN, PTX)
            h = smoothed(v, cols, s, BM, smooth is not None, False, None, ROTATE, PTX) * top
            s = s_next
            if PRECISION == "int8":
                q = (h + ROUNDING).to(tl.int32, bitcast=True).to(tl.int8)
            else:
                q = e4m3(h)
            store_codes(codes, q, rows, valid, k0, c, BM, BK, PACKED, SPLIT)


@triton.jit(do_not_specialize=["m"])
def down_kernel(
    x, down, low_scales, low, x_row, down_row, low_scales_batch, m, tokens, k, r,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """low [m, r] = x [m, k]·Dᵀ, times low_scales: for ranks beyond what `quantize_kernel` holds."""
    tiles = tl.cdiv(r, BN)
    rows = ((tl.program_id(0) // tiles) * BM + tl.arange(0, BM)).to(tl.int64)
    ranks = (tl.program_id(0) % tiles) * BN + tl.arange(0, BN)
    x_rows = x + tl.minimum(rows, m - 1)[:, None] * x_row
    acc = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, k, BK):
        cols = k0 + tl.arange(0, BK)
        v = tl.load(x_rows + cols[None, :], mask=(cols < k)[None, :], other=0.0)
        acc = down_project(v, acc, down, down_row, ranks, r, cols, k, False)
    inside = (rows < m)[:, None] & (ranks < r)[None, :]
    if low_scales is not None:
        at = low_scales + (rows // tokens)[:, None] * low_scales_batch + ranks[None, :]
        acc = acc * tl.load(at, mask=inside, other=0.0)
    tl.store(low + rows[:, None] * r + ranks[None, :], round_to(acc, low.dtype.element_ty), mask=inside)
