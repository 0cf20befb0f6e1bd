"""What a product has to give, in float64 on the device, and what codes mean."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import reference
from ...kernels.gpu.types import Before, Epilogue, HeadNorm, Quantized
from ...numerics import SVDQuantTensors, nvfp4, padded_columns
from ...numerics.formats import grouped


def expected_product(
    x: Tensor, layers: Sequence[SVDQuantTensors], activations: str, epilogue: Epilogue | None = None
) -> Tensor:
    """float64 [L, ΣN] of x [L, K]: quantized as the reference does it, multiplied exactly."""
    first = layers[0]
    columns = padded_columns(first.in_features, first.spec)
    smooth = None if first.smooth_factor is None else first.smooth_factor.float()
    h = reference.prepare_activation(x.float(), first.spec, smooth, columns, activations, x.dtype).double()
    outputs = []
    for t in layers:
        y = h @ t.residual().double().T
        if t.proj_down is not None and t.proj_up is not None:
            low = (x.double() @ t.proj_down.double().T).to(x.dtype)
            y += low.double() @ t.proj_up.double().T
        if t.bias is not None:
            y += t.bias.double()
        outputs.append(y)
    if epilogue is not None and epilogue.norm is not None:
        for number, weight in enumerate(epilogue.norm.weights):
            outputs[number] = normed(outputs[number], weight, epilogue.norm)
    y = torch.cat(outputs, 1)
    return F.gelu(y, approximate="tanh") if epilogue is not None and epilogue.gelu else y


def normed(y: Tensor, weight: Tensor | None, norm: HeadNorm) -> Tensor:
    heads = y.unflatten(1, (-1, norm.head))
    heads = heads * torch.rsqrt(heads.square().mean(-1, keepdim=True) + norm.eps)
    if weight is not None:
        heads = heads * weight.double()
    if norm.cosine is not None and norm.sine is not None:
        even, odd = heads[..., 0::2], heads[..., 1::2]
        turned = torch.stack([-odd, even], -1).flatten(-2)
        heads = heads * norm.cosine.double()[:, None] + turned * norm.sine.double()[:, None]
    return heads.flatten(1)


def read_before(x: Tensor, before: Before) -> Tensor:
    """What `before` makes of x [1, L, ·], as a tensor of x's type."""
    y = x.double()
    if before.kind == "layer_norm":
        assert before.scale is not None and before.shift is not None
        y = F.layer_norm(y, y.shape[-1:], eps=before.eps)
        y = y * (1 + before.scale.double()[:, None]) + before.shift.double()[:, None]
    elif before.kind == "gelu":
        y = F.gelu(y, approximate="tanh")
    elif before.kind != "none":
        a, b = y.chunk(2, -1)
        y = a * (F.gelu(b) if before.kind == "geglu" else F.silu(b))
    return y.to(x.dtype)


def expected_input(x: Tensor, t: SVDQuantTensors, activations: str) -> Tensor:
    """float32 [L, Kp]: what the codes of x [L, K] have to mean."""
    columns = padded_columns(t.in_features, t.spec)
    smooth = None if t.smooth_factor is None else t.smooth_factor.float()
    if activations in ("int8", "fp8"):
        return reference.quantize_activation(
            reference.smoothed(x.float(), t.spec, smooth, columns), t.spec, activations, x.dtype
        )
    return reference.prepare_activation(x.float(), t.spec, smooth, columns, activations, x.dtype)


def meaning(q: Quantized, t: SVDQuantTensors) -> Tensor:
    """float32 [L, Kp]: what codes and scales mean."""
    reading, columns = q.reading, padded_columns(t.in_features, t.spec)
    if reading.precision == "nvfp4":
        values = nvfp4.unpack(q.codes, torch.float32)
    elif reading.packed:
        signed = (q.codes[..., None] >> torch.tensor([0, 4], device=q.codes.device, dtype=torch.uint8)) & 15
        values = _signed(signed.flatten(-2).float(), t)
    else:
        values = q.codes.float()
    if reading.split:
        values = values.unflatten(-1, (-1, 2, 32)).transpose(-1, -2).flatten(-3)
    if reading.precision in ("int8", "fp8"):
        return (values * q.scales[:, None])[:, :columns]
    scales = q.scales.float()
    return (grouped(values, scales.shape[1]) * scales[..., None]).flatten(-2)[:, :columns]


def _signed(nibbles: Tensor, t: SVDQuantTensors) -> Tensor:
    """Nibbles as signed numbers, but for the unsigned columns."""
    signed = torch.ones(nibbles.shape[1], dtype=torch.bool, device=nibbles.device)
    for start, stop in t.spec.unsigned:
        signed[start:stop] = False
    return torch.where(signed & (nibbles > 7), nibbles - 16, nibbles)


def sample_input(m: int, k: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[M, K]: rows of different size, and a few large channels."""
    g = torch.Generator(device).manual_seed(m * 31 + k)
    x = torch.randn(m, k, generator=g, device=device)
    x *= torch.rand(m, 1, generator=g, device=device) * 4 + 0.1
    x[:, :: max(k // 5, 1)] *= 6
    return x.to(dtype)
