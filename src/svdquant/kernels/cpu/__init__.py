"""Products on a CPU: C kernels in `csrc/`, compiled by `build`, loaded by `library`."""

from .elementwise import gate_add, norm_modulate, norm_rotate
from .inputs import SCRATCH_LIMIT
from .library import Status, load, status
from .linear import quantize, supports, supports_weight_only, svdquant_linear, w4a16_linear

__all__ = [
    "SCRATCH_LIMIT",
    "Status",
    "available",
    "gate_add",
    "load",
    "norm_modulate",
    "norm_rotate",
    "quantize",
    "status",
    "supports",
    "supports_weight_only",
    "svdquant_linear",
    "w4a16_linear",
]


def available() -> bool:
    """Whether this machine runs the compiled products. Raises `SVDQuantError` for a nonsensical SVDQUANT_CPU_ISA."""
    return load() is not None
