"""A second reader of the format, written from docs/format.md in numpy: shares no code with the package."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
INT4 = np.array([*range(8), *range(-8, 0)], dtype=np.float64)
SHIFT = 0.171875
GROUPS = {"int4": 64, "nvfp4": 16, "int8": 0}


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Every tensor of a safetensors file as float64, bytes as they are; and the metadata."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    metadata = header.pop("__metadata__", {})
    out = {}
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        out[name] = _decode(raw[8 + length + start : 8 + length + stop], entry["dtype"]).reshape(entry["shape"])
    return out, metadata


def _decode(data: bytes, dtype: str) -> np.ndarray:
    if dtype == "U8":
        return np.frombuffer(data, "u1")
    if dtype == "I8":
        return np.frombuffer(data, "i1")
    if dtype == "F8_E4M3":
        return _e4m3(np.frombuffer(data, "u1"))
    if dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4").astype(np.float64)
    return np.frombuffer(data, {"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype]).astype(np.float64)


def _e4m3(byte: np.ndarray) -> np.ndarray:
    exponent, mantissa = (byte >> 3) & 15, (byte & 7).astype(np.float64)
    value = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent.astype(float) - 7))
    value[(byte & 127) == 127] = np.nan
    return np.where(byte & 128, -value, value)


def layer_fields(quantization: dict[str, Any], name: str) -> dict[str, Any]:
    """The description of one layer with its defaults."""
    weights = quantization["layers"][name].get("weights", quantization["weights"])
    group = quantization["group_size"]
    return {
        "weights": quantization["weights"],
        "group_size": GROUPS[weights] if group is None else group,
        "unsigned": [],
        "rotate": False,
    } | quantization["layers"][name]


def dense(tensors: dict[str, np.ndarray], name: str, spec: dict[str, Any], in_features: int) -> tuple[Any, Any]:
    """(W [N, K], b [N] or None) in float64 that the tensors of layer `name` mean."""
    t = {leaf: tensors.get(f"{name}.{leaf}") for leaf in ("qweight", "wscales", "wcscales", "smooth_factor", "bias")}
    q = t["qweight"]
    if q.dtype == np.uint8:
        codes = np.empty((q.shape[0], q.shape[1] * 2), np.uint8)
        codes[:, 0::2], codes[:, 1::2] = q & 15, q >> 4
        values = (INT4 if spec["weights"] == "int4" else E2M1)[codes]
    else:
        values = q.astype(np.float64)
    group = spec["group_size"] or values.shape[1]
    residual = values * np.repeat(t["wscales"], group, axis=1)
    if t["wcscales"] is not None:
        residual = residual * t["wcscales"][:, None]
    if spec["rotate"]:
        residual = residual @ _rotation(residual.shape[1])
    weight = residual[:, :in_features]
    if t["smooth_factor"] is not None:
        weight = weight / t["smooth_factor"]
    bias = t["bias"]
    for start, stop in spec["unsigned"]:
        bias = bias + SHIFT * weight[:, start:stop].sum(1)
    down, up = tensors.get(f"{name}.proj_down"), tensors.get(f"{name}.proj_up")
    return (weight if down is None else weight + up @ down), bias


def _rotation(columns: int) -> np.ndarray:
    i = np.arange(128)
    signs = np.array([[bin(a & b).count("1") for b in i] for a in i])
    block = np.where(signs % 2, -1.0, 1.0) / np.sqrt(128)
    return np.kron(np.eye(columns // 128), block)
