"""What passes between the kernels of a GPU: quantized inputs, epilogues, and how each kernel is specialised."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ...numerics import SVDQuantTensors
from .arch import Arch


@dataclass(frozen=True)
class Reading:
    """How a product wants its input's codes.

    precision: "int8" or "fp8" (one scale per token), "int4" (per token and 64 channels), "nvfp4" (per token and 16).
    packed: two 4-bit codes per byte, low nibble first; else one code per byte (int4 codes then lie in int8).
    split: within every 64 columns first the 32 even ones, then the 32 odd ones (what unpacking weights by nibble
        gives without a shuffle); else natural order. Only where not packed.
    """

    precision: str
    packed: bool = False
    split: bool = False


@dataclass(frozen=True)
class Quantized:
    """An input as products read it: M = batch·tokens rows, C = `columns_of(Kp)` columns, zero beyond K.

    codes: int8 [M, C], float8_e4m3fn [M, C] (fp8), or uint8 [M, C/2] where packed.
    scales: float32 [M] (int8, fp8); float32 [M, C/64] (int4), already rounded to the model's type; float8_e4m3fn
        [M, C/16] (nvfp4).
    low: x·Dᵀ [M, R] in the model's type, of the raw x; None without a branch.
    """

    reading: Reading
    batch: int
    tokens: int
    codes: Tensor
    scales: Tensor
    low: Tensor | None


COLUMNS = 128


def columns_of(padded: int) -> int:
    """Columns that codes and expanded weights have for a stored weight of `padded` columns."""
    return -(-padded // COLUMNS) * COLUMNS


@dataclass(frozen=True)
class Before:
    """What happens to x before it is smoothed and quantized; its result is rounded to x's type, as a tensor would be.

    kind: "none"; "layer_norm": layer_norm(x)·(1 + scale) + shift with scale, shift [B, K] (eps; no affine of its own);
    "gelu": tanh; "geglu": the input has 2K columns (a, b), a·gelu(b) (erf); "swiglu": (a, b), a·silu(b).
    """

    kind: str = "none"
    eps: float = 1e-6
    scale: Tensor | None = None
    shift: Tensor | None = None


@dataclass(frozen=True)
class HeadNorm:
    """RMSNorm over each head, then rotary embedding of pairs (2i, 2i+1): what q and k get after their projection.

    weights: [D] or None (no factor) for each of the first layers of a stacked product; the layers after them (v) stay
    as they are. cosine, sine: float32 [L, D], row = token; None without rotation.
    """

    weights: tuple[Tensor | None, ...]
    eps: float
    head: int
    cosine: Tensor | None = None
    sine: Tensor | None = None


@dataclass(frozen=True)
class Epilogue:
    gelu: bool = False
    norm: HeadNorm | None = None


NO_EPILOGUE = Epilogue()


@dataclass(frozen=True)
class Specialization:
    """One compiled form of a kernel, enough to compile it without a GPU.

    signature: argument → Triton's type ("*bf16", "*u8", "i32", "fp32", "constexpr" is implied by `constants`).
    expects: for each sm number it is meant for, machine instructions of which one must occur (prefixes of SASS
    mnemonics, e.g. ("IGMMA",)); an empty tuple asks only that it compiles without spilling registers.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    expects: dict[int, tuple[str, ...]]
    gluon: bool = False
    aligned: tuple[str, ...] = field(default=())  # arguments that are multiples of 16 (pointers always are)
    maxnreg: int | None = None  # registers that a thread may have; None leaves it to the assembler


class Product(Protocol):
    """A way of multiplying a quantized input by stored weights."""

    name: str

    def why_not(self, t: SVDQuantTensors, activations: str, dtype: torch.dtype, arch: Arch) -> str | None:
        """Why this product cannot take the layer; None where it can. Looks at shapes and types only."""

    def reading(self, activations: str) -> Reading:
        """How the input has to be quantized for it."""

    def fuses(self, epilogue: Epilogue, layers: Sequence[SVDQuantTensors]) -> bool:
        """Whether `multiply` takes this epilogue."""

    def multiply(
        self, q: Quantized, layers: Sequence[SVDQuantTensors], out: Tensor, epilogue: Epilogue = NO_EPILOGUE
    ) -> None:
        """y = Q(x/s)·Ŵᵀ + low·Uᵀ + b of one layer, or of several that read q, side by side.

        out: [B, L, ΣN], any strides but the last, which is 1; every element is written. All layers have the same
        in_features and spec but for their outputs; `q.low` is of the branch that they share.
        """

    def specializations(self) -> list[Specialization]:
        """Every compiled form that a default run on some chip uses."""


class LayerByLayer(ABC):
    """Of a product that multiplies one layer per launch, and whose epilogue does all but the norm of heads."""

    def fuses(self, epilogue: Epilogue, layers: Sequence[SVDQuantTensors]) -> bool:
        return epilogue.norm is None

    def multiply(
        self, q: Quantized, layers: Sequence[SVDQuantTensors], out: Tensor, epilogue: Epilogue = NO_EPILOGUE
    ) -> None:
        """q as of `reading`; see `Product.multiply`."""
        start = 0
        for t in layers:
            self.launch(q, t, out[..., start : start + t.out_features], epilogue.gelu)
            start += t.out_features

    @abstractmethod
    def launch(self, q: Quantized, t: SVDQuantTensors, out: Tensor, gelu: bool) -> None:
        """One layer into `out` [B, L, N]."""
