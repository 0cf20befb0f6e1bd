"""INT4 tensor cores of Ampere and Ada (`mma.m16n8k64`), in Gluon.

Tensors are written as the tensor cores see them: [row tiles of 16, column tiles of 8, 8, 4], where the last two are the
32 lanes of a warp (lane = 4·i + j), so that everything but `mma` itself is element by element.

An `mma` takes 64 columns, 32 bytes, of 16 rows and of 8 columns of the output: two pieces of 16 bytes per row, of which
lane (i, j) holds the j-th 32 bits. 16 columns of the 16-bit low-rank branch are 32 bytes of a row as well and lie in
lanes alike, so both go through one ring in shared memory, the branch first. A step is two of them, 64 bytes per row.
In shared memory the pieces of eight rows are adjacent: 128 bytes that are written and read without conflict.
"""
# mypy: allow-untyped-defs

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

# Renamed in Triton 3.9.
copy_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared

# Which groups hold unsigned codes 0…15: none, all, or those in [FIRST, LAST).
SIGNED = gl.constexpr(0)
UNSIGNED = gl.constexpr(1)
MIXED = gl.constexpr(2)

# `mma` starts its integer sum from these bits, those of 3072: the sum d then reads as the float 3072 + d/4096, and no
# instruction converts it. fma(that, s, −3072·s) = d·s/4096 is exact for a scale of 16 bits; 4096 goes into the other.
_MMA = """{{
.reg .b32 d<4>, m;
.reg .f32 f<4>;
mov.b32 m, 0x45400000;
mma.sync.aligned.m16n8k64.row.col.s32.{codes}.s4.s32 {{d0,d1,d2,d3}}, {{$8,$9,$10,$11}}, {{$12,$13}}, {{m,m,m,m}};
mov.b32 f0, d0;
mov.b32 f1, d1;
mov.b32 f2, d2;
mov.b32 f3, d3;
fma.rn.f32 f0, f0, $14, $15;
fma.rn.f32 f1, f1, $14, $15;
fma.rn.f32 f2, f2, $16, $17;
fma.rn.f32 f3, f3, $16, $17;
fma.rn.f32 $0, f0, $18, $4;
fma.rn.f32 $1, f1, $19, $5;
fma.rn.f32 $2, f2, $18, $6;
fma.rn.f32 $3, f3, $19, $7;
}}"""
MMA_S4 = gl.constexpr(_MMA.format(codes="s4"))
MMA_U4 = gl.constexpr(_MMA.format(codes="u4"))
_MMA16 = (
    "mma.sync.aligned.m16n8k16.row.col.f32.{type}.{type}.f32 "
    "{{$0,$1,$2,$3}}, {{$8,$9,$10,$11}}, {{$12,$13}}, {{$4,$5,$6,$7}};"
)
MMA_BF16 = gl.constexpr(_MMA16.format(type="bf16"))
MMA_F16 = gl.constexpr(_MMA16.format(type="f16"))


@gluon.jit
def mma_int4(c0, c1, c2, c3, a0, a1, a2, a3, b0, b1, s0, s1, t0, t1, ASM: gl.constexpr):
    """c + (d·s)·t for the sums d of a group: of rows i (scales s0; c0, c1) and 8 + i (s1; c2, c3) with columns 2j (t0)
    and 2j + 1 (t1). a0, a1: first pieces of rows i and 8 + i, a2, a3: their second ones; b0, b1: those of column i."""
    return gl.inline_asm_elementwise(
        ASM,
        "=&f,=&f,=&f,=&f,f,f,f,f,r,r,r,r,r,r,f,f,f,f,f,f",
        [c0, c1, c2, c3, a0, a1, a2, a3, b0, b1, s0, s0 * -3072.0, s1, s1 * -3072.0, t0, t1],
        dtype=(gl.float32, gl.float32, gl.float32, gl.float32),
        is_pure=True,
        pack=1,
    )


@gluon.jit
def mma_16bit(c0, c1, c2, c3, a0, a1, a2, a3, b0, b1, ASM: gl.constexpr):
    """c + a·b of 16 columns of 16 bits."""
    return gl.inline_asm_elementwise(
        ASM,
        "=f,=f,=f,=f,f,f,f,f,r,r,r,r,r,r",
        [c0, c1, c2, c3, a0, a1, a2, a3, b0, b1],
        dtype=(gl.float32, gl.float32, gl.float32, gl.float32),
        is_pure=True,
        pack=1,
    )


