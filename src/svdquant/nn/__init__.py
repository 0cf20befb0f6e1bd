"""Layers of a quantized model."""

from .linear import (
    FIXED_DTYPE,
    QUANTIZED,
    SVDQuantConv2d,
    SVDQuantLinear,
    W4A16Linear,
    empty_layer,
    is_pointwise_conv,
    make_layer,
    quantized_layers,
    replace_module,
    set_activations,
)

__all__ = [
    "FIXED_DTYPE",
    "QUANTIZED",
    "SVDQuantConv2d",
    "SVDQuantLinear",
    "W4A16Linear",
    "empty_layer",
    "is_pointwise_conv",
    "make_layer",
    "quantized_layers",
    "replace_module",
    "set_activations",
]
