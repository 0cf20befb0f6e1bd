"""Quantized linears on a GPU: an input is quantized once and multiplied by all the weights that read it.

Called directly these launch kernels; under a compiler or a mode the same goes through `operations`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...numerics import SVDQuantTensors
from .. import eager
from .arch import arch_of
from .choice import choose, products
from .sharing import shared
from .trial import weight_only_works
from .types import NO_EPILOGUE, Before, Epilogue, Quantized

NOTHING = Before()


@dataclass(frozen=True)
class Prepared:
    """An input on its way through a product: what `prepare` returns and `project` multiplies.

    codes, scales, low: as in `Quantized`, whose other fields follow from the layer and the activations.
    """

    codes: Tensor
    scales: Tensor
    low: Tensor | None
    batch: int
    tokens: int
    activations: str
    dtype: torch.dtype


def supports(t: SVDQuantTensors, activations: str, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether some product takes the layer on this device."""
    return choose(t, activations, dtype, device) is not None


def prepare(
    x: Tensor,
    t: SVDQuantTensors,
    activations: str,
    before: Before = NOTHING,
    second: Tensor | None = None,
    low_scales: Tensor | None = None,
) -> Prepared:
    """x [B, L, K] as the layer's product reads it; `second` continues its columns. `activations` is resolved.

    low_scales: float32 [R] or [B, R], strengths of the branch's directions.
    """
    if eager.is_unwatched(x):
        parts = launch_quantize(x, t, activations, before, second, low_scales)
    else:
        from .operations import quantize_operation

        parts = quantize_operation(x, t, activations, before, second, low_scales)
    return Prepared(*parts, x.shape[0], x.shape[1], activations, x.dtype)


def project(
    p: Prepared, layers: Sequence[SVDQuantTensors], out: Tensor | None = None, epilogue: Epilogue = NO_EPILOGUE
) -> Tensor:
    """Product of a prepared input with one layer, or with several side by side: [B, L, ΣN] in the input's type.

    out: written and returned instead; any strides but the last, which is 1. The layers agree in everything but their
    outputs, and share the branch's down-projection.
    """
    if out is None:
        out = p.codes.new_empty((p.batch, p.tokens, sum(t.out_features for t in layers)), dtype=p.dtype)
    if out.numel() == 0:
        return out
    if eager.is_unwatched(p.codes):
        launch_multiply(p, layers, out, epilogue)
        if not out.is_inference():
            torch.autograd.graph.increment_version(out)
    else:
        from .operations import multiply_operation

        multiply_operation(p, layers, out, epilogue)
    return out


def launch_quantize(
    x: Tensor,
    t: SVDQuantTensors,
    activations: str,
    before: Before,
    second: Tensor | None,
    low_scales: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(codes, scales, low) of `quantize` for the layer's product."""
    from .quantize import quantize

    name = choose(t, activations, x.dtype, x.device)
    assert name is not None
    reading = products()[name].reading(activations)
    after = None if second is None else _rows(second)
    q = quantize(_rows(x), t, reading, before, after, low_scales=low_scales)
    return q.codes, q.scales, q.low


def launch_multiply(p: Prepared, layers: Sequence[SVDQuantTensors], out: Tensor, epilogue: Epilogue) -> None:
    """The product of `prepare`'s choice into `out`."""
    name = choose(layers[0], p.activations, p.dtype, p.codes.device)
    assert name is not None
    reading = products()[name].reading(p.activations)
    multiply(name, Quantized(reading, p.batch, p.tokens, p.codes, p.scales, p.low), layers, out, epilogue)


def multiply(name: str, q: Quantized, layers: Sequence[SVDQuantTensors], out: Tensor, epilogue: Epilogue) -> None:
    """Launches the product; what its epilogue cannot do is done in a pass of its own."""
    product = products()[name]
    if product.fuses(epilogue, layers):
        product.multiply(q, layers, out, epilogue)
        return
    fused = replace(epilogue, norm=None)
    if len(layers) > 1 and not product.fuses(fused, layers):
        start = 0
        for t in layers:
            product.multiply(q, (t,), out[..., start : start + t.out_features], fused)
            start += t.out_features
    else:
        product.multiply(q, layers, out, fused)
    norm = epilogue.norm
    if norm is not None:
        from ..fused import norm_rotate

        rotary = None if norm.cosine is None or norm.sine is None else (norm.cosine, norm.sine)
        start = 0
        for t, weight in zip(layers, norm.weights, strict=False):
            heads = out[..., start : start + t.out_features].unflatten(-1, (-1, norm.head))
            norm_rotate(heads, weight, norm.eps, rotary, out=heads)
            start += t.out_features


def svdquant_linear(
    x: Tensor,
    t: SVDQuantTensors,
    activations: str,
    gelu: bool = False,
    out: Tensor | None = None,
    low_scales: Tensor | None = None,
    share: bool = False,
) -> Tensor:
    """y = Q(x/s)·Ŵᵀ + (x·Dᵀ)·Uᵀ + b for x [..., K], or its GELU (tanh); [..., N] in x's type, as `kernels.dispatch`.

    share: take the codes of the layer before, where it read this very tensor alike (`sharing`); no low_scales then.
    """
    shape = (*x.shape[:-1], t.out_features)
    if x.numel() == 0 or (out is not None and out.numel() == 0):
        return x.new_zeros(shape) if out is None else out
    rows = _three(x)
    target = None if out is None else _view_three(out)

    def make() -> Prepared:
        return prepare(rows, t, activations, low_scales=low_scales)

    y = project(shared(x, t, activations, make) if share else make(), (t,), target, Epilogue(gelu=gelu))
    if out is None:
        return y.view(shape)
    return out if target is not None else out.copy_(y.view(shape))


def _three(x: Tensor) -> Tensor:
    """[..., K] as [B, L, K] with features side by side, without a copy where its strides allow it."""
    if x.dim() == 3:
        return _rows(x)
    if x.dim() < 3:
        return _rows(x.reshape(1, -1, x.shape[-1]))
    return _rows(x.reshape(x.shape[0], -1, x.shape[-1]))


def _view_three(out: Tensor) -> Tensor | None:
    """`out` [..., N] as [B, L, N] in the same memory, or None."""
    if out.stride(-1) != 1:
        return None
    try:
        return out.view(1, -1, out.shape[-1]) if out.dim() < 3 else out.view(out.shape[0], -1, out.shape[-1])
    except RuntimeError:
        return None


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def supports_weight_only(qweight: Tensor, wscales: Tensor, dtype: torch.dtype, weights: str) -> bool:
    """Whether `w4a16_linear` takes these tensors, on the device where they are."""
    arch = arch_of(qweight.device)
    if arch is None or dtype not in (torch.bfloat16, torch.float16):
        return False
    from .weight_only import why_not

    return why_not(qweight, wscales, dtype, weights, arch) is None and weight_only_works(dtype, qweight.device)


def w4a16_linear(
    x: Tensor, qweight: Tensor, wscales: Tensor, bias: Tensor | None, weights: str, wzeros: Tensor | None
) -> Tensor:
    """y = x·Ŵᵀ + b for x [..., K]; [..., N] in x's type. See `kernels.dispatch`."""
    shape = (*x.shape[:-1], qweight.shape[0])
    if x.numel() == 0:
        return x.new_zeros(shape)
    from .weight_only import w4a16_linear as product

    return product(_rows(x.reshape(-1, x.shape[-1])), qweight, wscales, bias, weights, wzeros).view(shape)