@gluon.constexpr_function
def along(layout, rank, dim):
    """The layout of a vector that becomes dimension `dim` of a tensor of this rank."""
    for d in reversed(range(rank)):
        if d != dim:
            layout = gl.SliceLayout(d, layout)
    return layout


@gluon.jit
def indices(SIZE: gl.constexpr, DIM: gl.constexpr, RANK: gl.constexpr, layout: gl.constexpr):
    """0, 1, … SIZE − 1 along one dimension; the others are 1."""
    x = gl.arange(0, SIZE, along(layout, RANK, DIM))
    for d in gl.static_range(RANK):
        if d != DIM:
            x = gl.expand_dims(x, d)
    return x


@gluon.jit
def copy_rows(ring, pointer, rows, stride, chunk, limit, CLAMP: gl.constexpr, layout: gl.constexpr):
    """Starts to copy chunks `chunk` and `chunk` + 1, of 32 bytes, of rows of words of 32 bits.

    ring [tiles, chunk, half, piece, 8, 4]: row = 16·tile + 8·half + i. Rows from `rows` on read the last row and, where
    CLAMP, chunks from `limit` on the last chunk.
    """
    row = indices(ring.shape[0], 0, 6, layout) * 16 + indices(2, 2, 6, layout) * 8 + indices(8, 4, 6, layout)
    which = chunk + indices(2, 1, 6, layout)
    if CLAMP:
        which = gl.minimum(which, limit - 1)
    word = which * 8 + indices(2, 3, 6, layout) * 4 + indices(4, 5, 6, layout)
    copy_async(ring, pointer + (gl.minimum(row, rows - 1) * stride + word))


@gluon.jit
def copy_columns(ring, pointer, rows, stride, chunk, limit, CLAMP: gl.constexpr, layout: gl.constexpr):
    """The same for the ring [chunk, tiles, piece, 8, 4] of the operand whose tiles have eight rows."""
    row = indices(ring.shape[1], 1, 5, layout) * 8 + indices(8, 3, 5, layout)
    which = chunk + indices(2, 0, 5, layout)
    if CLAMP:
        which = gl.minimum(which, limit - 1)
    word = which * 8 + indices(2, 2, 5, layout) * 4 + indices(4, 4, 5, layout)
    copy_async(ring, pointer + (gl.minimum(row, rows - 1) * stride + word))


@gluon.jit
def load_row_scales(scales, rows, groups, group, TILES: gl.constexpr, layout: gl.constexpr):
    """float32 [TILES, 2, 8, 1, 2]: scales of groups `group` and `group` + 1 of rows 16·tile + 8·half + i."""
    row = indices(TILES, 0, 5, layout) * 16 + indices(8, 2, 5, layout) + indices(2, 4, 5, layout) * 8
    at = gl.minimum(row, rows - 1) * groups + group + indices(2, 1, 5, layout) + indices(1, 3, 5, layout)
    return gl.load(scales + at)


@gluon.jit
def load_column_scales(scales, columns, groups, group, CLAMP: gl.constexpr, TILES: gl.constexpr, layout: gl.constexpr):
    """float32 [2, TILES, 1, 4, 2]: 4096 times the scales of two groups of columns 8·tile + 2·j + parity."""
    column = indices(TILES, 1, 5, layout) * 8 + indices(4, 3, 5, layout) * 2 + indices(2, 4, 5, layout)
    which = group + indices(2, 0, 5, layout)
    if CLAMP:
        which = gl.minimum(which, groups - 1)
    at = gl.minimum(column, columns - 1) * groups + which + indices(1, 2, 5, layout)
    return gl.load(scales + at)


@gluon.jit
def row_fragments(ring, G: gl.constexpr, LOAD: gl.constexpr, LANES: gl.constexpr):
    """a0…a3 [tiles, 1, 8, 4] of one chunk of a slot of the rows' ring."""
    pieces = ring.slice(G, 1, dim=1).permute([0, 1, 4, 5, 3, 2]).load(LOAD)
    upper, lower = gl.split(pieces)
    a0, a2 = gl.split(upper)
    a1, a3 = gl.split(lower)
    return same(a0, LANES), same(a1, LANES), same(a2, LANES), same(a3, LANES)


