"""The kernel of `EightBit`: a tile of the 8-bit product, and everything up to its one rounding."""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl

from .device import INTERPRET, dot16, gelu_tanh


@triton.jit
def _tile_of(index, M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Row and column of the index-th tile: `GROUP` rows of tiles at a time, so that tiles under way share operands."""
    down = tl.cdiv(M, BM)
    across = tl.cdiv(N, BN)
    first = index // (GROUP * across) * GROUP
    height = tl.minimum(down - first, GROUP)
    within = index % (GROUP * across)
    return (first + within % height) * BM, within // height * BN


@triton.jit
def _sum(
    codes, weight, m0, n0, M, N, columns, weight_stride,
    FP8: tl.constexpr, TMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PROMOTE: tl.constexpr,
):  # fmt: skip
    """codes·weightᵀ over all columns, int32 or float32 [BM, BN]. Rows beyond the last hold anything."""
    acc = tl.zeros((BM, BN), tl.float32 if FP8 else tl.int32)
    if TMA:
        for k in range(0, columns, BK):
            a = codes.load([m0, k])
            b = weight.load([n0, k])
            acc = _dot8(a, b.T, acc, FP8, PROMOTE)
    else:
        rows = tl.minimum(m0 + tl.arange(0, BM), M - 1).to(tl.int64)
        outputs = tl.minimum(n0 + tl.arange(0, BN), N - 1).to(tl.int64)
        step = tl.arange(0, BK)
        a_place = codes + rows[:, None] * columns + step[None, :]
        b_place = weight + outputs[None, :] * weight_stride + step[:, None]
        for _ in range(0, columns, BK):
            acc = _dot8(tl.load(a_place), tl.load(b_place), acc, FP8, PROMOTE)
            a_place += BK
            b_place += BK
    return acc


@triton.jit
def _dot8(a, b, acc, FP8: tl.constexpr, PROMOTE: tl.constexpr):
    if not FP8:
        acc = tl.dot(a, b, acc, out_dtype=tl.int32)
    elif PROMOTE > 0:
        acc = tl.dot(a, b, acc, max_num_imprecise_acc=PROMOTE)
    else:
        acc = tl.dot(a, b, acc)
    return acc


@triton.jit
def _add_branch(y, low, up, m0, n0, M, N, rank, RANK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """y + low·upᵀ, `RANK` directions at a time."""
    rows = tl.minimum(m0 + tl.arange(0, BM), M - 1).to(tl.int64)
    outputs = tl.minimum(n0 + tl.arange(0, BN), N - 1).to(tl.int64)
    for start in tl.range(0, rank, RANK, num_stages=1):
        step = start + tl.arange(0, RANK)
        a = tl.load(low + rows[:, None] * rank + step[None, :], mask=step[None, :] < rank, other=0.0)
        b = tl.load(up + outputs[None, :] * rank + step[:, None], mask=step[:, None] < rank, other=0.0)
        y = dot16(a, b.to(a.dtype), y)
    return y


@triton.jit
def _normed(y, n0, normed, eps, HEAD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Every head below column `normed` divided by its root mean square."""
    HEADS: tl.constexpr = BN // HEAD
    heads = tl.reshape(y, (BM, HEADS, HEAD))
    factor = tl.rsqrt(tl.sum(heads * heads, 2) / HEAD + eps)
    factor = tl.where((n0 + tl.arange(0, HEADS) * HEAD < normed)[None, :], factor, 1.0)
    return tl.reshape(heads * factor[:, :, None], (BM, BN))


@triton.jit
def _turned(
    y, n0, tokens, first_weight, second_weight, cosine, sine, first, normed,
    HEAD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Heads times their layer's weight, then pairs (2i, 2i+1) rotated, in columns below `normed`."""
    outputs = n0 + tl.arange(0, BN)
    if first_weight is not None:
        use = outputs < first
        y *= tl.load(first_weight + outputs % HEAD, mask=use, other=1.0).to(tl.float32)[None, :]
    if second_weight is not None:
        use = (outputs >= first) & (outputs < normed)
        y *= tl.load(second_weight + outputs % HEAD, mask=use, other=1.0).to(tl.float32)[None, :]
    if cosine is not None:
        angle = tokens[:, None] * HEAD + (outputs % HEAD)[None, :]
        use = (outputs < normed)[None, :]
        real, imaginary = tl.split(tl.reshape(y, (BM, BN // 2, 2)))
        swapped = tl.reshape(tl.join(-imaginary, real), (BM, BN))
        y *= tl.load(cosine + angle, mask=use, other=1.0)
        y += swapped * tl.load(sine + angle, mask=use, other=0.0)
    return y


@triton.jit
def _store(
    y, m0, n0, out, M, N, length, batch_stride, token_stride, first_weight, second_weight, cosine, sine, first, normed,
    HEAD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Rounds and stores a tile; heads are weighted and rotated before."""
    rows = m0 + tl.arange(0, BM)
    outputs = n0 + tl.arange(0, BN)
    batch = rows // length
    token = rows - batch * length
    if HEAD > 0:  # noqa: SIM102 (decided when compiled, the other when run)
        if n0 < normed:
            y = _turned(y, n0, token, first_weight, second_weight, cosine, sine, first, normed, HEAD, BM, BN)
    place = batch.to(tl.int64) * batch_stride + token.to(tl.int64) * token_stride
    inside = (rows < M)[:, None] & (outputs < N)[None, :]
    tl.store(out + place[:, None] + outputs[None, :], y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _finish(
    y, m0, n0, out, M, N, length, batch_stride, token_stride, first_weight, second_weight, cosine, sine, first, normed,
    eps, HEAD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    if HEAD > 0:
        y = _normed(y, n0, normed, eps, HEAD, BM, BN)
        left, right = tl.split(tl.permute(tl.reshape(y, (BM, 2, BN // 2)), (0, 2, 1)))
        _store(
            left, m0, n0, out, M, N, length, batch_stride, token_stride, first_weight, second_weight, cosine, sine,
            first, normed, HEAD, BM, BN // 2,
        )  # fmt: skip
        _store(
            right, m0, n0 + BN // 2, out, M, N, length, batch_stride, token_stride, first_weight, second_weight,
            cosine, sine, first, normed, HEAD, BM, BN // 2,
        )  # fmt: skip
    else:
        _store(
            y, m0, n0, out, M, N, length, batch_stride, token_stride, first_weight, second_weight, cosine, sine,
            first, normed, HEAD, BM, BN,
        )  # fmt: skip


@triton.jit
def _tile(
    index, codes, weight, row_scales, scales, bias, low, up, out,
    first_weight, second_weight, cosine, sine, first, normed, eps,
    M, N, columns, weight_stride, rank, length, batch_stride, token_stride,
    FP8: tl.constexpr, TMA: tl.constexpr, PROMOTE: tl.constexpr, GELU: tl.constexpr, HEAD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, RANK: tl.constexpr,
    HALVES: tl.constexpr,
):  # fmt: skip
    m0, n0 = _tile_of(index, M, N, BM, BN, GROUP)
    acc = _sum(codes, weight, m0, n0, M, N, columns, weight_stride, FP8, TMA, BM, BN, BK, PROMOTE)
    rows = tl.minimum(m0 + tl.arange(0, BM), M - 1)
    outputs = tl.minimum(n0 + tl.arange(0, BN), N - 1)
    y = acc.to(tl.float32) * tl.load(row_scales + rows)[:, None] * tl.load(scales + outputs).to(tl.float32)[None, :]
    if low is not None:
        y = _add_branch(y, low, up, m0, n0, M, N, rank, RANK, BM, BN)
    if bias is not None:
        y += tl.load(bias + outputs).to(tl.float32)[None, :]
    if GELU:
        y = gelu_tanh(y)
    if HALVES:
        upper, lower = tl.split(tl.permute(tl.reshape(y, (2, BM // 2, BN)), (1, 2, 0)))
        _finish(
            upper, m0, n0, out, M, N, length, batch_stride, token_stride, first_weight, second_weight, cosine, sine,
            first, normed, eps, HEAD, BM // 2, BN,
        )  # fmt: skip
        _finish(
            lower, m0 + BM // 2, n0, out, M, N, length, batch_stride, token_stride, first_weight, second_weight,
            cosine, sine, first, normed, eps, HEAD, BM // 2, BN,
        )  # fmt: skip
    else:
        _finish(
            y, m0, n0, out, M, N, length, batch_stride, token_stride, first_weight, second_weight, cosine, sine,
            first, normed, eps, HEAD, BM, BN,
        )  # fmt: skip


@triton.jit(do_not_specialize=["M", "length"])
def eight_bit_kernel(
    codes, weight, row_scales, scales, bias, low, up, out,
    first_weight, second_weight, cosine, sine, first, normed, eps,
    M, N, columns, weight_stride, rank, length, batch_stride, token_stride,
    FP8: tl.constexpr, TMA: tl.constexpr, PROMOTE: tl.constexpr, GELU: tl.constexpr, HEAD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, RANK: tl.constexpr,
    HALVES: tl.constexpr, PERSISTENT: tl.constexpr,
):  # fmt: skip
    """out[m // length, m % length, n] of `EightBit.multiply`.

    `HALVES`: a tile is finished by halves of its rows, which takes fewer registers.

    codes [M, columns], weight [N, columns]: pointers, or descriptors of blocks [BM, BK] and [BN, BK] (TMA); columns a
    multiple of BK. HEAD: features of a head to be normed, 0 = none.
    """
    if PERSISTENT:
        tiles = tl.cdiv(M, BM) * tl.cdiv(N, BN)
        for index in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=not INTERPRET):
            _tile(
                index, codes, weight, row_scales, scales, bias, low, up, out,
                first_weight, second_weight, cosine, sine, first, normed, eps,
                M, N, columns, weight_stride, rank, length, batch_stride, token_stride,
                FP8, TMA, PROMOTE, GELU, HEAD, BM, BN, BK, GROUP, RANK, HALVES,
            )  # fmt: skip
    else:
        _tile(
            tl.program_id(0), codes, weight, row_scales, scales, bias, low, up, out,
            first_weight, second_weight, cosine, sine, first, normed, eps,
            M, N, columns, weight_stride, rank, length, batch_stride, token_stride,
            FP8, TMA, PROMOTE, GELU, HEAD, BM, BN, BK, GROUP, RANK, HALVES,
        )  # fmt: skip
