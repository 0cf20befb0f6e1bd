"""Inside kernels: stored weight codes turned into 8-bit ones, eight 4-bit codes (a 32-bit word) at a time.

A row's 8-bit scale is its largest group scale divided by a constant (`TOP`); every group then multiplies its codes by
its `ratio`, at most `TOP`, rounded to float16. That rounding (2⁻¹¹) lets one instruction scale two codes, and all ways
to compute it agree bit for bit: code·ratio is exact in float32, and adding 1536 in float16 rounds it to the nearest
integer, halves to even, whose low byte is the code.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl

from .device import INTERPRET, round_even

# Largest 8-bit magnitude over the largest stored one. int8: 127 for |code| = 8 (int4), 6 (nvfp4). e4m3: powers of two,
# so that a row's largest groups keep their scale exactly.
TOP = {
    ("int4", "int8"): 127 / 8,
    ("nvfp4", "int8"): 127 / 6,
    ("int8", "int8"): 1.0,
    ("int4", "fp8"): 32.0,
    ("nvfp4", "fp8"): 64.0,
    ("int8", "fp8"): 2.0,
}


@triton.jit
def e4m3_float(byte):
    """float32 of e4m3's bits, on chips that know no such type."""
    bits = byte.to(tl.int16)
    half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
    return half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0


@triton.jit
def group_scales(
    wscales, outer, rows, groups, mask, GROUPS, BLOCKS: tl.constexpr, E4M3: tl.constexpr
):  # fmt: skip
    """float32 group scale times outer scale. rows, groups: indices that broadcast; zero where not `mask`."""
    rows = rows.to(tl.int64)
    scale = tl.load(wscales + rows * GROUPS + groups, mask=mask, other=0)
    scale = e4m3_float(scale) if E4M3 else scale.to(tl.float32)
    if BLOCKS > 0:
        block = groups // (GROUPS // BLOCKS)
        scale *= tl.load(outer + rows * BLOCKS + block, mask=mask, other=0).to(tl.float32)
    return scale


