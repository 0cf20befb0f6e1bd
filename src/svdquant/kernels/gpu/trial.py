"""A product proves itself before it is used: once per process, chip and type, on a small layer, against the reference.

Nobody has run these kernels on every chip that they compile for. One that fails to compile, or is wrong, is passed over
with a warning instead of drawing noise.
"""

from __future__ import annotations

import threading
import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...config import LayerSpec
from ...numerics import FORMATS, SVDQuantTensors, quantize_weight, relative_error
from .. import reference
from .arch import arch_of, interpreting
from .types import Quantized

if TYPE_CHECKING:
    from .types import Product

_ROWS, _OUTPUTS, _INPUTS, _RANK = 48, 256, 256, 32
# Beside the reference, which rounds to 16 bits once more: 8-bit weights made of 4-bit ones differ by up to 3 %.
_WORST = 0.05
_LOCK = threading.Lock()


def works(product: Product, activations: str, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the product runs on the device and gives the right numbers. Warns once where it does not."""
    # The interpreter is slow, and there for tests; while a graph is being captured nothing may wait for the device.
    if interpreting() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return True
    with _LOCK:
        key = product.name, activations, dtype, device
        if key not in _KNOWN:
            _KNOWN[key] = _examine(product, activations, dtype, device)
        return _KNOWN[key]


_KNOWN: dict[tuple[str, str, torch.dtype, torch.device], bool] = {}


def _examine(product: Product, activations: str, dtype: torch.dtype, device: torch.device) -> bool:
    reasons: list[str] = []
    # A thread of its own: no mode, compiler or gradient of the caller's follows it there.
    thread = threading.Thread(target=lambda: reasons.append(_try(product, activations, dtype, device)))
    thread.start()
    thread.join()
    if reasons == [""]:
        return True
    why = reasons[0] if reasons else "it stopped"
    what = f"the product {product.name!r} with {activations} activations"
    warnings.warn(f"svdquant: {what} is not used on {device}: {why}", stacklevel=3)
    return False


def _try(product: Product, activations: str, dtype: torch.dtype, device: torch.device) -> str:
    """What is wrong, or nothing."""
    try:
        with torch.no_grad():
            error = trial_error(product, activations, dtype, device)
    except Exception as problem:
        return f"{type(problem).__name__}: {str(problem).strip().splitlines()[0] if str(problem).strip() else ''}"
    return "" if error <= _WORST else f"its result is {error:.3f} off"


def trial_error(product: Product, activations: str, dtype: torch.dtype, device: torch.device) -> float:
    """Relative error of the product on a small random layer, beside the float reference."""
    from .quantize import quantize

    t = _layer(activations, dtype, device)
    arch = arch_of(device)
    assert arch is not None
    if product.why_not(t, activations, dtype, arch) is not None:
        t = _layer(activations, dtype, device, "nvfp4")
    g = torch.Generator().manual_seed(1)
    x = torch.randn(1, _ROWS, _INPUTS, generator=g).to(device, dtype)
    q: Quantized = quantize(x, t, product.reading(activations))
    out = torch.full((1, _ROWS, _OUTPUTS), float("nan"), dtype=dtype, device=device)
    product.multiply(q, (t,), out)
    expected = reference.svdquant_linear(x[0], t, activations, torch.float32)
    error = relative_error(out[0].float(), expected.float())
    return error if error == error else float("inf")


def _layer(activations: str, dtype: torch.dtype, device: torch.device, weights: str = "int4") -> SVDQuantTensors:
    if activations == "nvfp4":
        weights = "nvfp4"
    spec = LayerSpec(weights=weights, group_size=16 if weights == "nvfp4" else 64, rank=_RANK)
    g = torch.Generator().manual_seed(0)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=g) * scale).to(dtype)

    values, wscales, wcscales = quantize_weight(random(_OUTPUTS, _INPUTS).float(), weights, spec.group_size, dtype)
    tensors = SVDQuantTensors(
        spec,
        _INPUTS,
        FORMATS[weights].pack(values),
        wscales,
        wcscales,
        random(_INPUTS).abs() + 0.5,
        random(_RANK, _INPUTS, scale=0.05),
        random(_OUTPUTS, _RANK),
        random(_OUTPUTS),
    )
    return tensors.to(device)
