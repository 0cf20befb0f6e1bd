"""What a quantized linear computes, to the bit where it has bits: numpy, written from docs/format.md.

Codes are computed in float32, operation by operation in the documented order, so they are exact; products are float64.
Only the package's records are read. Beside it: records of every kind (`layer`), and the paths that a CPU has (`PATHS`).
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from reference64 import E2M1, INT4, SHIFT, array, round_to, signs, unpack_nibbles

from svdquant.config import LayerSpec
from svdquant.kernels import svdquant_linear, w4a16_linear
from svdquant.numerics import SVDQuantTensors

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = [BF16, FP16, FP32]
GROUPS = {"int4": 64, "nvfp4": 16, "int8": 0}
# ‖y − truth‖ / ‖truth‖ beside what rounding y to its type costs. 8-bit codes of the native path may differ from the
# truth's where they are nearly ties; its low-rank branch is bf16 where x is.
NATIVE_BOUND = {BF16: 1e-3, FP16: 1e-3, FP32: 1e-3}
NATIVE_EXACT_BOUND = {BF16: 1e-3, FP16: 1e-5, FP32: 1e-5}
# The dequantize path multiplies bf16 operands in bf16, and everything else in float32.
DEQUANTIZE_BOUND = {BF16: 5.5e-3, FP16: 1e-5, FP32: 1e-5}
FAST_GROUPS = (0, 16, 32, 64, 128, 256)
FP16_MAX = 65504.0


def weight(t: Any) -> np.ndarray:
    """Ŵ float64 [N, Kp]."""
    q = array(t.qweight)
    if t.spec.weights == "int8":
        values = q.astype(np.float64)
    elif t.wzeros is not None:
        values = unpack_nibbles(q).astype(np.float64)
    else:
        codes = unpack_nibbles(q)
        values = INT4[codes] if t.spec.weights == "int4" else np.where(codes & 8, -1, 1) * E2M1[codes & 7]
    columns = values.shape[1]
    out = values * _spread(array(t.wscales), columns)
    if t.wcscales is not None:
        out *= _spread(array(t.wcscales).reshape(len(out), -1), columns)
    return out if t.wzeros is None else out + _spread(array(t.wzeros), columns)


def _spread(scales: np.ndarray, columns: int) -> np.ndarray:
    return np.repeat(scales, columns // scales.shape[1], axis=1)


def rotated(h: np.ndarray) -> np.ndarray:
    """float32 [M, Kp] times the 128-Hadamard blocks: seven rounds of sums and differences, the farthest pairs first."""
    y = h.reshape(len(h), h.shape[1] // 128, 128)
    half = 64
    while half:
        pair = y.reshape(*y.shape[:2], 64 // half, 2, half)
        a, b = pair[..., 0, :], pair[..., 1, :]
        y = np.stack((a + b, a - b), -2).reshape(y.shape)
        half //= 2
    return (y * np.float32(1 / math.sqrt(128))).reshape(h.shape)


def shift(t: Any) -> np.ndarray:
    out = np.zeros(t.in_features, np.float32)
    for start, stop in t.spec.unsigned:
        out[start:stop] = SHIFT
    return out


def smoothed(x: np.ndarray, t: Any) -> np.ndarray:
    """float32 x/s [M, Kp]: padded, rotated."""
    h = x if t.smooth_factor is None else x / array(t.smooth_factor).astype(np.float32)
    columns = t.qweight.shape[1] * (1 if t.spec.weights == "int8" else 2)
    h = np.pad(h, ((0, 0), (0, columns - h.shape[1])))
    return rotated(h) if t.spec.rotate else h


def quantized(x: torch.Tensor, t: Any, activations: str) -> tuple[np.ndarray, np.ndarray]:
    """(codes [M, groups, size], scales [M, groups, 1]) of x [M, K]; int8 has one group, the token."""
    rows = x.detach().float().numpy()
    with np.errstate(all="ignore"):
        if activations == "int8":
            h = smoothed(rows, t)[:, None]
            scale = _nonzero(np.abs(h).max(-1, keepdims=True) / np.float32(127))
            return np.clip(np.rint(h / scale), -127, 127).astype(np.float64), scale.astype(np.float64)
        h = smoothed(rows + shift(t) if t.spec.unsigned else rows, t)
        half = x.dtype != FP32
        if half:
            h = round_to(h, x.dtype).astype(np.float32)
        group = t.spec.group_size if t.spec.weights == "int4" and t.spec.group_size else 64
        h = np.pad(h, ((0, 0), (0, -h.shape[1] % group)))
        h = h.reshape(len(h), h.shape[1] // group, group)
        high = np.full((1, h.shape[1], 1), 7, np.float32)
        low = -high
        for start, stop in t.spec.unsigned:
            high[0, start // group : -(-stop // group)], low[0, start // group : -(-stop // group)] = 15, 0
        exact = _nonzero(np.abs(h).max(-1, keepdims=True) / high)
        codes = np.clip(np.rint(h / exact), low, high)
        largest = FP16_MAX if x.dtype == FP16 else float(torch.finfo(x.dtype).max)
        return codes.astype(np.float64), round_to(np.minimum(exact, np.float32(largest)), x.dtype)


def _nonzero(scale: np.ndarray) -> np.ndarray:
    return np.where(scale == 0, np.float32(1), scale)


def output(x: torch.Tensor, t: Any, activations: str) -> np.ndarray:
    """y float64 [M, N] of x [M, K], from the codes of `quantized`. activations: int4, int8 or none."""
    w, dense = weight(t), x.detach().double().numpy()
    with np.errstate(all="ignore"):
        if activations == "none":
            h = np.zeros((len(dense), w.shape[1]))
            h[:, : t.in_features] = (dense + shift(t)) / (1 if t.smooth_factor is None else array(t.smooth_factor))
            h = _exactly_rotated(h) if t.spec.rotate else h
        else:
            codes, scales = quantized(x, t, activations)
            h = (codes * scales).reshape(len(dense), codes.shape[1] * codes.shape[2])[:, : w.shape[1]]
            if activations == "int8" and t.spec.unsigned:
                h = h + smoothed(shift(t)[None], t)
        y = h @ w.T
        if t.proj_down is not None:
            y += dense @ array(t.proj_down).T @ array(t.proj_up).T
        return y if t.bias is None else y + array(t.bias)


def _exactly_rotated(h: np.ndarray) -> np.ndarray:
    i = np.arange(128)
    signs = np.array([[(-1) ** bin(a & b).count("1") for b in i] for a in i])
    return (h.reshape(len(h), -1, 128) @ (signs / np.sqrt(128))).reshape(h.shape)


def weight_only(x: torch.Tensor, t: Any) -> np.ndarray:
    """y float64 [M, N] of `w4a16_linear`."""
    y = x.detach().double().numpy() @ weight(t)[:, : x.shape[1]].T
    return y if t.bias is None else y + array(t.bias)


def layer(
    k: int,
    n: int,
    weights: str = "int4",
    group: int | None = None,
    rank: int = 16,
    dtype: torch.dtype = FP32,
    bias: bool = True,
    seed: int = 0,
    types: dict[str, torch.dtype] | None = None,
    spread: float = 5.0,
    **spec: Any,
) -> SVDQuantTensors:
    """A record of random bytes. types: of single tensors; spread: largest over smallest group scale; spec: the rest."""
    g = torch.Generator().manual_seed(seed)
    group = GROUPS[weights] if group is None else group
    s = LayerSpec(weights=weights, group_size=group, rank=rank, **spec)
    multiple = math.lcm(max(group, 1), 128 if s.rotate else 1)
    multiple *= 2 if weights != "int8" and multiple % 2 else 1
    columns = -(-k // multiple) * multiple
    scales = (n, columns // group if group else 1)

    def uniform(low: float, high: float, name: str, *shape: int) -> torch.Tensor:
        return (low + (high - low) * torch.rand(*shape, generator=g)).to((types or {}).get(name, dtype))

    if weights == "int8":
        qweight = torch.randint(-127, 128, (n, columns), generator=g, dtype=torch.int8)
    else:
        qweight = torch.randint(0, 256, (n, columns // 2), generator=g, dtype=torch.uint8)
    wcscales = None
    if weights == "nvfp4":
        steps = round(8 * math.log2(spread))
        wscales = torch.randint(0x60 - steps, 0x60, scales, generator=g, dtype=torch.uint8).view(torch.float8_e4m3fn)
        outer = (n,) if s.outer_blocks == 1 else (n, s.outer_blocks)
        wcscales = uniform(0.001, 0.002, "wcscales", *outer) if s.kind == "svdquant" else None
    else:
        largest = 0.05 if weights == "int4" else 0.003
        wscales = (largest * spread ** -torch.rand(*scales, generator=g)).to((types or {}).get("wscales", dtype))
        if weights == "int4":
            wscales = wscales * signs(*scales)
    svd = s.kind == "svdquant"
    # A larger rank is no larger part of the weight.
    branch = 0.1 * min(1.0, math.sqrt(32 / max(rank, 1)))
    return SVDQuantTensors(
        s,
        k,
        qweight,
        wscales,
        wcscales,
        uniform(0.5, 2, "smooth_factor", k) if svd and s.smooth else None,
        uniform(-0.1, 0.1, "proj_down", rank, k) if svd and rank else None,
        uniform(-branch, branch, "proj_up", n, rank) if svd and rank else None,
        uniform(-1, 1, "bias", n) if bias else None,
        (-7.3 * wscales.float()).to(wscales.dtype) * uniform(0.8, 1.2, "wscales", *scales) if s.zeros else None,
    )


def inputs(rows: int, k: int, dtype: torch.dtype, seed: int = 1, unsigned: Any = ()) -> torch.Tensor:
    """[rows, K] Gaussian with outlier channels and rows of different sizes; behind a GELU where `unsigned`."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, k, generator=g)
    x[:, ::37] *= 8
    for start, stop in unsigned:
        x[:, start:stop] = torch.nn.functional.gelu(x[:, start:stop])
    return x.to(dtype)


