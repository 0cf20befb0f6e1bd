"""Queries, keys and values of one or several streams of tokens, in the place where attention reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels import fused, gpu
from .inputs import Normalized, computed, on_gpu, project, source
from .modules import linear, untouched
from .rms_norm import ROTATING, rotates

# Cosines and sines, float32 [L, D], or [B, L, D] where they differ within a batch; equal for the pair (2i, 2i+1).
Rotary = tuple[Tensor, Tensor]


class Stream(NamedTuple):
    """Tokens that attend together with others, and what makes heads of them.

    x [B, L, K]; layers: of queries, keys and values; norms: of the heads of queries and of keys, None where they have
    none; rotary: of these tokens.
    """

    x: Tensor | Normalized
    layers: tuple[Any, Any, Any]
    norms: tuple[Any, Any] = (None, None)
    rotary: Rotary | None = None


def rotary_of(rotations: Tensor) -> Rotary:
    """Cosines and sines [..., L, D] of complex rotations [..., L, D/2]."""
    cosine, sine = torch.view_as_real(rotations).unbind(-1)
    return _twice(cosine), _twice(sine)


def _twice(values: Tensor) -> Tensor:
    return values[..., None].expand(*values.shape, 2).flatten(-2)


def answers(attn: Any, cls: type, processor: type) -> bool:
    """Whether attn's processor may be called in attn's place: it is `processor`, and nobody would notice."""
    same = untouched(attn, cls) and type(attn.processor) is processor
    return same and "__call__" not in attn.processor.__dict__


def joint_heads(streams: Sequence[Stream], width: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """q, k and v [B, ΣL, H, D] of all streams in their order, normalized and rotated; None where diffusers has to.

    width: H·D, which every layer makes.
    """
    if not fused.usable(*(source(stream.x) for stream in streams)):
        return None
    like = source(streams[0].x)
    if not all(_turns(stream, like[..., :head_dim]) for stream in streams):
        return None
    tokens = [source(stream.x).shape[1] for stream in streams]
    # Side by side on a GPU, where one product writes all three.
    shape = (like.shape[0], sum(tokens), width)
    if on_gpu(like):
        whole = like.new_empty(*shape[:-1], 3 * width)
        q, k, v = whole.unflatten(-1, (3, -1, head_dim)).unbind(2)
    else:
        whole = None
        q, k, v = (like.new_empty(shape).unflatten(-1, (-1, head_dim)) for _ in range(3))
    start = 0
    for count, stream in zip(tokens, streams, strict=True):
        here = slice(start, start + count)
        if whole is None or not _stacked(stream, whole[:, here], head_dim):
            _apart(stream, q[:, here], k[:, here], v[:, here])
        start += count
    return q, k, v


def _turns(stream: Stream, heads: Tensor) -> bool:
    """Whether the stream's norms are the fused ones, or absent, and its rotation fits them."""
    norms = [norm for norm in stream.norms if norm is not None]
    # What rotates is a norm.
    if stream.rotary is not None and len(norms) < 2:
        return False
    return all(rotates(norm, heads) for norm in norms)


def _apart(stream: Stream, q: Tensor, k: Tensor, v: Tensor) -> None:
    """One stream layer by layer into q, k and v [B, L, H, D]."""
    to_q, to_k, to_v = stream.layers
    x = computed(stream.x)
    for layer, norm, part in ((to_q, stream.norms[0], q), (to_k, stream.norms[1], k), (to_v, None, v)):
        # Rows of several batch entries between those of other streams are no matrix that a CPU's product could write.
        direct = part.shape[0] == 1 or part.is_contiguous() or on_gpu(part)
        y = linear(layer, x, out=part.flatten(2) if direct else None)
        # `part` itself, because a view of it may have another stride where there is one entry.
        y = part if direct else y.view_as(part)
        if norm is not None:
            turn(norm, y, stream.rotary, part)
        elif not direct:
            part.copy_(y)


def turn(norm: Any, x: Tensor, rotary: Rotary | None, out: Tensor) -> None:
    """norm(x), rotated, into `out`, which may be x. x, out [B, L, H, D]; norm: of `rotates`."""
    rotary = _shared(rotary)
    if rotary is not None and rotary[0].dim() == 3:
        for i in range(x.shape[0]):
            turn(norm, x[i : i + 1], (rotary[0][i], rotary[1][i]), out[i : i + 1])
        return
    y = norm(x, rotary=rotary, out=out)
    if y is not out:
        out.copy_(y)


def _shared(rotary: Rotary | None) -> Rotary | None:
    """Without a batch dimension of 1."""
    if rotary is None or rotary[0].dim() != 3 or rotary[0].shape[0] != 1:
        return rotary
    return rotary[0][0], rotary[1][0]


def head_norm(norms: tuple[Any, Any], head_dim: int, rotary: Rotary | None, like: Tensor) -> gpu.HeadNorm | None:
    """norm and rotation of queries and keys as a product's epilogue; None where they are computed by themselves."""
    if not all(type(norm) in ROTATING and untouched(norm, type(norm)) for norm in norms):
        return None
    if type(norms[0]) is not type(norms[1]) or norms[0].eps != norms[1].eps:
        return None
    rotary = _shared(rotary)
    if rotary is not None and rotary[0].dim() == 3:
        return None
    cosine, sine = (None, None) if rotary is None else (t.to(like.device, torch.float32) for t in rotary)
    return gpu.HeadNorm((norms[0].weight, norms[1].weight), norms[0].eps, head_dim, cosine, sine)


def _stacked(stream: Stream, out: Tensor, head_dim: int) -> bool:
    """q, k and v of one stream by one product into `out` [B, L, 3·H·D]; False where that cannot be."""
    norm = None
    if stream.norms != (None, None):
        norm = head_norm(stream.norms, head_dim, stream.rotary, out)
        if norm is None:
            return False
    return project(stream.layers, stream.x, out=out, norm=norm) is not None


def outputs(attn: Any, y: Tensor, x: Tensor | Normalized, text: Tensor | Normalized | None) -> Any:
    """y [B, ΣL, H, D], the text first, through attn's output layers: x's [B, L, N], or (x's, the text's)."""
    y = y.flatten(2, 3).to(source(x).dtype)
    if text is None:
        return through(attn.to_out, y)
    parts = y.split_with_sizes([source(text).shape[1], source(x).shape[1]], dim=1)
    if not on_gpu(y):
        parts = [part.contiguous() for part in parts]
    return through(attn.to_out, parts[1]), attn.to_add_out(parts[0])


def through(layers: Any, x: Tensor) -> Tensor:
    """x through one layer after the other."""
    for layer in layers:
        x = layer(x)
    return x
