"""Kernels of `elementwise`."""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from .device import round_to


@triton.jit(do_not_specialize=["tokens"])
def norm_modulate_kernel(
    x, factor, offset, out, x_batch, x_row, factor_batch, offset_batch, out_batch, out_row, tokens, k, eps,
    ROWS: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One program: ROWS tokens of one batch row, one after the other; BK ≥ k columns in registers."""
    blocks = tl.cdiv(tokens, ROWS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks) * ROWS
    cols = tl.arange(0, BK)
    inside = cols < k
    f = tl.load(factor + b * factor_batch + cols, mask=inside, other=0.0)
    o = tl.load(offset + b * offset_batch + cols, mask=inside, other=0.0)
    x += b * x_batch
    out += b * out_batch
    for i in range(ROWS):
        token = (first + i).to(tl.int64)
        here = inside & (token < tokens)
        v = tl.load(x + token * x_row + cols, mask=here, other=0.0).to(tl.float32)
        v = tl.where(inside, v - tl.sum(v, 0) / k, 0.0)
        variance = tl.sum(v * v, 0) / k
        v = v * (1.0 / tl.sqrt_rn(variance + eps)) * f + o
        tl.store(out + token * out_row + cols, round_to(v, out.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["tokens"])
def norm_rotate_kernel(
    x, weight, cosine, sine, out,
    x_batch, x_row, x_head, out_batch, out_row, out_head, rotary_row, tokens, heads, d, eps,
    HEADS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One program: HEADS heads of one token. x may be out."""
    blocks = tl.cdiv(heads, HEADS)
    row = tl.program_id(0) // blocks
    b, token = (row // tokens).to(tl.int64), (row % tokens).to(tl.int64)
    head = (tl.program_id(0) % blocks) * HEADS + tl.arange(0, HEADS)
    feature = tl.arange(0, BD)
    inside = (head < heads)[:, None] & (feature < d)[None, :]
    at = x + b * x_batch + token * x_row + head[:, None] * x_head + feature[None, :]
    v = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    v = v * (1.0 / tl.sqrt_rn(tl.sum(v * v, 1) / d + eps))[:, None]
    if weight is not None:
        v = v * tl.load(weight + feature, mask=feature < d, other=0.0).to(tl.float32)[None, :]
    if cosine is not None:
        c = tl.load(cosine + token * rotary_row + feature, mask=feature < d, other=0.0)
        s = tl.load(sine + token * rotary_row + feature, mask=feature < d, other=0.0)
        real, imaginary = tl.split(tl.reshape(v, (HEADS, BD // 2, 2)))
        c0, c1 = tl.split(tl.reshape(c, (BD // 2, 2)))
        s0, s1 = tl.split(tl.reshape(s, (BD // 2, 2)))
        first = real * c0[None, :] - imaginary * s0[None, :]
        second = imaginary * c1[None, :] + real * s1[None, :]
        v = tl.reshape(tl.join(first, second), (HEADS, BD))
    to = out + b * out_batch + token * out_row + head[:, None] * out_head + feature[None, :]
    tl.store(to, round_to(v, out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def gate_add_kernel(
    residual, gate, x, out,
    residual_batch, residual_row, gate_batch, x_batch, x_row, out_batch, out_row, tokens, k,
    ROWS: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One program: ROWS tokens of one batch row, BK columns. out may be x or residual."""
    tiles = tl.cdiv(k, BK)
    blocks = tl.cdiv(tokens, ROWS)
    block = tl.program_id(0) // tiles
    cols = (tl.program_id(0) % tiles) * BK + tl.arange(0, BK)
    b = (block // blocks).to(tl.int64)
    token = ((block % blocks) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    inside = (token < tokens) & (cols < k)[None, :]
    g = tl.load(gate + b * gate_batch + cols, mask=cols < k, other=0.0)[None, :]
    r = tl.load(residual + b * residual_batch + token * residual_row + cols[None, :], mask=inside, other=0.0)
    v = tl.load(x + b * x_batch + token * x_row + cols[None, :], mask=inside, other=0.0)
    y = r.to(tl.float32) + g * v.to(tl.float32)
    if out.dtype.element_ty == tl.float16:
        y = tl.clamp(y, -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out + b * out_batch + token * out_row + cols[None, :], round_to(y, out.dtype.element_ty), mask=inside)