def check(path: str, y: torch.Tensor, expected: np.ndarray, t: Any, label: object = "", exact: bool = False) -> None:
    """Compares y [M, N] of record t with the truth; exact: where its path has no 8-bit codes to differ in.

    The norm of the error of all of y is bounded, and that of each element: one wrong tile must not drown in the rest.
    """
    if path == "dequantize" or t.spec.group_size not in FAST_GROUPS:
        limit = DEQUANTIZE_BOUND[y.dtype]
    else:
        limit = (NATIVE_EXACT_BOUND if exact else NATIVE_BOUND)[y.dtype]
    actual = y.detach().double().numpy()
    assert actual.shape == expected.shape, label
    if not expected.size:
        return
    size = np.linalg.norm(expected)
    rounding = np.linalg.norm(round_to(expected, y.dtype) - expected) / size if y.dtype != FP32 else 0.0
    error, scale = np.abs(actual - expected), math.sqrt((expected**2).mean())
    relative, allowed = np.linalg.norm(error) / size, 1.05 * math.hypot(rounding, limit)
    assert relative <= allowed, (label, f"relative error {relative:.2e} > {allowed:.2e}")
    # One 8-bit code that is another is 0.4 % of its row where K is 5,600.
    local = 10 * limit if exact or limit < 1e-3 else 20 * limit
    worst = error / (local * scale + 0.51 * torch.finfo(y.dtype).eps * np.abs(expected))
    where = np.unravel_index(worst.argmax(), worst.shape)
    assert worst.max() <= 1, (label, f"element {where} is {actual[where]}, not {expected[where]}")


