"""What the formats mean, a second time: float64 numpy, written from DESIGN.md and the docstrings.

Shares no arithmetic with the package; only its records are read (`layer`) and filled with random contents
(`random_tensors`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.linalg import hadamard

from svdquant.config import LayerSpec
from svdquant.numerics import SVDQuantTensors

SHIFT = 0.171875
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
# The non-negative e4m3 values in the order of their bytes, 0 … 126; 127 is NaN.
E4M3 = np.array([(m / 8) * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7) for e in range(16) for m in range(8)])[
    :127
]
INT4 = np.array([0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1], dtype=np.float64)
ACTIVATION_GROUP = {"int4": 64, "nvfp4": 16}
# Float32 rounding in the package may push a value that lies this close to a rounding boundary over it.
_AMBIGUOUS = 2e-6


def array(t: torch.Tensor | None) -> np.ndarray | None:
    """The numbers of a tensor as float64; uint8 bytes stay bytes."""
    if t is None:
        return None
    if t.dtype == torch.float8_e4m3fn:
        byte = t.view(torch.uint8).numpy()
        return np.where(byte & 128, -1, 1) * E4M3[byte & 127]
    return t.numpy() if t.dtype in (torch.uint8, torch.int8) else t.detach().double().numpy()


def round_to(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """float64 → the nearest value of a floating type, ties to even; by way of float32, as the package goes."""
    single = np.asarray(x, np.float32)
    if dtype == torch.float16:
        return single.astype(np.float16).astype(np.float64)
    if dtype == torch.bfloat16:
        bits = single.view(np.uint32)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
        return bits.astype(np.uint32).view(np.float32).astype(np.float64)
    return single.astype(np.float64)


def round_to_table(values: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Index of the nearest entry to |value|, ties to the even index, saturating."""
    magnitude = np.minimum(np.abs(values), table[-1])
    upper = np.clip(np.searchsorted(table, magnitude), 1, len(table) - 1)
    lower = upper - 1
    below, above = magnitude - table[lower], table[upper] - magnitude
    take_upper = (above < below) | ((above == below) & (upper % 2 == 0))
    return np.where(take_upper, upper, lower)


def e2m1(values: np.ndarray) -> np.ndarray:
    return np.copysign(E2M1[round_to_table(values, E2M1)], values)


def e4m3(values: np.ndarray) -> np.ndarray:
    return np.copysign(E4M3[round_to_table(values, E4M3)], values)


def nonzero(scale: np.ndarray) -> np.ndarray:
    return np.where(scale == 0, 1.0, scale)


