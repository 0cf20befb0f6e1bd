"""Products on GPUs by kernels that Triton compiles at first use. Importing this imports no Triton."""

from . import operations as operations  # registers them with torch
from .arch import Arch, arch_of, interpreting, missing
from .choice import ORDER, PRODUCTS, active, choose, forced, products, signature, takes
from .linear import Prepared, prepare, project, supports, supports_weight_only, svdquant_linear, w4a16_linear
from .sharing import reading_of
from .trial import others_work
from .types import Before, Epilogue, HeadNorm, Product, Quantized, Reading, Specialization

__all__ = [
    "ORDER",
    "PRODUCTS",
    "Arch",
    "Before",
    "Epilogue",
    "HeadNorm",
    "Prepared",
    "Product",
    "Quantized",
    "Reading",
    "Specialization",
    "active",
    "arch_of",
    "choose",
    "forced",
    "interpreting",
    "missing",
    "others_work",
    "prepare",
    "products",
    "project",
    "reading_of",
    "signature",
    "supports",
    "supports_weight_only",
    "svdquant_linear",
    "takes",
    "w4a16_linear",
]