def check_linear(path: str, x: torch.Tensor, t: Any, activations: str, label: object = "") -> torch.Tensor:
    """`svdquant_linear` of x [M, K] as it is now; returns y."""
    y = svdquant_linear(x, t, activations)
    check(path, y, output(x.clone(), t, activations), t, label, activations == "int4")
    return y


def check_weight_only(path: str, x: torch.Tensor, t: Any, label: object = "") -> torch.Tensor:
    """`w4a16_linear` of x [M, K] as it is now; returns y."""
    y = w4a16_linear(x, t.qweight, t.wscales, t.bias, t.spec.weights, t.wzeros)
    check(path, y, weight_only(x, t), t, label, True)
    return y


def _native() -> Any:
    if importlib.util.find_spec("svdquant.kernels.cpu.library") is None:
        return None
    if importlib.util.find_spec("svdquant.kernels.cpu.linear") is None:
        return None
    from svdquant.kernels.cpu import library

    return library.load()


def _paths() -> list[str]:
    """The CPU's own paths: each variant of the native library that runs here, else the dequantize path."""
    forced = os.environ.get("SVDQUANT_BACKEND", "native")
    loaded = None if forced != "native" else _native()
    if loaded is None:
        return ["dequantize"]
    if os.environ.get("SVDQUANT_CPU_ISA"):
        return [os.environ["SVDQUANT_CPU_ISA"]]
    prototype = ctypes.CFUNCTYPE(ctypes.c_char_p)
    return prototype(("svdq_available", loaded.cdll))().decode().split(",")


PATHS = _paths()


@contextmanager
def running(path: str) -> Iterator[None]:
    """Everything inside is multiplied by `path`: "dequantize", or a variant of the native library."""
    before = os.environ.get("SVDQUANT_BACKEND")
    os.environ["SVDQUANT_BACKEND"] = "dequantize" if path == "dequantize" else "native"
    try:
        if path == "dequantize":
            yield
        else:
            cdll = _native().cdll
            select = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_char_p)(("svdq_select", cdll))
            used = ctypes.CFUNCTYPE(ctypes.c_char_p)(("svdq_isa", cdll))()
            assert select(path.encode()) == 0
            # Sums beside the codes are a variant's own.
            importlib.import_module("svdquant.kernels.cpu.inputs")._per_thread.__dict__.pop("last", None)
            try:
                yield
            finally:
                select(used)
    finally:
        os.environ.pop("SVDQUANT_BACKEND") if before is None else os.environ.update(SVDQUANT_BACKEND=before)