def pack_nibbles(codes: np.ndarray) -> np.ndarray:
    """Codes 0 … 15 [N, K] to bytes [N, K/2], the first in the low nibble."""
    out = np.zeros((codes.shape[0], codes.shape[1] // 2), np.uint8)
    for j in range(out.shape[1]):
        out[:, j] = codes[:, 2 * j] + 16 * codes[:, 2 * j + 1]
    return out


def unpack_nibbles(packed: np.ndarray) -> np.ndarray:
    return np.stack([packed % 16, packed // 16], -1).reshape(packed.shape[0], -1)


def groups(x: np.ndarray, size: int) -> np.ndarray:
    return x.reshape(x.shape[0], -1, size)


def quantize_weight(weight: np.ndarray, weights: str, group: int, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """(values [N, K], scales [N, groups], outer scale [N] or None) of a weight whose K is a multiple of the group."""
    g = groups(weight, group or weight.shape[1])
    amax = np.abs(g).max(-1)
    if weights == "nvfp4":
        wanted = round_to(amax / 6, torch.float32)
        outer = nonzero(round_to(wanted.max() / 448, dtype))
        scales = np.maximum(e4m3(round_to(wanted / outer, torch.float32)), 2.0**-9)
        return e2m1(g / (scales * outer)[..., None]).reshape(weight.shape), scales, np.full(len(weight), outer)
    if weights == "int8":
        scales = nonzero(round_to(amax / 127, dtype))
        return np.clip(np.rint(g / scales[..., None]), -127, 127).reshape(weight.shape), scales, None
    # The codes of a step reach from -8.5 to 7.5 of it, or from -7.5 to 8.5 where it is negative: the shorter of both.
    steps = [round_to(np.maximum(-s * g / 8.5, s * g / 7.5).max(-1).clip(0), torch.float32) * s for s in (1, -1)]
    scales = nonzero(round_to(np.where(-steps[1] < steps[0], steps[1], steps[0]), dtype))
    return np.clip(np.rint(g / scales[..., None]), -8, 7).reshape(weight.shape), scales, None


def rotation(columns: int) -> np.ndarray:
    """[columns, columns]: blocks of the orthonormal 128-Hadamard on the diagonal."""
    return np.kron(np.eye(columns // 128), hadamard(128) / np.sqrt(128))


def quantize_activation(
    h: np.ndarray, activations: str, group: int, unsigned: np.ndarray | None, dtype: torch.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """(codes [M, groups, size], scales [M, groups, 1]) of h [M, K]; K is zero-padded to the group.

    unsigned: bool per group; those use 0 … 15. int8 and fp8 have one group, the token.
    """
    if activations in ("int8", "fp8"):
        g = h[:, None, :]
        scale = nonzero(
            round_to(np.abs(g).max(-1, keepdims=True) / {"int8": 127, "fp8": 448}[activations], torch.float32)
        )
        return (np.clip(np.rint(g / scale), -127, 127) if activations == "int8" else e4m3(g / scale)), scale
    g = groups(np.pad(h, ((0, 0), (0, -h.shape[1] % group))), group)
    amax = np.abs(g).max(-1, keepdims=True)
    if activations == "nvfp4":
        exact = np.minimum(_divide(amax, np.array(6.0)), 448)
        return e2m1(_divide(g, nonzero(exact))), e4m3(exact)
    high = np.full((1, g.shape[1], 1), 7.0)
    low = -high
    if unsigned is not None:
        high[0, unsigned], low[0, unsigned] = 15, 0
    # The code is that of the exact scale; only the stored one is rounded.
    exact = nonzero(_divide(amax, high))
    return np.clip(np.rint(_divide(g, exact)), low, high), round_to(exact, dtype)


def own_type(h: np.ndarray, activations: str, dtype: torch.dtype) -> np.ndarray:
    """4-bit codes are those of h in the model's own type."""
    return round_to(h, dtype) if activations in ("int4", "nvfp4") and dtype != torch.float32 else h


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a.astype(np.float32) / b.astype(np.float32)).astype(np.float64)


@dataclass
class Layer:
    """One quantized linear as plain float64 arrays; the fields of `SVDQuantTensors`."""

    spec: Any
    in_features: int
    residual: np.ndarray
    smooth: np.ndarray
    down: np.ndarray | None
    up: np.ndarray | None
    bias: np.ndarray

    def shift(self) -> np.ndarray:
        out = np.zeros(self.in_features)
        for start, stop in self.spec.unsigned:
            out[start:stop] = SHIFT
        return out

    def stretched(self, h: np.ndarray) -> np.ndarray:
        """Zero-padded to the stored columns, rotated where the layer is."""
        h = np.pad(h, ((0, 0), (0, self.residual.shape[1] - h.shape[1])))
        return h @ rotation(h.shape[1]) if self.spec.rotate else h

    def dense(self) -> tuple[np.ndarray, np.ndarray]:
        """(W [N, K], b [N]) with exact activations."""
        weight = self.residual @ rotation(self.residual.shape[1]) if self.spec.rotate else self.residual
        weight = weight[:, : self.in_features] / self.smooth
        bias = self.bias + weight @ self.shift()
        return (weight if self.down is None else weight + self.up @ self.down), bias

    def forward(self, x: np.ndarray, activations: str, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
        """(y [M, N], certain [M]): rows with a code that float32 may round the other way are not certain."""
        if activations == "none":
            weight, bias = self.dense()
            return x @ weight.T + bias, np.ones(len(x), bool)
        shift = self.shift()
        four = activations == "int4"
        # Single operations of float32 are exact to the bit everywhere; only sums are not.
        h = (x + shift if four else x).astype(np.float32) / self.smooth.astype(np.float32)
        h = self.stretched(h.astype(np.float64))
        same = self.spec.weights == activations and self.spec.group_size
        group = self.spec.group_size if same else ACTIVATION_GROUP.get(activations, 0)
        unsigned = None
        if four and self.spec.unsigned:
            columns = -(-h.shape[1] // group) * group
            marked = np.pad(shift, (0, columns - len(shift))) > 0
            unsigned = marked.reshape(-1, group).any(1)
        codes, scale = quantize_activation(own_type(h, activations, dtype), activations, group, unsigned, dtype)
        certain = np.ones(len(x), bool)
        if self.spec.rotate or activations not in ("int4", "nvfp4"):
            certain = self._certain(h, activations, group, unsigned, dtype)
        quantized = (codes * scale).reshape(len(x), -1)[:, : h.shape[1]]
        if not four:
            quantized = quantized + self.stretched((shift / self.smooth)[None])
        y = quantized @ self.residual.T + self.bias
        return (y if self.down is None else y + x @ self.down.T @ self.up.T), certain

    def _certain(self, h: np.ndarray, *how: Any) -> np.ndarray:
        signs = np.random.default_rng(0).choice([-1.0, 1.0], h.shape)
        # A rotation adds up 128 channels, so its rounding errors are those of the largest.
        step = _AMBIGUOUS * signs * (np.abs(h).max(1, keepdims=True) * (h != 0) / 4 if self.spec.rotate else np.abs(h))
        (more, more_scale), (less, less_scale) = (
            quantize_activation(own_type(h + e, how[0], how[-1]), *how) for e in (step, -step)
        )
        moved = (more != less) | (np.abs(more_scale - less_scale) > 1e-4 * more_scale)
        return ~moved.reshape(len(h), -1).any(1)


def layer(t: Any) -> Layer:
    """Reads an `SVDQuantTensors` record."""
    q = array(t.qweight)
    if t.spec.weights == "int8":
        values = q.astype(np.float64)
    else:
        codes = unpack_nibbles(q)
        values = INT4[codes] if t.spec.weights == "int4" else np.where(codes & 8, -1, 1) * E2M1[codes & 7]
    scales = array(t.wscales)
    residual = (groups(values, values.shape[1] // scales.shape[1]) * scales[..., None]).reshape(values.shape)
    if t.wcscales is not None:
        residual = residual * array(t.wcscales)[:, None]
    smooth = np.ones(t.in_features) if t.smooth_factor is None else array(t.smooth_factor)
    bias = np.zeros(len(residual)) if t.bias is None else array(t.bias)
    return Layer(t.spec, t.in_features, residual, smooth, array(t.proj_down), array(t.proj_up), bias)


def relative(actual: Any, expected: Any) -> float:
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def signs(rows: int, columns: int) -> torch.Tensor:
    """[rows, columns] of 1 and, every third, -1: int4 scales have either."""
    return 1 - 2 * ((torch.arange(rows)[:, None] + torch.arange(columns)) % 3 == 1).int()


def random_tensors(
    spec: LayerSpec, in_features: int, out_features: int, bias: bool, dtype: torch.dtype, seed: int = 0
) -> SVDQuantTensors:
    """Random stored bytes, scales and branch: nothing has been quantized to get them."""
    g = torch.Generator().manual_seed(seed)
    group = spec.group_size
    multiple = max(group, 1, 128 if spec.rotate else 1)
    columns = -(-in_features // multiple) * multiple

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return (low + (high - low) * torch.rand(*shape, generator=g)).to(dtype)

    if spec.weights == "int8":
        qweight = torch.randint(-127, 128, (out_features, columns), generator=g, dtype=torch.int8)
    else:
        qweight = torch.randint(0, 256, (out_features, columns // 2), generator=g, dtype=torch.uint8)
    scales = (out_features, columns // group if group else 1)
    nvfp4 = spec.weights == "nvfp4"
    wscales = torch.randint(0x20, 0x70, scales, generator=g, dtype=torch.uint8).view(torch.float8_e4m3fn)
    svd = spec.kind == "svdquant"
    if not nvfp4:
        wscales = uniform(0.01, 0.05, *scales) / (16 if spec.weights == "int8" else 1)
    if spec.weights == "int4":
        wscales = wscales * signs(*scales)
    return SVDQuantTensors(
        spec,
        in_features,
        qweight,
        wscales,
        uniform(0.001, 0.002, out_features) if nvfp4 else None,
        uniform(0.5, 2, in_features) if svd and spec.smooth else None,
        uniform(-0.1, 0.1, spec.rank, in_features) if svd and spec.rank else None,
        uniform(-0.1, 0.1, out_features, spec.rank) if svd and spec.rank else None,
        uniform(-1, 1, out_features) if bias or spec.unsigned else None,
    )


def random_inputs(spec: LayerSpec, rows: int, in_features: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    """[rows, K] Gaussian, with a few outlier channels; behind a GELU where the layer expects it."""
    x = torch.randn(rows, in_features, generator=torch.Generator().manual_seed(seed))
    x[:, ::37] *= 8
    for start, stop in spec.unsigned:
        x[:, start:stop] = torch.nn.functional.gelu(x[:, start:stop])
    return x.to(dtype)
