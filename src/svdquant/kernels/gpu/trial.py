"""A kernel proves itself before it is used: once per process, chip and type, on a small layer, against the reference.

Nobody has run these kernels on every chip that they compile for. One that fails to compile, or is wrong, is passed over
with a warning instead of drawing noise.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ...config import LayerSpec
from ...numerics import FORMATS, SVDQuantTensors, quantize_weight, relative_error
from .. import reference
from .arch import arch_of, interpreting
from .types import Quantized

if TYPE_CHECKING:
    from .types import Product

_OUTPUTS, _INPUTS, _RANK = 256, 256, 32
# Few rows and many are multiplied by tiles of their own.
_ROWS = (48, 144)
# Beside the reference, which rounds to 16 bits once more: 8-bit weights made of 4-bit ones differ by up to 3 %.
_WORST = 0.05
_LOCK = threading.Lock()


def works(product: Product, activations: str, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the product runs on the device and gives the right numbers. Warns once where it does not."""
    what = f"the product {product.name!r} with {activations} activations"
    return _known(what, dtype, device, lambda: trial_error(product, activations, dtype, device))


def others_work(dtype: torch.dtype, device: torch.device) -> bool:
    """`works` of the kernels between products."""
    return _known("the kernels between products", dtype, device, lambda: elementwise_error(dtype, device))


def weight_only_works(dtype: torch.dtype, device: torch.device) -> bool:
    """`works` of the product of 16-bit inputs."""
    return _known("the W4A16 product", dtype, device, lambda: weight_only_error(dtype, device))


def capturing(device: torch.device) -> bool:
    """Whether a graph is being captured: nothing may wait for the device then, and nothing is proven."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


_KNOWN: dict[tuple[str, torch.dtype, torch.device], bool] = {}


def _known(what: str, dtype: torch.dtype, device: torch.device, trial: Callable[[], float]) -> bool:
    key = what, dtype, device
    known = _KNOWN.get(key)
    if known is not None:
        return known
    # The interpreter is slow, and there for tests.
    if interpreting() or capturing(device):
        return True
    with _LOCK:
        if key not in _KNOWN:
            _KNOWN[key] = _examine(what, device, trial)
        return _KNOWN[key]


def _examine(what: str, device: torch.device, trial: Callable[[], float]) -> bool:
    reasons: list[str] = []
    # A thread of its own: no mode, compiler or gradient of the caller's follows it there.
    thread = threading.Thread(target=lambda: reasons.append(_try(trial)))
    thread.start()
    thread.join()
    if reasons == [""]:
        return True
    why = reasons[0] if reasons else "it stopped"
    warnings.warn(f"svdquant: {what} is not used on {device}: {why}", stacklevel=4)
    return False


def _try(trial: Callable[[], float]) -> str:
    """What is wrong, or nothing."""
    try:
        with torch.no_grad():
            error = trial()
    except Exception as problem:
        return f"{type(problem).__name__}: {str(problem).strip().splitlines()[0] if str(problem).strip() else ''}"
    return "" if error <= _WORST else f"its result is {error:.3f} off"


def trial_error(product: Product, activations: str, dtype: torch.dtype, device: torch.device) -> float:
    """Relative error of the product on a small random layer, beside the float reference; the worst of `_ROWS`."""
    from .quantize import quantize

    t = _layer(activations, dtype, device)
    arch = arch_of(device)
    assert arch is not None
    if product.why_not(t, activations, dtype, arch) is not None:
        t = _layer(activations, dtype, device, "nvfp4")
    errors = []
    for rows in _ROWS:
        x = _random(rows, _INPUTS).to(device, dtype)
        q: Quantized = quantize(x[None], t, product.reading(activations))
        out = torch.full((1, rows, _OUTPUTS), float("nan"), dtype=dtype, device=device)
        product.multiply(q, (t,), out)
        errors.append(_error(out[0], reference.svdquant_linear(x, t, activations, torch.float32)))
    return max(errors)


def elementwise_error(dtype: torch.dtype, device: torch.device) -> float:
    """The worst relative error of the kernels between products."""
    from .elementwise import gate_add, norm_modulate, norm_rotate

    x, y = (_random(2, 8, _INPUTS, seed=seed).to(device, dtype) for seed in (0, 1))
    factor, offset = (_random(2, _INPUTS, seed=seed).to(device) for seed in (2, 3))
    normed = F.layer_norm(x.float(), (_INPUTS,), eps=1e-6) * factor[:, None] + offset[:, None]
    errors = [_error(norm_modulate(x, factor, offset, 1e-6), normed)]
    heads, angle = x.unflatten(-1, (-1, 64)), _random(8, 64).to(device)
    turned = torch.empty_like(heads)
    norm_rotate(heads, None, 1e-6, angle.cos(), angle.sin(), turned)
    z = F.rms_norm(heads.float(), (64,), eps=1e-6)
    swapped = torch.stack((-z[..., 1::2], z[..., ::2]), -1).flatten(-2)
    errors.append(_error(turned, z * angle.cos()[:, None] + swapped * angle.sin()[:, None]))
    gated = torch.empty_like(x)
    gate_add(x, factor, y, gated)
    return max(*errors, _error(gated, x.float() + factor[:, None] * y.float()))


def weight_only_error(dtype: torch.dtype, device: torch.device) -> float:
    """Relative error of `w4a16_linear`, beside the float reference."""
    from .weight_only import w4a16_linear

    t = _layer("none", dtype, device)
    errors = []
    for rows in (1, *_ROWS):
        x = _random(rows, _INPUTS).to(device, dtype)
        y = w4a16_linear(x, t.qweight, t.wscales, t.bias, "int4")
        expected = reference.w4a16_linear(x, t.qweight, t.wscales, "int4", t.bias, torch.float32, None)
        errors.append(_error(y, expected))
    return max(errors)


def _error(y: Tensor, expected: Tensor) -> float:
    error = relative_error(y.float(), expected.float())
    return error if error == error else float("inf")


def _random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def _layer(activations: str, dtype: torch.dtype, device: torch.device, weights: str = "int4") -> SVDQuantTensors:
    if activations == "nvfp4":
        weights = "nvfp4"
    spec = LayerSpec(weights=weights, group_size=16 if weights == "nvfp4" else 64, rank=_RANK)
    g = torch.Generator().manual_seed(0)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=g, dtype=torch.float32) * scale).to(dtype)

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
