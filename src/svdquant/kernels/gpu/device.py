"""Functions inside kernels (`@triton.jit`), shared by all of them."""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from .arch import interpreting

# Kernels are imported once: interpreted or compiled for good.
INTERPRET = tl.constexpr(interpreting())


@triton.jit
def round_even(x):
    """Nearest integer, halves to even, of a float32 below 2²² in magnitude; still a float32."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def gelu_tanh(x):
    """GELU's tanh form in float32."""
    z = 1.5957691216057308 * (x + 0.044715 * x * x * x)
    # tanh(z/2)·½ + ½ is the logistic function, which neither overflows nor loses small values. Its reciprocal as the
    # square of a reciprocal root: one instruction each, where a division has a dozen for its range.
    root = tl.rsqrt(1.0 + tl.exp(-z))
    return x * root * root


@triton.jit
def dot16(a, b, acc):
    """acc + a·b of 16-bit operands in float32. The interpreter multiplies bfloat16 wrongly, so it gets float32."""
    if INTERPRET:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    return tl.dot(a, b, acc)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """A float32 in a 16-bit type, halves to even. The interpreter cuts bfloat16's bits off, so it gets them rounded."""
    # Two conditions: a compiled kernel must not see what the second holds.
    if INTERPRET:  # noqa: SIM102
        if dtype == tl.bfloat16:
            bits = x.to(tl.int32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
            return bits.to(tl.float32, bitcast=True).to(tl.bfloat16)
    return x.to(dtype)
