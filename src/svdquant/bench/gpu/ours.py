"""Our products as the suite calls them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels import gpu
from ...kernels.gpu.arch import Arch, arch_of
from ...kernels.gpu.types import Before, Epilogue, Product, Quantized
from ...numerics import SVDQuantTensors

# Stored weights and activations, in the order in which they are measured. The first is Hopper's default.
PRECISIONS = (
    ("int4", "int8"),
    ("int4", "fp8"),
    ("int4", "int4"),
    ("nvfp4", "nvfp4"),
    ("int8", "int8"),
    ("int8", "fp8"),
    ("nvfp4", "int8"),
    ("nvfp4", "fp8"),
)
# Those that give the right numbers, slowly, on chips without the instruction.
_EMULATED = {"int4_mma": Arch("nvidia", 80)}
# The rate that bounds a product, by the precision of its activations.
RATES = {"int8": "int8", "fp8": "fp8", "none": "bf16"}


@dataclass(frozen=True)
class Way:
    """A product with the numbers that it multiplies."""

    weights: str
    activations: str
    product: Product
    emulated: bool = False

    @property
    def key(self) -> tuple[str, str, str]:
        return self.weights, self.activations, self.product.name

    def __str__(self) -> str:
        bits = {"int4": "W4", "nvfp4": "W4 (nvfp4)", "int8": "W8"}[self.weights]
        return f"ours {bits} {self.activations}, {self.product.name}" + (" (emulated)" if self.emulated else "")

    def quantize(self, x: Tensor, t: SVDQuantTensors) -> Quantized:
        return quantize(x, t, self.product, self.activations)

    def layer(self, x: Tensor, t: SVDQuantTensors) -> Tensor:
        """The whole linear of x [M, K]."""
        out = x.new_empty(1, x.shape[0], t.out_features)
        self.product.multiply(self.quantize(x, t), (t,), out)
        return out[0]


def quantize(
    x: Tensor, t: SVDQuantTensors, product: Product, activations: str, before: Before | None = None
) -> Quantized:
    """x [M, K], or [1, M, ·] where something comes before."""
    from ...kernels.gpu.quantize import quantize as launch

    return launch(x if x.dim() == 3 else x[None], t, product.reading(activations), before or Before())


def multiply(
    product: Product,
    q: Quantized,
    layers: Sequence[SVDQuantTensors],
    out: Tensor,
    epilogue: Epilogue | None = None,
) -> Tensor:
    product.multiply(q, layers, out, epilogue or Epilogue())
    return out


def ways(t: SVDQuantTensors, activations: str, dtype: torch.dtype, device: torch.device) -> list[tuple[Way, str]]:
    """Every product with why it does not take the layer, or ""; those that only emulate the chip's instruction last."""
    arch = arch_of(device)
    if arch is None:
        return []
    found, emulated = [], []
    for product in gpu.products().values():
        why = product.why_not(t, activations, dtype, arch)
        instead = _EMULATED.get(product.name)
        slow = instead is not None and not arch.int4_cores
        if slow and arch.vendor == "nvidia" and instead and product.why_not(t, activations, dtype, instead) is None:
            emulated.append((Way(t.spec.weights, activations, product, True), ""))
        else:
            found.append((Way(t.spec.weights, activations, product), why or ""))
    return found + emulated
