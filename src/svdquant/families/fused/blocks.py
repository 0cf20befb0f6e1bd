"""What the fused blocks of several families share: modulation by a layer, gated residuals, feed-forwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention import FeedForward
from torch import Tensor, nn

from ...kernels import fused
from .inputs import Normalized, computed, project
from .modules import GELU, linear, normalized, untouched


def put_off(norm: Any, cls: type, x: Tensor, temb: Tensor) -> Any:
    """norm(x, emb=temb), its norm put off where nobody would notice. cls: an adaptive norm with a `put_off`."""
    return norm.put_off(x, temb) if untouched(norm, cls) and getattr(norm, "emb", None) is None else norm(x, emb=temb)


def after_attention(
    residual: Tensor, attention: Tensor, modulation: Sequence[Tensor], norm: Any, ff: Any, run: Any = None
) -> Tensor:
    """One stream of a block after its attention: both gated residuals, and the feed-forward between them.

    residual, attention [B, L, K], neither of which is written; modulation: gate, shift, scale and gate of the
    feed-forward, [B or 1, K] each. run: calls ff with its input, whose norm may be put off; None = `feed_forward`.
    """
    gate, shift, scale, ff_gate = modulation
    residual = fused.gate_add(residual, gate, attention)
    y = (run or feed_forward)(ff, normalized(norm, residual, scale, shift))
    return fused.gate_add(residual, ff_gate, y, out=residual)


def feed_forward(ff: Any, x: Tensor | Normalized) -> Tensor:
    """ff(x); on a GPU the first product of a known feed-forward reads x before it is normalized."""
    y = _gelu_feed_forward(ff, x) if isinstance(x, Normalized) else None
    if y is not None:
        return y
    y = ff(computed(x))
    assert isinstance(y, Tensor)
    return y


def _gelu_feed_forward(ff: Any, x: Normalized) -> Tensor | None:
    """ff(x), its first product reading x before it is normalized; None where ff has to be called."""
    if not untouched(ff, FeedForward) or len(ff.net) != 3 or ff.training:
        return None
    first, dropout, last = ff.net
    if not (untouched(first, GELU) and first.approximate == "tanh" and untouched(dropout, nn.Dropout)):
        return None
    hidden = project((first.proj,), x, gelu=True)
    return None if hidden is None else last(hidden)


def swiglu(gate: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
    """silu(gate)·x, rounded where diffusers rounds; over `gate`, which the caller owns, or into `out`."""
    F.silu(gate, inplace=True)
    return gate.mul_(x) if out is None else torch.mul(gate, x, out=out)


def gated_by_products(gate: Any, up: Any, last: Any, x: Tensor | Normalized) -> Tensor | None:
    """last(silu(gate(x))·up(x)) by two products on a GPU; None where the layers have to be called.

    gate, up: layers, or `Rows` of one.
    """
    hidden = project((up, gate), x)
    if hidden is None:
        return None
    y = project((last,), hidden, gated=True)
    if y is None:
        ups, gates = hidden.chunk(2, dim=-1)
        y = last(swiglu(gates, ups))
    return y


def joined(block: Any, x: Tensor | Normalized, attend: Any) -> Tensor:
    """proj_out of attention and MLP, side by side, of x [B, L, K]. attend: of x."""
    mlp = project((block.proj_mlp,), x, gelu=True) if isinstance(x, Normalized) else None
    if mlp is not None:
        attention = attend(x)
        y = project((block.proj_out,), attention, second=mlp)
        return block.proj_out(torch.cat([attention, mlp], dim=-1)) if y is None else y
    x = computed(x)
    both = x.new_empty(*x.shape[:-1], block.proj_out.in_features)
    attention, mlp = both.split_with_sizes([x.shape[-1], both.shape[-1] - x.shape[-1]], dim=-1)
    linear(block.proj_mlp, x, gelu=True, out=mlp)
    attention.copy_(attend(x))
    return block.proj_out(both)
