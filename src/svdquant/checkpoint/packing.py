"""Nunchaku's packed orders and the natural one, both ways. Permutations of stored numbers: nothing is rounded.

Packed tensors lie in the order in which the lanes of a warp fetch them, in tiles of 128 rows and 64 columns. Natural
order is row-major; 4-bit codes then lie two to a byte, the lower column in the low nibble. N and K are multiples of 128
in every function but `unpack_awq` (N of 4, K of 64), the rank R of 16. Every `pack_x` is the inverse of its `unpack_x`.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE = 128
RANK_TILE = 16
AWQ_ROWS, AWQ_COLUMNS = 4, 64


def round_up(n: int, multiple: int) -> int:
    """The next multiple of `multiple` that is not below n."""
    return -(-n // multiple) * multiple


def unpack_w4a4(qweight: Tensor) -> Tensor:
    """int8 [N, K/2] to uint8 [N, K/2]. Eight columns are one 32-bit word in both orders; words are moved."""
    n, k = qweight.shape[0], qweight.shape[1] * 2
    words = qweight.contiguous().view(torch.int32)
    # Tile of rows, of columns | row in tile (t, l) | column in tile (l) | row half, column half.
    words = words.view(n // 128, k // 64, 8, 8, 4, 2, 2).permute(0, 2, 5, 3, 1, 6, 4)
    return words.reshape(n, k // 8).view(torch.uint8)


def pack_w4a4(codes: Tensor) -> Tensor:
    """uint8 [N, K/2] to int8 [N, K/2]."""
    n, k = codes.shape[0], codes.shape[1] * 2
    words = codes.contiguous().view(torch.int32).view(n // 128, 8, 2, 8, k // 64, 2, 4)
    return words.permute(0, 4, 1, 3, 6, 2, 5).reshape(n, k // 8).view(torch.int8)


def unpack_scales(wscales: Tensor) -> Tensor:
    """16-bit [G, N] (a shape only: the order is another) to [N, G]."""
    g, n = wscales.shape
    return wscales.reshape(n // 128, g, 8, 4, 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(n, g)


def pack_scales(wscales: Tensor) -> Tensor:
    """[N, G] to [G, N]."""
    n, g = wscales.shape
    return wscales.reshape(n // 128, 8, 2, 4, 2, g).permute(0, 5, 1, 3, 2, 4).reshape(g, n)


def unpack_vector(vector: Tensor) -> Tensor:
    """[N]: bias, smoothing, outer scales."""
    return unpack_scales(vector[None])[:, 0]


def pack_vector(vector: Tensor) -> Tensor:
    """[N]."""
    return pack_scales(vector[:, None])[0]


def unpack_micro_scales(wscales: Tensor) -> Tensor:
    """e4m3 [K/16, N] to [N, K/16]; four groups of one row are one 32-bit word."""
    g, n = wscales.shape
    words = wscales.contiguous().view(torch.uint8).view(n // 128, g // 4, 8, 4, 4, 4)
    return words.permute(0, 4, 3, 2, 1, 5).reshape(n, g).view(wscales.dtype)


def pack_micro_scales(wscales: Tensor) -> Tensor:
    """e4m3 [N, K/16] to [K/16, N]."""
    n, g = wscales.shape
    words = wscales.contiguous().view(torch.uint8).view(n // 128, 4, 4, 8, g // 4, 4)
    return words.permute(0, 4, 3, 2, 1, 5).reshape(g, n).view(wscales.dtype)


def _unpack_tiles(packed: Tensor) -> Tensor:
    """[C, R] to [C/16, R/16, 16, 16]: the rows and columns of each fragment of a matrix product."""
    c, r = packed.shape
    tiles = packed.reshape(c // 16, r // 16, 8, 4, 2, 2, 2)
    return tiles.permute(0, 1, 4, 2, 5, 3, 6).reshape(c // 16, r // 16, 16, 16)


def _pack_tiles(tiles: Tensor) -> Tensor:
    c, r = tiles.shape[0] * 16, tiles.shape[1] * 16
    split = tiles.reshape(c // 16, r // 16, 2, 8, 2, 4, 2)
    return split.permute(0, 1, 3, 5, 2, 4, 6).reshape(c, r)


def unpack_down(proj_down: Tensor) -> Tensor:
    """[K, R] to [R, K]."""
    k, r = proj_down.shape
    return _unpack_tiles(proj_down).permute(1, 2, 0, 3).reshape(r, k)


def pack_down(proj_down: Tensor) -> Tensor:
    """[R, K] to [K, R]."""
    r, k = proj_down.shape
    return _pack_tiles(proj_down.reshape(r // 16, 16, k // 16, 16).permute(2, 0, 1, 3))


def unpack_up(proj_up: Tensor) -> Tensor:
    """[N, R] to [N, R]."""
    return _unpack_tiles(proj_up).permute(0, 2, 1, 3).reshape(proj_up.shape)


def pack_up(proj_up: Tensor) -> Tensor:
    """[N, R] to [N, R]."""
    n, r = proj_up.shape
    return _pack_tiles(proj_up.reshape(n // 16, 16, r // 16, 16).permute(0, 2, 1, 3))


def unpack_awq(qweight: Tensor) -> Tensor:
    """W4A16 codes 0…15: int32 [N/4, K/2] or int16 [N/4, K] to uint8 [N, K/2].

    A 16-bit word holds the columns j, j+8, j+16, j+24 of one row; words of even and odd j are combined in pairs.
    """
    words = qweight.contiguous().view(torch.int32)
    rows, k = words.shape[0], words.shape[1] * 2
    out = torch.empty(rows, 4, k // 8, dtype=torch.int32, device=words.device)
    # In slices that stay in a cache.
    step = max(1, (1 << 18) // k)
    for start in range(0, rows, step):
        pairs = words[start : start + step].view(-1, k // 64, 4, 2, 4)
        # Even columns are in the low half of each pair, odd ones 16 bits above; they belong in neighbouring nibbles.
        codes = [((pairs >> 4 * s) & 15) | ((pairs >> (12 + 4 * s)) & 0xF0) for s in range(4)]
        # Four neighbouring bytes are moved as one word.
        stacked = torch.cat([c.to(torch.uint8).view(torch.int32) for c in codes], 4)
        out[start : start + step] = stacked.transpose(1, 2).reshape(-1, 4, k // 8)
    return out.view(rows * 4, k // 8).view(torch.uint8)


def pack_awq(codes: Tensor, dtype: torch.dtype = torch.int32) -> Tensor:
    """uint8 [N, K/2] to int32 [N/4, K/2] or int16 [N/4, K]."""
    n, k = codes.shape[0], codes.shape[1] * 2
    bytes_ = codes.view(n // 4, 4, k // 64, 2, 4, 4).permute(0, 2, 1, 3, 4, 5).to(torch.int32)
    words = torch.zeros(bytes_[..., 0, :].shape, dtype=torch.int32, device=codes.device)
    for s in range(4):
        byte = bytes_[..., s, :]
        words |= ((byte & 15) << 4 * s) | ((byte >> 4) << (16 + 4 * s))
    packed = words.reshape(n // 4, k // 2)
    return packed if dtype == torch.int32 else packed.view(torch.int16)


def deinterleave(stored: Tensor, chunks: int) -> Tensor:
    """Rows channel by channel ([channel][chunk]) to chunk by chunk, as a modulation is split by `chunk`."""
    return stored.unflatten(0, (-1, chunks)).transpose(0, 1).reshape(stored.shape)


def interleave(natural: Tensor, chunks: int) -> Tensor:
    """The inverse of `deinterleave`."""
    return natural.unflatten(0, (chunks, -1)).transpose(0, 1).reshape(natural.shape)


def unit_chunks(chunks: int) -> tuple[int, ...]:
    """The scale chunks of a modulation, whose stored bias holds the 1 of (1 + scale)."""
    return tuple(sorted({1, chunks - 2}))
