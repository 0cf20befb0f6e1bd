"""What the kernels of `quantize` do with one tile: exact quotients, rotation, codes."""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from ...numerics import GELU_SHIFT
from .device import INTERPRET, round_to

# Adding 1.5·2²³ to a float32 leaves its nearest integer, halves to even, in the lowest bits.
ROUNDING = tl.constexpr(12582912.0)
SHIFT = tl.constexpr(GELU_SHIFT)


@triton.jit
def half_of(x, dtype: tl.constexpr, PTX: tl.constexpr):
    """`round_to` by the instruction that rounds two numbers."""
    if PTX and dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    return round_to(x, dtype)


@triton.jit
def once(x, KIND: tl.constexpr, PTX: tl.constexpr):
    """x as it is. Keeps the compiler from computing it anew for the tensor cores, by every warp."""
    if PTX and KIND != "none":
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2)
    return x


@triton.jit
def reciprocal(b, EXACT: tl.constexpr, PTX: tl.constexpr):
    """1/b of float32 b. EXACT: rounded to the nearest if b has at most 23 significant bits, else nearly."""
    if PTX:
        r = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [b], dtype=tl.float32, is_pure=True, pack=1)
        return tl.fma(tl.fma(-b, r, 1.0), r, r) if EXACT else r
    return tl.div_rn(tl.full(b.shape, 1.0, tl.float32), b)


@triton.jit
def logistic(z, PTX: tl.constexpr):
    """1/(1 + exp(−z)) to about 2⁻²⁰."""
    if PTX:
        power = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=r,r", [z * -1.4426950408889634], dtype=tl.float32, is_pure=True, pack=1
        )
        return reciprocal(1.0 + power, False, PTX)
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def divide(a, b, r):
    """a/b rounded to the nearest float32, of r = 1/b rounded to the nearest: Markstein's three instructions.

    Exact while neither the quotient nor 2⁻²⁴ of a is smaller than a float32 can be.
    """
    if INTERPRET:
        # Its fused multiplication rounds twice.
        a, b = tl.broadcast(a, b)
        return tl.div_rn(a, b)
    q = a * r
    return tl.fma(tl.fma(q, -b, a), r, q)


@triton.jit
def e4m3(x):
    """The bits (uint8) of the nearest float8_e4m3fn, ties to even, saturating at 448."""
    if INTERPRET:
        # The interpreter's own conversion does not round as the hardware does.
        a = tl.abs(x)
        bits = a.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960
        small = (a * 512 + ROUNDING).to(tl.int32, bitcast=True) & 0xF
        code = tl.minimum(tl.where(a < 0.015625, small, normal), 126)
        return (code | ((x.to(tl.int32, bitcast=True) >> 24) & 128)).to(tl.uint8)
    return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)


@triton.jit
def e2m1(x):
    """The nearest e2m1 code (int32; sign in bit 3) of a float32, ties to the even code, saturating at 6."""
    a = tl.abs(x)
    # The grid has step ½ below 2, 1 below 4, 2 above: scale to steps, round, and add the codes of the steps below.
    steps = tl.where(a < 1.75, a + a, tl.where(a < 3.5, a, a * 0.5))
    below = tl.where(a < 1.75, 0, tl.where(a < 3.5, 2, 4))
    code = ((tl.minimum(steps, 3.0) + ROUNDING).to(tl.int32, bitcast=True) & 7) + below
    return code | ((x.to(tl.int32, bitcast=True) >> 28) & 8)


@triton.jit
def rotate(h, BM: tl.constexpr):
    """h [BM, 128] float32 times the orthonormal Hadamard matrix, by butterflies: additions of float32.

    The bits of a number's partner are what is left of the sum of both: one exchange between threads.
    """
    cube = tl.reshape(h, (BM, 2, 2, 2, 2, 2, 2, 2))
    for stage in tl.static_range(7):
        bits = cube.to(tl.int32, bitcast=True)
        partner = (tl.sum(bits, 7 - stage, keep_dims=True) - bits).to(tl.float32, bitcast=True)
        sign = (1 - 2 * tl.arange(0, 2)).to(tl.float32)
        sign = tl.reshape(sign, (1,) * (7 - stage) + (2,) + (1,) * stage)
        cube = tl.fma(cube, sign, partner)
    return tl.reshape(cube, (BM, 128)) * 0.08838834764831845


@triton.jit
def within(cols, RANGES: tl.constexpr):
    """Which columns lie in one of the ranges (start, stop, start, stop …)."""
    inside = (cols >= RANGES[0]) & (cols < RANGES[1])
    for i in tl.static_range(2, len(RANGES), 2):
        inside = inside | ((cols >= RANGES[i]) & (cols < RANGES[i + 1]))
    return inside


@triton.jit
def divisors(smooth, cols, k):
    """s [BK] of the columns, ones beyond k; anything where nothing is smoothed."""
    if smooth is None:
        return cols
    return tl.load(smooth + cols, mask=cols < k, other=1.0)


