"""The kernel of `weight_only.w4a16_linear`, and how it unpacks weights."""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl

from .device import INTERPRET, dot16, round_to
from .unpack import e4m3_float


def _words(each: list[str]) -> str:
    """PTX that takes two 16-bit words in $4, and leaves in $0 … $3 their four nibbles as pairs of 16-bit floats.

    each: lines that turn the pair in the last bits of `w` into floats in {out}.
    """
    lines = [".reg .b32 w, s, one, two;"]
    for i in range(4):
        lines += [f"shr.u32 w, $4, {4 * i};", *(line.format(out=f"${i}") for line in each)]
    return "\n".join(["{", *lines, "}"])


def _integers(kind: str, bits: int, one: int, offset: int) -> str:
    """bits: floats whose last mantissa bit counts ones; with a nibble there, they are −offset more than its code.

    Two's complement codes n are (n ^ 8) − 8. sub.bf16x2 would need sm_90, fma.rn.bf16x2 needs sm_80.
    """
    # 0x6a is (a & b) ^ c.
    return _words(
        [
            f"lop3.b32 w, w, 0x000f000f, {bits:#x}, 0x6a;",
            f"mov.b32 one, {one:#x};",
            f"mov.b32 two, {offset:#x};",
            f"fma.rn.{kind} {{out}}, w, one, two;",
        ]
    )


def _floats(kind: str, mantissa: int, factor: int) -> str:
    """e2m1: its magnitude's bits, moved to where the wider type has them, are 1/factor of its value."""
    # 0xf8 is a | (b & c).
    return _words(
        [
            "and.b32 s, w, 0x00080008;",
            "shl.b32 s, s, 12;",
            f"shl.b32 w, w, {mantissa - 1};",
            f"lop3.b32 w, s, w, {0x00070007 << (mantissa - 1):#x}, 0xf8;",
            f"mov.b32 one, {factor:#x};",
            "mov.b32 two, 0x80008000;",
            f"fma.rn.{kind} {{out}}, w, one, two;",
        ]
    )


# bfloat16: 0x4300 | n is 128 + n; float16: 0x6400 | n is 1024 + n. Their exponents' biases exceed e2m1's by 126 and 14.
_BF16_SIGNED = tl.constexpr(_integers("bf16x2", 0x43084308, 0x3F803F80, 0xC308C308))
_BF16_UNSIGNED = tl.constexpr(_integers("bf16x2", 0x43004300, 0x3F803F80, 0xC300C300))
_BF16_E2M1 = tl.constexpr(_floats("bf16x2", 7, 0x7E807E80))
_F16_SIGNED = tl.constexpr(_integers("f16x2", 0x64086408, 0x3C003C00, 0xE408E408))
_F16_UNSIGNED = tl.constexpr(_integers("f16x2", 0x64006400, 0x3C003C00, 0xE400E400))
_F16_E2M1 = tl.constexpr(_floats("f16x2", 10, 0x74007400))
_REGISTERS = tl.constexpr("=&r,=&r,=&r,=&r,r")


@triton.jit
def _nibble(words, position: tl.constexpr, KIND: tl.constexpr, TYPE: tl.constexpr):
    """Code number `position` of words of four, as a float of type TYPE."""
    code = (words.to(tl.int32) >> (4 * position)) & 15
    if KIND == "e2m1":
        magnitude = code & 7
        # Twice the value: 0, 1, 2, 3, 4, 6, 8, 12.
        twice = tl.where(magnitude < 2, magnitude, (2 + (magnitude & 1)) << (tl.maximum(magnitude >> 1, 1) - 1))
        value = tl.where(code < 8, twice, -twice).to(tl.float32) * 0.5
    elif KIND == "unsigned":
        value = code.to(tl.float32)
    else:
        value = ((code ^ 8) - 8).to(tl.float32)
    return round_to(value, TYPE)


