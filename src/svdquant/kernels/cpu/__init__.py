"""Products on a CPU: C kernels in `csrc/`, compiled by `build`, loaded by `library`."""

from .library import Status, load, status
from .linear import supports, supports_weight_only, svdquant_linear, w4a16_linear

__all__ = [
    "Status",
    "available",
    "load",
    "status",
    "supports",
    "supports_weight_only",
    "svdquant_linear",
    "w4a16_linear",
]


def available() -> bool:
    """Whether this machine runs the compiled products. Raises `SVDQuantError` for a nonsensical SVDQUANT_CPU_ISA."""
    return load() is not None
