"""The C structures of `csrc/svdquant.h`, field for field."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p

import torch

# Codes come in blocks of this many columns.
BLOCK = 256

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float8_e4m3fn: 3}
FORMATS = {"int4": 0, "nvfp4": 1, "int8": 2}
UNSIGNED_INT4 = 3


class Input(ctypes.Structure):
    """One input, quantized."""

    _fields_ = (
        ("rows", c_int64),
        ("features", c_int64),
        ("columns", c_int64),
        ("x", c_void_p),
        ("x_stride", c_int64),
        ("x_type", c_int32),
        ("bits", c_int32),
        ("group", c_int32),
        ("sum_group", c_int32),
        ("smooth", c_void_p),
        ("smooth_type", c_int32),
        ("rotate", c_int32),
        ("ranges", c_void_p),
        ("range_count", c_int32),
        ("shift", c_float),
        ("threads", c_int32),
        ("format", c_int32),
        ("low_scales", c_void_p),
        ("low_rows", c_int64),
        ("low_first", c_int64),
        ("buffer", c_void_p),
        ("all_rows", c_int64),
        ("blocks", c_int64),
        ("codes", c_void_p),
        ("scales", c_void_p),
        ("sums", c_void_p),
        ("seen", c_void_p),
    )


class Weight(ctypes.Structure):
    """One weight with its low-rank branch and bias."""

    _fields_ = (
        ("outputs", c_int64),
        ("columns", c_int64),
        ("row_bytes", c_int64),
        ("qweight", c_void_p),
        ("format", c_int32),
        ("group", c_int32),
        ("scales", c_void_p),
        ("groups", c_int64),
        ("outer", c_void_p),
        ("zeros", c_void_p),
        ("down", c_void_p),
        ("up", c_void_p),
        ("bias", c_void_p),
        ("rank", c_int64),
        ("outer_blocks", c_int64),
        ("scales_type", c_int32),
        ("outer_type", c_int32),
        ("zeros_type", c_int32),
        ("down_type", c_int32),
        ("up_type", c_int32),
        ("bias_type", c_int32),
    )


class Shape(ctypes.Structure):
    """What the operands of an operation between products have in common."""

    _fields_ = (
        ("batch", c_int64),
        ("rows", c_int64),
        ("heads", c_int64),
        ("features", c_int64),
        ("type", c_int32),
        ("threads", c_int32),
    )


class View(ctypes.Structure):
    """Where one operand lies."""

    _fields_ = (("data", c_void_p), ("batch", c_int64), ("row", c_int64), ("head", c_int64))


_SIGNATURES: dict[str, tuple[object, list[object]]] = {
    "svdq_input_bytes": (c_int64, [c_void_p]),
    "svdq_quantize": (None, [c_void_p] * 2),
    "svdq_quantize_bytes": (c_int64, [c_void_p]),
    "svdq_linear": (None, [c_void_p, c_void_p, c_int32, c_int32, c_void_p, c_int64, c_int32, c_void_p]),
    "svdq_linear_bytes": (c_int64, [c_void_p] * 2),
    "svdq_weight_only": (None, [c_void_p, c_void_p, c_void_p, c_int64, c_int32, c_void_p]),
    "svdq_weight_only_bytes": (c_int64, [c_void_p] * 2),
    "svdq_norm_modulate": (None, [*[c_void_p] * 4, c_int64, c_float, c_void_p]),
    "svdq_norm_rotate": (None, [*[c_void_p] * 3, c_float, *[c_void_p] * 3]),
    "svdq_gate_add": (None, [*[c_void_p] * 3, c_int64, *[c_void_p] * 2]),
}


def declare(cdll: ctypes.CDLL) -> ctypes.CDLL:
    """Result and argument types of the operations."""
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(cdll, name)
        function.restype, function.argtypes = result, arguments
    return cdll
