"""Number formats: how values are rounded, packed and scaled. Torch only; every device."""

from .formats import WeightFormat, effective_scales, grouped, pad_columns, relative_error
from .int4 import GELU_SHIFT
from .tensors import FORMATS, SVDQuantTensors, dequantize_weight, groups_of, padded_columns, quantize_weight

__all__ = [
    "FORMATS",
    "GELU_SHIFT",
    "SVDQuantTensors",
    "WeightFormat",
    "dequantize_weight",
    "effective_scales",
    "grouped",
    "groups_of",
    "pad_columns",
    "padded_columns",
    "quantize_weight",
    "relative_error",
]
