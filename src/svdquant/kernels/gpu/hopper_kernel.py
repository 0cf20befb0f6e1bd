"""`eight_bit_kernel` for Hopper in Gluon: int8 products stay in flight while the next operands are waited for.

Triton's own pipeline does that for float32 sums only and waits for every step of an int32 one.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# Renamed in Triton 3.9.
async_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


@gluon.jit
def _fetch(codes, weight, a, b, full, step, m0, n0, more, BK: gl.constexpr, STAGES: gl.constexpr):
    """Starts copying the operands of a step into its slot, if there is such a step."""
    slot = step % STAGES
    bar = full.index(slot)
    mbarrier.expect(bar, codes.block_type.nbytes + weight.block_type.nbytes, pred=more)
    async_load(codes, [m0, step * BK], bar, a.index(slot), pred=more)
    async_load(weight, [n0, step * BK], bar, b.index(slot), pred=more)


@gluon.jit
def _sum(
    codes, weight, m0, n0, columns, FP8: gl.constexpr, ACC: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    BK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    a = gl.allocate_shared_memory(codes.dtype, [STAGES, BM, BK], codes.layout)
    b = gl.allocate_shared_memory(weight.dtype, [STAGES, BN, BK], weight.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    fence_async_shared()
    steps = gl.cdiv(columns, BK)
    for i in gl.static_range(STAGES - 1):
        _fetch(codes, weight, a, b, full, i, m0, n0, i < steps, BK, STAGES)
    acc = gl.zeros((BM, BN), gl.float32 if FP8 else gl.int32, ACC)
    for step in range(steps):
        slot = step % STAGES
        mbarrier.wait(full.index(slot), step // STAGES & 1)
        acc = warpgroup_mma(a.index(slot), b.index(slot).permute((1, 0)), acc, is_async=True)
        # The step before is done: its slot can be filled again.
        acc = warpgroup_mma_wait(num_outstanding=1, deps=[acc])
        ahead = step + STAGES - 1
        _fetch(codes, weight, a, b, full, ahead, m0, n0, ahead < steps, BK, STAGES)
    acc = warpgroup_mma_wait(num_outstanding=0, deps=[acc])
    for i in gl.static_range(STAGES):
        mbarrier.invalidate(full.index(i))
    return acc


@gluon.jit
def _add_branch(
    y, low, up, m0, n0, M, N, rank, RANK: gl.constexpr, ACC: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    """y + low·upᵀ, `RANK` directions at a time."""
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // RANK, RANK // 8], [WARPS, 1], [1, 0])
    SHARED_LOW: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, RANK], low.dtype.element_ty)
    SHARED_UP: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, RANK], low.dtype.element_ty)
    step = gl.arange(0, RANK, gl.SliceLayout(0, ROWS))
    rows = gl.minimum(m0 + gl.arange(0, BM, gl.SliceLayout(1, ROWS)), M - 1).to(gl.int64)
    outputs = gl.minimum(n0 + gl.arange(0, BN, gl.SliceLayout(1, ROWS)), N - 1).to(gl.int64)
    for start in range(0, rank, RANK):
        there = (start + step < rank)[None, :]
        h = gl.load(low + rows[:, None] * rank + (start + step)[None, :], mask=there, other=0.0)
        u = gl.load(up + outputs[:, None] * rank + (start + step)[None, :], mask=there, other=0.0).to(h.dtype)
        a = gl.allocate_shared_memory(h.dtype, [BM, RANK], SHARED_LOW, h)
        b = gl.allocate_shared_memory(h.dtype, [BN, RANK], SHARED_UP, u)
        fence_async_shared()
        y = warpgroup_mma(a, b.permute((1, 0)), y, is_async=True)
        y = warpgroup_mma_wait(num_outstanding=0, deps=[y])
    return y


@gluon.jit(do_not_specialize=["M", "length"])
def hopper_kernel(
    codes, weight, row_scales, scales, bias, low, up, out, M, N, columns, rank, length, batch_stride, token_stride,
    FP8: gl.constexpr, GELU: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, GROUP: gl.constexpr,
    RANK: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """out[m // length, m % length, n] of `EightBit.multiply`; codes, weight: descriptors of [BM, BK] and [BN, BK]."""
    # Triton knows integer instructions up to 224 columns.
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BN if FP8 or BN < 128 else 128, 32])
    HALF: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BN, 16])
    OUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // BN, BN // 8], [WARPS, 1], [1, 0])
    across = gl.cdiv(N, BN)
    index = gl.program_id(0)
    first = index // (GROUP * across) * GROUP
    height = gl.minimum(gl.cdiv(M, BM) - first, GROUP)
    m0 = (first + index % (GROUP * across) % height) * BM
    n0 = index % (GROUP * across) // height * BN
    acc = _sum(codes, weight, m0, n0, columns, FP8, ACC, BM, BN, BK, STAGES)
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    rows = gl.minimum(m0 + gl.arange(0, BM, gl.SliceLayout(1, HALF)), M - 1)
    outputs = gl.minimum(n0 + gl.arange(0, BN, LINE), N - 1)
    # Through shared memory: loaded as the product lies, they would take 64 registers each.
    by_output = gl.convert_layout(gl.load(scales + outputs).to(gl.float32), gl.SliceLayout(0, HALF))
    y = gl.convert_layout(acc, HALF).to(gl.float32)
    y = y * gl.load(row_scales + rows)[:, None] * by_output[None, :]
    if low is not None:
        y = _add_branch(y, low, up, m0, n0, M, N, rank, RANK, HALF, BM, BN, WARPS)
    if bias is not None:
        y += gl.convert_layout(gl.load(bias + outputs).to(gl.float32), gl.SliceLayout(0, HALF))[None, :]
    if GELU:
        y = y / (1.0 + gl.exp(-1.5957691216057308 * (y + 0.044715 * y * y * y)))
    z = gl.convert_layout(y.to(out.dtype.element_ty), OUT)
    row = m0 + gl.arange(0, BM, gl.SliceLayout(1, OUT))
    output = n0 + gl.arange(0, BN, gl.SliceLayout(0, OUT))
    batch = row // length
    place = batch.to(gl.int64) * batch_stride + (row - batch * length).to(gl.int64) * token_stride
    inside = (row < M)[:, None] & (output < N)[None, :]
    gl.store(out + place[:, None] + output[None, :], z, mask=inside)
