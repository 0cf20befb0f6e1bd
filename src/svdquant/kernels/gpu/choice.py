"""Which product multiplies what on which GPU: the one table, and the override."""

from __future__ import annotations

import os
from functools import lru_cache

import torch

from ...config import LayerSpec
from ...numerics import SVDQuantTensors
from ..eager import assume_constant
from .arch import Arch, arch_of, interpreting
from .trial import capturing, works
from .types import Product

# Product names that SVDQUANT_BACKEND may hold.
PRODUCTS = ("triton", "scaled_mm", "registers", "grouped", "int4_mma", "dot_scaled")

# Precision of the activations → products in the order in which they are tried; the first that takes a layer has it.
ORDER: dict[str, tuple[str, ...]] = {
    "int8": ("triton", "grouped"),
    "fp8": ("triton", "scaled_mm"),
    "int4": ("int4_mma", "grouped"),
    "nvfp4": ("dot_scaled",),
}


@lru_cache(maxsize=1)
def products() -> dict[str, Product]:
    """Every product by its name. Imports Triton."""
    from .eight_bit import EightBit
    from .grouped import Grouped
    from .int4_mma import Int4MMA
    from .nvfp4 import NVFP4
    from .registers import Registers
    from .scaled_mm import ScaledMM

    found = (EightBit(), ScaledMM(), Registers(), Grouped(), Int4MMA(), NVFP4())
    return {product.name: product for product in found}


def forced() -> str | None:
    """The product that SVDQUANT_BACKEND names, if it names one."""
    name = os.environ.get("SVDQUANT_BACKEND")
    return name if name in PRODUCTS else None


@assume_constant
def active(device: torch.device) -> bool:
    """Whether these kernels multiply on a device. CPU tensors go through the interpreter only where asked for."""
    arch = arch_of(device)
    return arch is not None and (forced() is not None or not interpreting())


# Signature of a layer → (spec, in_features, (name, type, shape) of its tensors): what a product looks at.
_LAYERS: dict[str, tuple[LayerSpec, int, tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]]] = {}


def signature(t: SVDQuantTensors) -> str:
    """A layer's spec, shapes and types in a string, by which `takes` knows it."""
    # Shapes of a layer stay as they are but for its rank (adapters), types but for those that follow a cast.
    up, bias = t.proj_up, t.bias
    now = (t.spec, None if up is None else (up.shape, up.dtype), None if bias is None else bias.dtype)
    known = t.memory.get("signature")
    if known is not None and known[0] == now:
        text: str = known[1]
        return text
    parts = tuple((name, value.dtype, tuple(value.shape)) for name, value in t.named().items())
    text = repr((t.spec, t.in_features, parts))
    _LAYERS.setdefault(text, (t.spec, t.in_features, parts))
    t.memory["signature"] = now, text
    return text


def choose(t: SVDQuantTensors, activations: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """The name of the product for a layer; None where none takes it. Looks at shapes and types only."""
    return _chosen(signature(t), activations, dtype, device)


@assume_constant
def takes(layer: str, activations: str, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether some product takes the layer of this signature. A compiler keeps the answer."""
    return _chosen(layer, activations, dtype, device) is not None


def _chosen(layer: str, activations: str, dtype: torch.dtype, device: torch.device) -> str | None:
    arch = arch_of(device)
    if arch is None or dtype not in (torch.bfloat16, torch.float16):
        return None
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    # What is assumed while a graph is captured is not remembered.
    first = _first.__wrapped__ if capturing(device) else _first
    return first(layer, activations, dtype, device, arch, forced())


@lru_cache(maxsize=4096)
def _first(
    layer: str, activations: str, dtype: torch.dtype, device: torch.device, arch: Arch, first: str | None
) -> str | None:
    spec, in_features, parts = _LAYERS[layer]
    record = SVDQuantTensors(spec, in_features, **{n: torch.empty(s, dtype=d, device="meta") for n, d, s in parts})
    for name in ((first,) if first else ()) + ORDER.get(activations, ()):
        product = products()[name]
        if product.why_not(record, activations, dtype, arch) is None and works(product, activations, dtype, device):
            return name
    return None