@gluon.jit
def column_fragments(ring, G: gl.constexpr, LOAD: gl.constexpr, LANES: gl.constexpr):
    """b0, b1 [1, tiles, 8, 4]."""
    b0, b1 = gl.split(ring.slice(G, 1, dim=0).permute([0, 1, 3, 4, 2]).load(LOAD))
    return same(b0, LANES), same(b1, LANES)


@gluon.jit
def same(x, layout: gl.constexpr):
    """The same registers under another name of their layout."""
    return gl.convert_layout(x, layout, assert_trivial=True)


@gluon.jit
def gelu(x):
    """GELU's tanh form in float32, as x times a logistic function, which neither overflows nor loses small values."""
    z = 1.5957691216057308 * (x + 0.044715 * x * x * x)
    return x / (1.0 + gl.exp(-z))


@gluon.jit(do_not_specialize=["M", "STEPS", "RANKS", "FIRST", "LAST", "tokens"])
def int4_linear(
    codes,
    scales,
    weight,
    wscales,
    low,
    up,
    bias,
    out,
    M,
    N,
    STEPS,
    RANKS,
    FIRST,
    LAST,
    tokens,
    batch_stride,
    token_stride,
    ODD: gl.constexpr,
    CODES: gl.constexpr,
    GELU: gl.constexpr,
    MF: gl.constexpr,
    NF: gl.constexpr,
    WM: gl.constexpr,
    WN: gl.constexpr,
    STAGES: gl.constexpr,
):
    """out [B, tokens, N] = codes·weightᵀ by groups of 64 + low·upᵀ + bias, GELU, one rounding.

    codes: [M, 16·STEPS] words of 32 bits, zero beyond the weight's columns; scales: float32 [M, 2·STEPS].
    weight: [N, 8·G] words, wscales: 16 bits [N, G], G = 2·STEPS − ODD.
    low: [M, 8·RANKS] words, up: [N, 8·RANKS], each two values of `out`'s type; any pointer where RANKS is 0.
    bias: [N] or None. FIRST, LAST: the unsigned groups where CODES is MIXED. M = B·tokens.
    A program computes [16·MF·WM, 8·NF·WN], each of its WM·WN warps [16·MF, 8·NF].
    """
    WARPS: gl.constexpr = WM * WN
    MT: gl.constexpr = MF * WM
    NT: gl.constexpr = NF * WN
    LANES: gl.constexpr = gl.BlockedLayout([MF, NF, 1, 1], [1, 1, 8, 4], [WM, WN, 1, 1], [3, 2, 1, 0])
    # What lanes read of both operands and their scales, with one or two more dimensions of two to be split.
    ROWS5: gl.constexpr = gl.BlockedLayout([MF, 1, 1, 1, 2], [1, 1, 8, 4, 1], [WM, WN, 1, 1, 1], [4, 3, 2, 1, 0])
    ROWS6: gl.constexpr = gl.BlockedLayout(
        [MF, 1, 1, 1, 2, 2], [1, 1, 8, 4, 1, 1], [WM, WN, 1, 1, 1, 1], [5, 4, 3, 2, 1, 0]
    )
    COLUMNS5: gl.constexpr = gl.BlockedLayout([1, NF, 1, 1, 2], [1, 1, 8, 4, 1], [WM, WN, 1, 1, 1], [4, 3, 2, 1, 0])
    # A warp copies 64 bytes of each of eight rows, and eight of its lanes fill 128 adjacent bytes of shared memory.
    COPY_ROWS: gl.constexpr = gl.BlockedLayout(
        [1, 1, 1, 1, 1, 4], [1, 2, 1, 2, 8, 1], [WARPS, 1, 1, 1, 1, 1], [5, 4, 3, 1, 2, 0]
    )
    COPY_COLUMNS: gl.constexpr = gl.BlockedLayout(
        [1, 1, 1, 1, 4], [2, 1, 2, 8, 1], [1, WARPS, 1, 1, 1], [4, 3, 2, 0, 1]
    )
    ROW_SCALES: gl.constexpr = gl.BlockedLayout([1, 2, 1, 1, 1], [2, 1, 8, 1, 2], [WARPS, 1, 1, 1, 1], [1, 4, 2, 0, 3])
    COLUMN_SCALES: gl.constexpr = gl.BlockedLayout(
        [2, 1, 1, 1, 1], [1, 4, 1, 4, 2], [1, WARPS, 1, 1, 1], [0, 4, 3, 1, 2]
    )
    PLAIN5: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [4, 3, 2, 1, 0])
    PLAIN6: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [5, 4, 3, 2, 1, 0])

    # Programs that run together share rows and columns: eight row tiles at a time.
    across = gl.cdiv(N, 8 * NT)
    down = gl.cdiv(M, 16 * MT)
    pid = gl.program_id(0)
    band = pid // (8 * across)
    height = gl.minimum(down - band * 8, 8)
    first_row = (band * 8 + pid % (8 * across) % height) * (16 * MT)
    first_column = pid % (8 * across) // height * (8 * NT)

    # Offsets within a tile fit 32 bits, those of the tile need 64.
    groups = 2 * STEPS - ODD
    rows = M - first_row
    columns = N - first_column
    row = first_row.to(gl.int64)
    column = first_column.to(gl.int64)
    codes += row * (STEPS * 16)
    scales += row * (STEPS * 2)
    low += row * (RANKS * 8)
    weight += column * (groups * 8)
    wscales += column * groups
    up += column * (RANKS * 8)
    rows_ring = gl.allocate_shared_memory(gl.int32, [STAGES, MT, 2, 2, 2, 8, 4], PLAIN6)
    columns_ring = gl.allocate_shared_memory(gl.int32, [STAGES, 2, NT, 2, 8, 4], PLAIN5)
    row_scales = gl.allocate_shared_memory(gl.float32, [2, MT, 2, 8, 1, 2], PLAIN5)
    column_scales = gl.allocate_shared_memory(gl.float32, [2, 2, NT, 1, 4, 2], PLAIN5)

    branch = gl.cdiv(RANKS, 2)
    total = branch + STEPS
    for i in gl.static_range(STAGES - 1):
        if i < branch:
            copy_rows(rows_ring.index(i), low, rows, RANKS * 8, i * 2, RANKS, True, COPY_ROWS)
            copy_columns(columns_ring.index(i), up, columns, RANKS * 8, i * 2, RANKS, True, COPY_COLUMNS)
        elif i < total:
            chunk = (i - branch) * 2
            copy_rows(rows_ring.index(i), codes, rows, STEPS * 16, chunk, 0, False, COPY_ROWS)
            copy_columns(columns_ring.index(i), weight, columns, groups * 8, chunk, groups, ODD, COPY_COLUMNS)
        async_copy.commit_group()

    c0 = gl.zeros([MT, NT, 8, 4], gl.float32, LANES)
    c1 = gl.zeros([MT, NT, 8, 4], gl.float32, LANES)
    c2 = gl.zeros([MT, NT, 8, 4], gl.float32, LANES)
    c3 = gl.zeros([MT, NT, 8, 4], gl.float32, LANES)
    for i in range(0, branch):
        async_copy.wait_group(STAGES - 2)
        ahead = i + STAGES - 1
        slot = ahead % STAGES
        if ahead < branch:
            copy_rows(rows_ring.index(slot), low, rows, RANKS * 8, ahead * 2, RANKS, True, COPY_ROWS)
            copy_columns(columns_ring.index(slot), up, columns, RANKS * 8, ahead * 2, RANKS, True, COPY_COLUMNS)
        elif ahead < total:
            chunk = (ahead - branch) * 2
            copy_rows(rows_ring.index(slot), codes, rows, STEPS * 16, chunk, 0, False, COPY_ROWS)
            copy_columns(columns_ring.index(slot), weight, columns, groups * 8, chunk, groups, ODD, COPY_COLUMNS)
        async_copy.commit_group()
        for g in gl.static_range(2):
            if i * 2 + g < RANKS:
                a0, a1, a2, a3 = row_fragments(rows_ring.index(i % STAGES), g, ROWS6, LANES)
                b0, b1 = column_fragments(columns_ring.index(i % STAGES), g, COLUMNS5, LANES)
                if out.dtype.element_ty == gl.bfloat16:
                    c0, c1, c2, c3 = mma_16bit(c0, c1, c2, c3, a0, a1, a2, a3, b0, b1, MMA_BF16)
                else:
                    c0, c1, c2, c3 = mma_16bit(c0, c1, c2, c3, a0, a1, a2, a3, b0, b1, MMA_F16)

    s = load_row_scales(scales, rows, 2 * STEPS, 0, MT, ROW_SCALES)
    t = load_column_scales(wscales, columns, groups, 0, ODD, NT, COLUMN_SCALES)
    for step in range(0, STEPS):
        i = branch + step
        async_copy.wait_group(STAGES - 2)
        row_scales.index(step % 2).store(s)
        column_scales.index(step % 2).store(t.to(gl.float32) * 4096.0)
        slot = (i + STAGES - 1) % STAGES
        if i + STAGES - 1 < total:
            chunk = (step + STAGES - 1) * 2
            copy_rows(rows_ring.index(slot), codes, rows, STEPS * 16, chunk, 0, False, COPY_ROWS)
            copy_columns(columns_ring.index(slot), weight, columns, groups * 8, chunk, groups, ODD, COPY_COLUMNS)
        async_copy.commit_group()
        # A step ahead, to be stored then.
        group = gl.minimum(step + 1, STEPS - 1) * 2
        s = load_row_scales(scales, rows, 2 * STEPS, group, MT, ROW_SCALES)
        t = load_column_scales(wscales, columns, groups, group, ODD, NT, COLUMN_SCALES)
        for g in gl.static_range(2):
            a0, a1, a2, a3 = row_fragments(rows_ring.index(i % STAGES), g, ROWS6, LANES)
            b0, b1 = column_fragments(columns_ring.index(i % STAGES), g, COLUMNS5, LANES)
            s0, s1 = gl.split(row_scales.index(step % 2).slice(g, 1, dim=1).load(ROWS5))
            t0, t1 = gl.split(column_scales.index(step % 2).slice(g, 1, dim=0).load(COLUMNS5))
            s0 = same(s0, LANES)
            s1 = same(s1, LANES)
            t0 = same(t0, LANES)
            t1 = same(t1, LANES)
            if CODES == MIXED:
                if (step * 2 + g >= FIRST) & (step * 2 + g < LAST):
                    c0, c1, c2, c3 = mma_int4(c0, c1, c2, c3, a0, a1, a2, a3, b0, b1, s0, s1, t0, t1, MMA_U4)
                else:
                    c0, c1, c2, c3 = mma_int4(c0, c1, c2, c3, a0, a1, a2, a3, b0, b1, s0, s1, t0, t1, MMA_S4)
            elif CODES == UNSIGNED:
                c0, c1, c2, c3 = mma_int4(c0, c1, c2, c3, a0, a1, a2, a3, b0, b1, s0, s1, t0, t1, MMA_U4)
            else:
                c0, c1, c2, c3 = mma_int4(c0, c1, c2, c3, a0, a1, a2, a3, b0, b1, s0, s1, t0, t1, MMA_S4)

    # A lane holds columns 2j and 2j + 1 of rows i and 8 + i of each tile.
    if bias is not None:
        column = first_column + indices(NT, 1, 4, LANES) * 8 + indices(4, 3, 4, LANES) * 2
        b0 = gl.load(bias + gl.minimum(column, N - 1)).to(gl.float32)
        b1 = gl.load(bias + gl.minimum(column + 1, N - 1)).to(gl.float32)
        c0 += b0
        c1 += b1
        c2 += b0
        c3 += b1
    if GELU:
        c0 = gelu(c0)
        c1 = gelu(c1)
        c2 = gelu(c2)
        c3 = gelu(c3)
    TYPE: gl.constexpr = out.dtype.element_ty
    pairs = gl.join(gl.join(c0.to(TYPE), c1.to(TYPE)), gl.join(c2.to(TYPE), c3.to(TYPE)))
    # [row tile, column tile, i, j, parity, half] → [16·row tile + 8·half + i, 8·column tile + 2·j + parity]
    tile = gl.reshape(gl.permute(pairs, (0, 5, 2, 1, 3, 4)), (16 * MT, 8 * NT))
    STORE: gl.constexpr = gl.BlockedLayout([1, 8], [32 // NT, NT], [WARPS, 1], [1, 0])
    tile = gl.convert_layout(tile, STORE)
    row = first_row + gl.arange(0, 16 * MT, gl.SliceLayout(1, STORE))[:, None]
    column = first_column + gl.arange(0, 8 * NT, gl.SliceLayout(0, STORE))[None, :]
    at = (row // tokens).to(gl.int64) * batch_stride + (row % tokens).to(gl.int64) * token_stride
    gl.store(out + at + column, tile, mask=(row < M) & (column < N))