@triton.jit
def row_top(
    wscales, outer, rows, inside, GROUPS, BLOCKS: tl.constexpr, E4M3: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The largest size of each row's group scales, float32; 1 where all are zero."""
    top = tl.zeros(rows.shape, tl.float32)
    for start in range(0, GROUPS, BLOCK):
        groups = start + tl.arange(0, BLOCK)[None, :]
        mask = inside[:, None] & (groups < GROUPS)
        scales = group_scales(wscales, outer, rows[:, None], groups, mask, GROUPS, BLOCKS, E4M3)
        top = tl.maximum(top, tl.max(tl.abs(scales), 1))
    return tl.where(top > 0, top, 1.0)


@triton.jit
def group_ratio(scale, top, TOP: tl.constexpr):
    """How a group's codes are scaled to 8 bits, float16, of at most the size `TOP`."""
    return (scale * tl.div_rn(tl.full(top.shape, TOP, tl.float32), top)).to(tl.float16)


@triton.jit
def nibble_value(word, k, NVFP4: tl.constexpr):
    """float32 value of a word's code k, 0 … 7 from its low end."""
    code = (word >> (4 * k)) & 15
    if NVFP4:
        size = (code & 7).to(tl.float32)
        size = tl.where(size < 4, size * 0.5, tl.where(size < 6, size - 2, size * 2 - 8))
        return tl.where(code < 8, size, -size)
    return ((code ^ 8) - 8).to(tl.float32)


@triton.jit
def pair(ratio):
    """A float16 twice, in the two halves of an int32."""
    bits = ratio.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return bits | (bits << 16)


# Code k and code k + 4 of word $2 become the two float16 of register hk: by bits of the number 1024 + (code + 8), or of
# 2⁻¹⁴ times an e2m1 value.
_OPEN = "{ .reg .b32 a<4>, b<4>, h<4>, one; .reg .b16 c<4>;\n"
_INT4_HALVES = """
shr.u32 a1, $2, 4; shr.u32 a2, $2, 8; shr.u32 a3, $2, 12;
lop3.b32 h0, $2, 0x000f000f, 0x64086408, 0x6a; lop3.b32 h1, a1, 0x000f000f, 0x64086408, 0x6a;
lop3.b32 h2, a2, 0x000f000f, 0x64086408, 0x6a; lop3.b32 h3, a3, 0x000f000f, 0x64086408, 0x6a;
mov.b32 one, 0x64086408;
sub.rn.f16x2 h0, h0, one; sub.rn.f16x2 h1, h1, one; sub.rn.f16x2 h2, h2, one; sub.rn.f16x2 h3, h3, one;
"""
_NVFP4_HALVES = """
shl.b32 a0, $2, 12; shl.b32 b0, $2, 9; shl.b32 a1, $2, 8; shl.b32 b1, $2, 5;
shl.b32 a2, $2, 4; shl.b32 b2, $2, 1; mov.b32 a3, $2; shr.u32 b3, $2, 3;
and.b32 a0, a0, 0x80008000; and.b32 a1, a1, 0x80008000; and.b32 a2, a2, 0x80008000; and.b32 a3, a3, 0x80008000;
lop3.b32 h0, b0, 0x0e000e00, a0, 0xea; lop3.b32 h1, b1, 0x0e000e00, a1, 0xea;
lop3.b32 h2, b2, 0x0e000e00, a2, 0xea; lop3.b32 h3, b3, 0x0e000e00, a3, 0xea;
mov.b32 one, 0x74007400;
mul.rn.f16x2 h0, h0, one; mul.rn.f16x2 h1, h1, one; mul.rn.f16x2 h2, h2, one; mul.rn.f16x2 h3, h3, one;
"""
# Their low bytes are the int8 codes.
_ROUNDED = """
mov.b32 one, 0x66006600;
fma.rn.f16x2 h0, h0, $3, one; fma.rn.f16x2 h1, h1, $3, one;
fma.rn.f16x2 h2, h2, $3, one; fma.rn.f16x2 h3, h3, $3, one;
"""
_INT8_ORDER = """
prmt.b32 a0, h0, h1, 0x6240; prmt.b32 a1, h2, h3, 0x6240;
prmt.b32 $0, a0, a1, 0x5410; prmt.b32 $1, a0, a1, 0x7632; }
"""
_INT8_SPLIT = "prmt.b32 $0, h0, h2, 0x6240; prmt.b32 $1, h1, h3, 0x6240; }"
_E4M3 = """
mul.rn.f16x2 h0, h0, $3; mul.rn.f16x2 h1, h1, $3; mul.rn.f16x2 h2, h2, $3; mul.rn.f16x2 h3, h3, $3;
cvt.rn.satfinite.e4m3x2.f16x2 c0, h0; cvt.rn.satfinite.e4m3x2.f16x2 c1, h1;
cvt.rn.satfinite.e4m3x2.f16x2 c2, h2; cvt.rn.satfinite.e4m3x2.f16x2 c3, h3;
"""
_E4M3_ORDER = """
mov.b32 a0, {c0, c1}; mov.b32 a1, {c2, c3};
prmt.b32 $0, a0, a1, 0x6420; prmt.b32 $1, a0, a1, 0x7531; }
"""
_E4M3_SPLIT = """
mov.b32 a0, {c0, c2}; mov.b32 a1, {c1, c3};
prmt.b32 $0, a0, a0, 0x3120; prmt.b32 $1, a1, a1, 0x3120; }
"""


def _ptx(nvfp4: bool, fp8: bool, split: bool) -> tl.constexpr:
    if fp8:
        tail = _E4M3 + (_E4M3_SPLIT if split else _E4M3_ORDER)
    else:
        tail = _ROUNDED + (_INT8_SPLIT if split else _INT8_ORDER)
    return tl.constexpr(_OPEN + (_NVFP4_HALVES if nvfp4 else _INT4_HALVES) + tail)


# $0, $1: words of 8-bit codes; $2: a word of 4-bit codes; $3: the ratio, twice. Ordered: codes 0-3 and 4-7; split: even
# and odd ones.
PTX_INT4_INT8 = _ptx(False, False, False)
PTX_INT4_E4M3 = _ptx(False, True, False)
PTX_NVFP4_INT8 = _ptx(True, False, False)
PTX_NVFP4_E4M3 = _ptx(True, True, False)
PTX_INT4_INT8_SPLIT = _ptx(False, False, True)
PTX_INT4_E4M3_SPLIT = _ptx(False, True, True)


@triton.jit
def eight_bits(word, ratio, NVFP4: tl.constexpr, FP8: tl.constexpr, PTX: tl.constexpr):
    """A word of eight 4-bit codes to two words of 8-bit codes in the same order (first the low four).

    word int32; ratio float16, of the same shape. PTX: instructions of NVIDIA's; else (and in the interpreter) plain
    arithmetic with the same result.
    """
    if PTX:
        TO_E4M3: tl.constexpr = PTX_NVFP4_E4M3 if NVFP4 else PTX_INT4_E4M3
        TO_INT8: tl.constexpr = PTX_NVFP4_INT8 if NVFP4 else PTX_INT4_INT8
        ASM: tl.constexpr = TO_E4M3 if FP8 else TO_INT8
        low, high = tl.inline_asm_elementwise(
            ASM, "=&r,=&r,r,r", [word, pair(ratio)], (tl.int32, tl.int32), is_pure=True, pack=1
        )
    else:
        scale = ratio.to(tl.float32)
        low = tl.zeros_like(word)
        high = tl.zeros_like(word)
        for k in tl.static_range(4):
            low |= _byte(nibble_value(word, k, NVFP4) * scale, FP8) << (8 * k)
            high |= _byte(nibble_value(word, k + 4, NVFP4) * scale, FP8) << (8 * k)
    return low, high


@triton.jit
def split_eight_bits(byte, ratio, FP8: tl.constexpr, PTX: tl.constexpr):
    """Bytes of two int4 codes to the 8-bit codes of their low and of their high nibbles, int8 or e4m3.

    byte int8; ratio int32 of the same shape, a float16 twice, shared by at least 4 neighbours.
    """
    if PTX:
        if FP8:
            low, high = tl.inline_asm_elementwise(
                PTX_INT4_E4M3_SPLIT, "=&r,=&r,r,r,r,r,r", [byte, ratio], (tl.float8e4nv, tl.float8e4nv), True, 4
            )
        else:
            low, high = tl.inline_asm_elementwise(
                PTX_INT4_INT8_SPLIT, "=&r,=&r,r,r,r,r,r", [byte, ratio], (tl.int8, tl.int8), True, 4
            )
    else:
        scale = (ratio & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        word = byte.to(tl.int32)
        if FP8:
            low = to_e4m3((nibble_value(word, 0, False) * scale).to(tl.float16).to(tl.float32))
            high = to_e4m3((nibble_value(word, 1, False) * scale).to(tl.float16).to(tl.float32))
        else:
            low = round_even(nibble_value(word, 0, False) * scale).to(tl.int8)
            high = round_even(nibble_value(word, 1, False) * scale).to(tl.int8)
    return low, high


@triton.jit
def to_e4m3(value):
    """Nearest e4m3 of a float32 up to 448 in magnitude, halves to even. The interpreter's own cast truncates."""
    if INTERPRET:
        exponent = tl.maximum((value.to(tl.int32, bitcast=True) >> 23) & 255, 121)
        step = ((exponent - 3) << 23).to(tl.float32, bitcast=True)
        value = round_even(value / step) * step
    return value.to(tl.float8e4nv)


@triton.jit
def _byte(value, FP8: tl.constexpr):
    """The bits of a float32 as int8 (rounded) or e4m3, in the low byte of an int32."""
    if FP8:
        return to_e4m3(value.to(tl.float16).to(tl.float32)).to(tl.uint8, bitcast=True).to(tl.int32)
    return round_even(value).to(tl.int32) & 255