@triton.jit
def _unpack(words, KIND: tl.constexpr, PTX: tl.constexpr, TYPE: tl.constexpr):
    """The four codes of 16-bit words as floats of type TYPE, all exact."""
    if PTX:
        # The types are spelled out: a tuple of constexpr is none of types.
        if tl.bfloat16 == TYPE:
            BF16: tl.constexpr = (
                _BF16_SIGNED if KIND == "signed" else _BF16_UNSIGNED if KIND == "unsigned" else _BF16_E2M1
            )
            n0, n1, n2, n3 = tl.inline_asm_elementwise(
                BF16, _REGISTERS, [words], (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=2
            )
        else:
            F16: tl.constexpr = _F16_SIGNED if KIND == "signed" else _F16_UNSIGNED if KIND == "unsigned" else _F16_E2M1
            n0, n1, n2, n3 = tl.inline_asm_elementwise(
                F16, _REGISTERS, [words], (tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=2
            )
    else:
        n0 = _nibble(words, 0, KIND, TYPE)
        n1 = _nibble(words, 1, KIND, TYPE)
        n2 = _nibble(words, 2, KIND, TYPE)
        n3 = _nibble(words, 3, KIND, TYPE)
    return n0, n1, n2, n3


@triton.jit
def _scales(scales, zeros, row, start, groups, GROUP: tl.constexpr, ZEROS: tl.constexpr, FOUR: tl.constexpr):
    """Scales and zero points of the step of columns from `start`: [BN, 4] where groups are multiples of a warp's 64
    columns, else one per word, [4, BN, 64 / FOUR]."""
    slices = tl.arange(0, 4)
    if GROUP % 64 == 0:
        if GROUP == 0:
            group = slices[None, :] * 0
        elif GROUP == 64:
            group = start // 64 + slices[None, :]
        else:
            group = (start + slices[None, :] * 64) // GROUP
        at = row[:, None] * groups + group
    else:
        words = tl.arange(0, 64 // FOUR)
        group = (start + slices[:, None, None] * 64 + words[None, None, :] * FOUR) // GROUP
        at = row[None, :, None] * groups + group
    s = tl.load(scales + at, mask=group < groups, other=0)
    s = e4m3_float(s) if scales.dtype.element_ty == tl.uint8 else s.to(tl.float32)
    z = s
    if ZEROS:
        z = tl.load(zeros + at, mask=group < groups, other=0).to(tl.float32)
    return s, z


@triton.jit
def _scale(codes, scale, zero, ZEROS: tl.constexpr, TYPE: tl.constexpr):
    """code · scale (+ zero) in float32, rounded once to type TYPE."""
    value = codes.to(tl.float32) * scale
    if ZEROS:
        value += zero
    return round_to(value, TYPE)


@triton.jit(do_not_specialize=["M"])
def weight_only_kernel(
    x,
    weight,
    scales,
    zeros,
    bias,
    out,
    M,
    N,
    K,
    stored,
    groups,
    x_stride,
    w_stride,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    BIAS: tl.constexpr,
    WHOLE: tl.constexpr,
    PTX: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
):
    """outᵀ [N, M] = Ŵ·xᵀ + b: the weight is the first operand, which stays in registers once unpacked.

    weight: int16 [N, stored/4], words of four codes (KIND "signed", "unsigned" or "e2m1"), or int8 [N, stored] (KIND
    "int8"), w_stride elements a row. scales, zeros: [N, groups], e4m3 as uint8. GROUP: columns per group, 0 where there
    is one group.
    WHOLE: K = stored, a multiple of a step. PTX: unpack by NVIDIA's instructions.

    Each warp multiplies 64 columns of its own, four of them at a time; the order of additions is that of the columns
    within a warp, then over the warps, whatever the tile.
    """
    TYPE: tl.constexpr = out.dtype.element_ty
    FOUR: tl.constexpr = 1 if KIND == "int8" else 4
    WORDS: tl.constexpr = 64 // FOUR
    COARSE: tl.constexpr = GROUP % 64 == 0
    rows = tl.program_id(1) * BN + tl.arange(0, BN)
    tokens = tl.program_id(0) * BM + tl.arange(0, BM)
    # Rows beyond N read the first one, and are not stored.
    row = tl.where(rows < N, rows, 0).to(tl.int64)
    token_ok = tokens[None, :, None] < M
    slices = tl.arange(0, 4)
    flat = tl.arange(0, 4 * WORDS)
    columns = slices[:, None, None] * 64 + tl.arange(0, 64)[None, None, :]
    w_at = weight + row[:, None] * w_stride + flat[None, :]
    x_at = x + tokens.to(tl.int64)[None, :, None] * x_stride + columns
    ones = tl.full((4, BN, 16), 1.0, tl.float32).to(TYPE)
    acc = tl.zeros((4, BN, BM), dtype=tl.float32)
    next_s, next_z = _scales(scales, zeros, row, 0, groups, GROUP, ZEROS, FOUR)
    for start in range(0, stored, 256):
        # A step ahead by hand: only what a dot reads is pipelined by the compiler.
        s, z = next_s, next_z
        next_s, next_z = _scales(scales, zeros, row, start + 256, groups, GROUP, ZEROS, FOUR)
        if WHOLE:
            w = tl.load(w_at + start // FOUR)
            xs = tl.load(x_at + start, mask=token_ok, other=0.0)
        else:
            w = tl.load(w_at + start // FOUR, mask=flat[None, :] < (stored - start) // FOUR, other=0)
            xs = tl.load(x_at + start, mask=token_ok & (columns < K - start), other=0.0)

        w = tl.trans(tl.reshape(w, (BN, 4, WORDS)), (1, 0, 2))
        part = acc
        if COARSE:
            part = tl.zeros((4, BN, BM), dtype=tl.float32)
        if KIND == "int8":
            if COARSE:
                # The interpreter has no way from integers to bfloat16.
                w = w.to(tl.float32).to(TYPE) if INTERPRET else w.to(TYPE)
            else:
                w = _scale(w, s, z, False, TYPE)
            part = dot16(w, tl.trans(xs, (0, 2, 1)), part)
        else:
            w0, w1, w2, w3 = _unpack(w, KIND, PTX, TYPE)
            if not COARSE:
                w0 = _scale(w0, s, z, ZEROS, TYPE)
                w1 = _scale(w1, s, z, ZEROS, TYPE)
                w2 = _scale(w2, s, z, ZEROS, TYPE)
                w3 = _scale(w3, s, z, ZEROS, TYPE)
            # Word j holds columns 4j … 4j + 3: each dot takes one of the four, so x is dealt out instead.
            even, odd = tl.split(tl.reshape(xs, (4, BM, 16, 2, 2)))
            x0, x2 = tl.split(even)
            x1, x3 = tl.split(odd)
            x0, x1 = tl.trans(x0, (0, 2, 1)), tl.trans(x1, (0, 2, 1))
            x2, x3 = tl.trans(x2, (0, 2, 1)), tl.trans(x3, (0, 2, 1))
            part = dot16(w3, x3, dot16(w2, x2, dot16(w1, x1, dot16(w0, x0, part))))
            if ZEROS and COARSE:
                total = dot16(ones, x0, tl.zeros((4, BN, BM), dtype=tl.float32))
                total = dot16(ones, x3, dot16(ones, x2, dot16(ones, x1, total)))
                acc = tl.fma(total, tl.broadcast_to(tl.trans(z)[:, :, None], (4, BN, BM)), acc)
        if COARSE:
            acc = tl.fma(part, tl.broadcast_to(tl.trans(s)[:, :, None], (4, BN, BM)), acc)
        else:
            acc = part

    # tl.sum could choose another order for another tile.
    first, second = tl.split(tl.reshape(tl.trans(acc, (1, 2, 0)), (BN, BM, 2, 2)))
    a, b = tl.split(first)
    c, d = tl.split(second)
    y = (a + b) + (c + d)
    if BIAS:
        y += tl.load(bias + row).to(tl.float32)[:, None]
    at = out + tokens.to(tl.int64)[None, :] * N + rows[:, None]
    tl.store(at, round_to(y, TYPE), mask=(rows < N)[:, None] & (tokens < M)[None, :])
