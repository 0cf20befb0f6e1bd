"""What a GPU is, as far as kernels care, and whether Triton can compile for it."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True)
class Arch:
    """vendor: "nvidia", "amd", "intel", or "interpreter" (Triton's, on CPU tensors); number: 90 for sm_90, else 0.

    units: multiprocessors; shared: bytes of shared memory that one program may have.
    """

    vendor: str
    number: int = 0
    units: int = 108
    shared: int = 100 << 10

    @property
    def wgmma(self) -> bool:
        return self.vendor == "nvidia" and self.number == 90

    @property
    def int4_cores(self) -> bool:
        """Native INT4 `mma`: Ampere and Ada. Later chips compile it into slow emulation."""
        return self.vendor == "nvidia" and self.number in (80, 86, 87, 89)

    @property
    def nvfp4_cores(self) -> bool:
        return self.vendor == "nvidia" and self.number in (100, 103, 120, 121)

    @property
    def fp8_cores(self) -> bool:
        return self.vendor == "nvidia" and self.number >= 89


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels, on tensors of any device. Decided when they are imported."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


_INSTALLED = importlib.util.find_spec("triton") is not None


def missing() -> str | None:
    """Why no kernel can be compiled at all; None where Triton is there."""
    if _INSTALLED:
        return None
    return "triton is not installed; it comes with torch for CUDA, ROCm and XPU, elsewhere: pip install triton"


def arch_of(device: torch.device) -> Arch | None:
    """The chip behind a device; None where no Triton kernel runs (CPU, Apple GPUs, NVIDIA before sm_80)."""
    if missing() is not None:
        return None
    if interpreting():
        return Arch("interpreter") if device.type in ("cpu", "cuda") else None
    if device.type == "cuda":
        return _cuda_arch(torch.cuda.current_device() if device.index is None else device.index)
    if device.type == "xpu":
        return Arch("intel")
    return None


@lru_cache
def _cuda_arch(index: int) -> Arch | None:
    p = torch.cuda.get_device_properties(index)
    shared = getattr(p, "shared_memory_per_block_optin", 64 << 10)
    if torch.version.hip is not None:
        return Arch("amd", 0, p.multi_processor_count, 64 << 10)
    if p.major < 8:
        return None
    return Arch("nvidia", p.major * 10 + p.minor, p.multi_processor_count, shared)
