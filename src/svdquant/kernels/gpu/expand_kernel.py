"""The kernel of `expand`: a program turns some rows of a stored weight into 8-bit codes."""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl

from .device import round_even
from .unpack import eight_bits, group_ratio, group_scales, nibble_value, row_top, to_e4m3


@triton.jit
def _shift(smooth, columns, UNSIGNED: tl.constexpr, SHIFT: tl.constexpr):
    """shift/s of input columns, float32; zero outside `UNSIGNED`."""
    inside = columns < 0
    for i in tl.static_range(len(UNSIGNED)):
        inside |= (columns >= UNSIGNED[i][0]) & (columns < UNSIGNED[i][1])
    value = tl.where(inside, SHIFT, 0.0)
    if smooth is not None:
        value = tl.div_rn(value, tl.load(smooth + columns, mask=inside, other=1.0).to(tl.float32))
    return value


@triton.jit
def expand_kernel(
    stored, wscales, outer, smooth, bias, source_up, weight, scales, out_bias, up,
    N, stored_columns, columns, groups, stride, rank,
    WEIGHTS: tl.constexpr, FP8: tl.constexpr, TOP: tl.constexpr, GROUP: tl.constexpr, PART: tl.constexpr,
    BLOCKS: tl.constexpr, UNSIGNED: tl.constexpr, SHIFT: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    UP: tl.constexpr, PTX: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """See `Expanded`. stored: words of eight codes (int32) or int8 codes; weight: int64, or int8 where int8 is stored;
    stride: bytes between its rows. GROUP: columns of a scale, 0 = the row; PART: columns that surely share one.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < N
    E4M3: tl.constexpr = WEIGHTS == "nvfp4"
    top = row_top(wscales, outer, rows, inside, groups, BLOCKS, E4M3, 128 if GROUP > 0 else 1)
    if WEIGHTS == "int8":
        added = _expand_bytes(
            stored, wscales, outer, smooth, weight, rows, inside, top, stored_columns, columns, groups, stride,
            FP8, TOP, GROUP, BLOCKS, UNSIGNED, SHIFT, WEIGHT, ROWS, COLUMNS,
        )  # fmt: skip
    else:
        added = _expand_words(
            stored, wscales, outer, smooth, weight, rows, inside, top, stored_columns, columns, groups, stride,
            E4M3, FP8, TOP, GROUP, PART, BLOCKS, UNSIGNED, SHIFT, WEIGHT, PTX, ROWS, COLUMNS,
        )  # fmt: skip
    if WEIGHT:
        tl.store(scales + rows, tl.div_rn(top, tl.full(top.shape, TOP, tl.float32)), mask=inside)
    if BIAS:
        if bias is not None:
            added += tl.load(bias + rows, mask=inside, other=0).to(tl.float32)
        tl.store(out_bias + rows, added, mask=inside)
    if UP:
        for start in range(0, rank, 32):
            ranks = start + tl.arange(0, 32)[None, :]
            place = rows[:, None] * rank + ranks
            mask = inside[:, None] & (ranks < rank)
            tl.store(up + place, tl.load(source_up + place, mask=mask), mask=mask)


@triton.jit
def _expand_words(
    stored, wscales, outer, smooth, weight, rows, inside, top, stored_columns, columns, groups, stride,
    NVFP4: tl.constexpr, FP8: tl.constexpr, TOP: tl.constexpr, GROUP: tl.constexpr, PART: tl.constexpr,
    BLOCKS: tl.constexpr, UNSIGNED: tl.constexpr, SHIFT: tl.constexpr, WEIGHT: tl.constexpr, PTX: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """4-bit codes, as [rows, parts of a group, words]. Returns Ŵ·(shift/s) of the rows."""
    WORDS: tl.constexpr = PART // 8
    PARTS: tl.constexpr = COLUMNS // PART
    line = rows.to(tl.int64)[:, None, None]
    added = tl.zeros((ROWS, PARTS, WORDS), tl.float32)
    for start in range(0, columns, COLUMNS):
        part = start // PART + tl.arange(0, PARTS)[None, :, None]
        word = part * WORDS + tl.arange(0, WORDS)[None, None, :]
        there = inside[:, None, None] & (part * PART < stored_columns)
        codes = tl.load(stored + line * (stored_columns // 8) + word, mask=there, other=0)
        group = part * PART // GROUP
        scale = group_scales(wscales, outer, rows[:, None, None], group, there, groups, BLOCKS, NVFP4)
        if WEIGHT:
            ratio = group_ratio(scale, top[:, None, None], TOP)
            low, high = eight_bits(codes, tl.broadcast_to(ratio, codes.shape), NVFP4, FP8, PTX)
            both = (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)
            within = inside[:, None, None] & (part * PART < columns)
            tl.store(weight + line * (stride // 8) + word, both, mask=within)
        if len(UNSIGNED) > 0:
            total = tl.zeros_like(added)
            for k in tl.static_range(8):
                total += nibble_value(codes, k, NVFP4) * _shift(smooth, word * 8 + k, UNSIGNED, SHIFT)
            added += total * scale
    return tl.sum(tl.sum(added, 2), 1)


@triton.jit
def _expand_bytes(
    stored, wscales, outer, smooth, weight, rows, inside, top, stored_columns, columns, groups, stride,
    FP8: tl.constexpr, TOP: tl.constexpr, GROUP: tl.constexpr, BLOCKS: tl.constexpr, UNSIGNED: tl.constexpr,
    SHIFT: tl.constexpr, WEIGHT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """int8 codes, as [rows, columns]. Returns Ŵ·(shift/s) of the rows."""
    line = rows.to(tl.int64)[:, None]
    added = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        there = inside[:, None] & (column < stored_columns)
        codes = tl.load(stored + line * stored_columns + column, mask=there, other=0).to(tl.float32)
        group = column // GROUP if GROUP > 0 else column * 0
        scale = group_scales(wscales, outer, rows[:, None], group, there, groups, BLOCKS, False)
        if WEIGHT:
            value = codes * group_ratio(scale, top[:, None], TOP).to(tl.float32)
            within = inside[:, None] & (column < columns)
            place = weight + line * stride + column
            if FP8:
                eight = to_e4m3(value.to(tl.float16).to(tl.float32)).to(tl.int8, bitcast=True)
            else:
                eight = round_even(value).to(tl.int8)
            tl.store(place, eight, mask=within)
        if len(UNSIGNED) > 0:
            added += codes * scale * _shift(smooth, column, UNSIGNED, SHIFT)
    return tl.sum(added, 1)
