"""Nunchaku's packed layouts read in float64 numpy, from the index formulas: shares no code with the package.

Every reader computes, for each logical coordinate, where its word, byte or nibble lies in the flat buffer, and gathers.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

INT4 = np.array([0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1], dtype=np.float64)
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
# What a layer behind a GELU adds to its input so that four bits without a sign hold it.
SHIFT = 0.171875


def numbers(t: Tensor) -> np.ndarray:
    """The values of a tensor as float64, in its shape."""
    return e4m3(t) if t.dtype == torch.float8_e4m3fn else t.detach().double().numpy()


def e4m3(t: Tensor) -> np.ndarray:
    """float8_e4m3fn bytes by their bits: sign, 4 exponent bits with bias 7, 3 mantissa bits; no infinity."""
    byte = t.contiguous().view(torch.uint8).numpy()
    exponent, mantissa = (byte >> 3 & 15).astype(np.int64), (byte & 7) / 8
    value = np.where(exponent == 0, mantissa * 2.0**-6, (1 + mantissa) * 2.0 ** (exponent - 7))
    value = np.where((byte & 127) == 127, np.nan, value)
    return np.where(byte & 128, -value, value)


def _bytes(t: Tensor) -> np.ndarray:
    return t.contiguous().view(torch.uint8).numpy().reshape(-1)


def code_positions(rows: int, columns: int) -> np.ndarray:
    """[rows, columns] → index of the code's nibble; nibble 2i is the low half of byte i. Multiples of 128."""
    n, k = np.arange(rows)[:, None], np.arange(columns)[None, :]
    row_block, row_tile, row_half, row = n // 128, n // 16 % 8, n // 8 % 2, n % 8
    column_block, column_half, quad, element = k // 64, k // 32 % 2, k // 8 % 4, k % 8
    word = row_block * (columns // 64) + column_block
    word = ((word * 8 + row_tile) * 8 + row) * 4 + quad
    word = word * 4 + 2 * row_half + column_half
    return 8 * word + element


def scale_positions(rows: int, groups: int) -> np.ndarray:
    """[rows, groups] → index of the 16-bit group scale; with one group, of a vector's entry."""
    n, g = np.arange(rows)[:, None], np.arange(groups)[None, :]
    within = 16 * (n // 16 % 8) + 4 * (n // 2 % 4) + 2 * (n // 8 % 2) + n % 2
    return (n // 128 * groups + g) * 128 + within


def micro_scale_positions(rows: int, groups: int) -> np.ndarray:
    """[rows, groups of 16] → index of the e4m3 byte; a multiple of four groups."""
    n, g = np.arange(rows)[:, None], np.arange(groups)[None, :]
    block = n // 128 * (groups // 4) + g // 4
    return block * 512 + 64 * (n % 8) + 16 * (n // 8 % 4) + 4 * (n // 32 % 4) + g % 4


def low_rank_positions(channels: int, rank: int, down: bool) -> np.ndarray:
    """[channels, rank] → index in the buffer; `down` and up differ in which of both runs along a tile's rows."""
    c, r = np.arange(channels)[:, None], np.arange(rank)[None, :]
    i, j = (r % 16, c % 16) if down else (c % 16, r % 16)
    tile = c // 16 * (rank // 16) + r // 16
    return tile * 256 + i % 8 * 32 + j // 2 % 4 * 8 + i // 8 * 4 + j // 8 * 2 + j % 2


def w4a16_positions(rows: int, columns: int) -> np.ndarray:
    """[rows, columns] → index of the code's nibble; four to a 16-bit word, lowest first."""
    n, k = np.arange(rows)[:, None], np.arange(columns)[None, :]
    word = n // 4 * columns + 64 * (k // 64) + 16 * (n % 4) + 8 * (k // 32 % 2) + k % 8
    return 4 * word + k // 8 % 4


def _nibbles(t: Tensor, positions: np.ndarray) -> np.ndarray:
    return _bytes(t)[positions // 2] >> (positions % 2 * 4).astype(np.uint8) & 15


def w4a4_codes(qweight: Tensor) -> np.ndarray:
    """int8 [N, K/2] → uint8 codes 0 … 15 [N, K] in natural order."""
    rows, columns = qweight.shape[0], 2 * qweight.shape[1]
    return _nibbles(qweight, code_positions(rows, columns))


def w4a4_values(qweight: Tensor, nvfp4: bool) -> np.ndarray:
    return (E2M1 if nvfp4 else INT4)[w4a4_codes(qweight)]


def scales(wscales: Tensor) -> np.ndarray:
    """16-bit [K/64, N] → [N, K/64]."""
    groups, rows = wscales.shape
    return numbers(wscales).reshape(-1)[scale_positions(rows, groups)]


def micro_scales(wscales: Tensor) -> np.ndarray:
    """e4m3 [K/16, N] → [N, K/16]."""
    groups, rows = wscales.shape
    return numbers(wscales).reshape(-1)[micro_scale_positions(rows, groups)]


def vector(t: Tensor) -> np.ndarray:
    return numbers(t)[scale_positions(len(t), 1)[:, 0]]


def lora_down(t: Tensor) -> np.ndarray:
    """[K, R] as stored → [R, K]."""
    return numbers(t).reshape(-1)[low_rank_positions(*t.shape, down=True)].T


def lora_up(t: Tensor) -> np.ndarray:
    """[N, R] as stored → [N, R]."""
    return numbers(t).reshape(-1)[low_rank_positions(*t.shape, down=False)]


def w4a16_codes(qweight: Tensor) -> np.ndarray:
    """int32 [N/4, K/2] or int16 [N/4, K] → uint8 codes 0 … 15 [N, K]."""
    rows = 4 * qweight.shape[0]
    columns = qweight.shape[1] * qweight.element_size() // 2
    return _nibbles(qweight, w4a16_positions(rows, columns))


def deinterleave(a: np.ndarray, chunks: int) -> np.ndarray:
    """Rows channel·S + chunk → rows chunk·channels + channel."""
    channels = len(a) // chunks
    chunk, channel = np.divmod(np.arange(len(a)), channels)
    return a[channel * chunks + chunk]


def scale_rows(n: int, chunks: int) -> np.ndarray:
    """[n] bool: which rows, in stock order, belong to a chunk whose stored bias has the 1 of "1 + scale" in it."""
    return np.isin(np.arange(n) // (n // chunks), (1, chunks - 2))


Tensors = Mapping[str, Tensor]


def _leaf(tensors: Tensors, *names: str) -> Tensor | None:
    return next((tensors[name] for name in names if name in tensors), None)


def w4a4_residual(tensors: Tensors, n: int, k: int) -> np.ndarray:
    """[n, k]: the four-bit part, which multiplies the smoothed input."""
    values = w4a4_values(tensors["qweight"], nvfp4 := tensors["wscales"].dtype == torch.float8_e4m3fn)
    if nvfp4:
        weight = values * np.repeat(micro_scales(tensors["wscales"]), 16, axis=1)
    else:
        weight = values * np.repeat(scales(tensors["wscales"]), 64, axis=1)
    if "wtscale" in tensors:
        weight = weight * numbers(tensors["wtscale"]).item()
    if "wcscales" in tensors:
        weight = weight * vector(tensors["wcscales"])[:, None]
    return weight[:n, :k]


def dense_w4a4(tensors: Tensors, n: int, k: int, unsigned: bool = False) -> tuple[np.ndarray, np.ndarray | None]:
    """(W [n, k], b [n] or None) that the layer means when activations are not quantized.

    unsigned: the bias holds the compensation of the shift, which is taken out.
    """
    weight, bias = w4a4_residual(tensors, n, k), _leaf(tensors, "bias")
    b = None if bias is None else vector(bias)[:n]
    smooth = _leaf(tensors, "smooth", "smooth_factor")
    if smooth is not None:
        weight = weight / vector(smooth)[:k]
    if unsigned:
        b = (0 if b is None else b) + SHIFT * weight.sum(1)
    down, up = _leaf(tensors, "lora_down", "proj_down"), _leaf(tensors, "lora_up", "proj_up")
    if down is not None and up is not None:
        weight = weight + lora_up(up)[:n] @ lora_down(down)[:, :k]
    return weight, b


def run_w4a4(tensors: Tensors, x: np.ndarray, shift: float = 0.0) -> np.ndarray:
    """[M, K] → [M, Np]: the layer as it is run, on all that is stored. Inputs beyond K are 0, none is quantized."""
    rows, columns = tensors["qweight"].shape[0], 2 * tensors["qweight"].shape[1]
    x = np.pad(x, ((0, 0), (0, columns - x.shape[1])))
    smooth, bias = _leaf(tensors, "smooth", "smooth_factor"), _leaf(tensors, "bias")
    down, up = _leaf(tensors, "lora_down", "proj_down"), _leaf(tensors, "lora_up", "proj_up")
    assert smooth is not None and down is not None and up is not None
    y = (x + shift) / vector(smooth) @ w4a4_residual(tensors, rows, columns).T
    return y + x @ lora_down(down).T @ lora_up(up).T + (0 if bias is None else vector(bias))


def dense_awq(tensors: Tensors, n: int, k: int, group: int, chunks: int = 0) -> tuple[np.ndarray, np.ndarray | None]:
    """(W [n, k], b [n] or None) of a W4A16 layer; chunks: of a modulation stored channel by channel with 1 added."""
    scale, zero = _leaf(tensors, "wscales", "scales"), _leaf(tensors, "wzeros", "scaled_zeros")
    assert scale is not None and zero is not None
    of_column = np.arange(k) // group
    codes = w4a16_codes(tensors["qweight"])
    weight = codes[:n, :k] * numbers(scale)[of_column].T[:n] + numbers(zero)[of_column].T[:n]
    bias = None if "bias" not in tensors else numbers(tensors["bias"])
    if chunks:
        weight = deinterleave(weight, chunks)
        bias = None if bias is None else deinterleave(bias, chunks) - scale_rows(n, chunks)
    return weight, bias
