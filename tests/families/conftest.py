"""Fixtures of the tests of fused blocks on a GPU: stand-ins for its kernels, and a record of what was launched.

The kernels themselves run in the interpreter where a test takes `interpreted`; `replaced` puts plain torch in their
place, because what is tested there is who is asked to compute what.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from svdquant.kernels import fused as definitions
from svdquant.kernels import gpu, reference
from svdquant.kernels.gpu import linear


@pytest.fixture
def launched(monkeypatch) -> list[tuple[str, Any]]:
    """(kernel, what it was given) of every launch."""
    seen: list[tuple[str, Any]] = []
    quantize, multiply = linear.launch_quantize, linear.launch_multiply

    def count_quantize(x, t, activations, before, second, low_scales):
        seen.append(("quantize", (before.kind, second is not None)))
        return quantize(x, t, activations, before, second, low_scales)

    def count_multiply(p, layers, out, epilogue):
        seen.append(("multiply", (len(layers), epilogue.gelu, epilogue.norm is not None)))
        return multiply(p, layers, out, epilogue)

    monkeypatch.setattr(linear, "launch_quantize", count_quantize)
    monkeypatch.setattr(linear, "launch_multiply", count_multiply)
    return seen


@pytest.fixture
def replaced(monkeypatch, launched) -> None:
    """Kernels replaced by torch: codes are the input itself, which the reference then multiplies."""

    def quantize(x, t, activations, before, second, low_scales):
        launched.append(("quantize", (before.kind, second is not None)))
        x = _before(x, before)
        whole = x if second is None else torch.cat([x, second], -1)
        return whole.flatten(0, 1), whole.new_ones(1), None

    def multiply(p, layers, out, epilogue):
        launched.append(("multiply", (len(layers), epilogue.gelu, epilogue.norm is not None)))
        norm = epilogue.norm
        parts = []
        for i, t in enumerate(layers):
            y = reference.svdquant_linear(p.codes, t, p.activations, torch.float32).unflatten(0, (p.batch, -1)).float()
            if norm is not None and i < len(norm.weights):
                heads = y.unflatten(-1, (-1, norm.head))
                rotary = None if norm.cosine is None else (norm.cosine, norm.sine)
                y = definitions.norm_rotate(heads, norm.weights[i], norm.eps, rotary).flatten(2)
            parts.append(F.gelu(y, approximate="tanh") if epilogue.gelu else y)
        out.copy_(torch.cat(parts, -1))

    monkeypatch.setattr(linear, "launch_quantize", quantize)
    monkeypatch.setattr(linear, "launch_multiply", multiply)
    monkeypatch.setattr(gpu, "supports_weight_only", lambda *args: False)
    monkeypatch.setattr(definitions, "_kernels", lambda *args: None)


def _before(x: Tensor, before: gpu.Before) -> Tensor:
    """What comes before quantizing, as `gpu.Before` defines it."""
    if before.kind == "layer_norm":
        assert before.scale is not None and before.shift is not None
        y = F.layer_norm(x.float(), x.shape[-1:], eps=before.eps)
        return (y * (1 + before.scale.float())[:, None] + before.shift.float()[:, None]).to(x.dtype)
    if before.kind == "swiglu":
        a, b = x.float().chunk(2, -1)
        return (a * F.silu(b)).to(x.dtype)
    assert before.kind == "none"
    return x