@triton.jit
def smoothed(
    x, cols, s, BM: tl.constexpr, SMOOTH: tl.constexpr, EXACT: tl.constexpr, RANGES: tl.constexpr,
    ROTATE: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """(x + shift)/s of a tile in float32, rotated. EXACT: once rounded to x's type, as division gives it."""
    h = x.to(tl.float32)
    if RANGES is not None:
        h += tl.where(within(cols, RANGES), SHIFT, 0.0)[None, :]
    if SMOOTH:
        s = s.to(tl.float32)
        # A quotient of 8-bit significands is never so near to the middle of two bfloat16 that its last bits decide;
        # nor is one of an 8-bit and an 11-bit significand.
        if EXACT and not ROTATE and (RANGES is not None or x.dtype == tl.float16):
            h = divide(h, s[None, :], reciprocal(s, True, PTX)[None, :])
        else:
            h = h * reciprocal(s, False, PTX)[None, :]
    if ROTATE:
        h = rotate(h, BM)
    return h


@triton.jit
def store_codes(
    codes, q, rows, valid, k0, c, BM: tl.constexpr, BK: tl.constexpr, PACKED: tl.constexpr, SPLIT: tl.constexpr
):
    """Stores q [BM, BK] (int32, or uint8 bits of fp8) in the order that the product wants.

    A thread stores the codes of the 8 numbers that it has loaded: wider stores would cost an exchange between threads.
    """
    rows = rows[:, None]
    if PACKED:
        low, high = tl.split(tl.reshape(q, (BM, BK // 2, 2)))
        at = tl.max_contiguous(k0 // 2 + tl.arange(0, BK // 2), 4)
        tl.store(codes + rows * (c // 2) + at[None, :], ((low & 15) | ((high & 15) << 4)).to(tl.uint8), valid[:, None])
    elif SPLIT:
        even, odd = tl.split(tl.reshape(q.to(codes.dtype.element_ty), (BM, BK // 2, 2)))
        i = tl.arange(0, BK // 2)
        at = codes + rows * c + tl.max_contiguous(k0 + i // 32 * 64 + i % 32, 4)[None, :]
        tl.store(at, even, valid[:, None])
        tl.store(at + 32, odd, valid[:, None])
    else:
        at = tl.max_contiguous(k0 + tl.arange(0, BK), 8)
        tl.store(codes + rows * c + at[None, :], q.to(codes.dtype.element_ty), valid[:, None])


@triton.jit
def int4_codes(h, unsigned, BM: tl.constexpr, BK: tl.constexpr):
    """(codes [BM, BK], int32 whose lowest byte they are; exact scales [BM, BK/64]) of h in its 16-bit type.

    unsigned [BK/64] or None: groups with codes 0…15.
    """
    g = tl.reshape(h, (BM, BK // 64, 64))
    amax = tl.max(tl.abs(g), 2).to(tl.float32)
    if unsigned is None:
        top = tl.full((BM, BK // 64), 7.0, tl.float32)
        inverse = tl.full((BM, BK // 64), 1.0 / 7.0, tl.float32)
    else:
        top = tl.broadcast_to(tl.where(unsigned, 15.0, 7.0)[None, :], (BM, BK // 64))
        inverse = tl.broadcast_to(tl.where(unsigned, 1.0 / 15.0, 1.0 / 7.0)[None, :], (BM, BK // 64))
    exact = divide(amax, top, inverse)
    exact = tl.where(exact == 0, 1.0, exact)
    inverse = tl.div_rn(tl.full(exact.shape, 1.0, tl.float32), exact)
    v = divide(g.to(tl.float32), exact[:, :, None], inverse[:, :, None])
    if unsigned is not None:
        v = tl.maximum(v, tl.where(unsigned, 0.0, -7.0)[None, :, None])
    return tl.reshape((v + ROUNDING).to(tl.int32, bitcast=True), (BM, BK)), exact


@triton.jit
def nvfp4_codes(h, BM: tl.constexpr, BK: tl.constexpr):
    """(codes int32 [BM, BK], exact scales [BM, BK/16]) of h in its 16-bit type."""
    g = tl.reshape(h, (BM, BK // 16, 16))
    amax = tl.max(tl.abs(g), 2).to(tl.float32)
    exact = divide(amax, tl.full((BM, BK // 16), 6.0, tl.float32), tl.full((BM, BK // 16), 1.0 / 6.0, tl.float32))
    exact = tl.minimum(exact, 448.0, propagate_nan=tl.PropagateNan.ALL)
    divisor = tl.where(exact == 0, 1.0, exact)
    inverse = tl.div_rn(tl.full(divisor.shape, 1.0, tl.float32), divisor)
    v = divide(g.to(tl.float32), divisor[:, :, None], inverse[:, :, None])
    return tl.reshape(e2m1(v), (BM, BK)), exact
