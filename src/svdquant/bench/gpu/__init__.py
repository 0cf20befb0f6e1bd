"""The suite of a GPU: correctness of every kernel on the device, then layers, a whole transformer, costs, repeats."""

from .settings import SECTIONS, GPUSettings, choose_sections
from .suite import run_gpu

__all__ = ["SECTIONS", "GPUSettings", "choose_sections", "run_gpu"]
