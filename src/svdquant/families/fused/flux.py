"""FLUX.1's blocks and its default attention processor."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from functools import wraps
from typing import Any

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers import transformer_flux
from torch import Tensor, nn

from ...kernels import fused, gpu
from .inputs import Normalized, computed, on_gpu, project, source
from .modules import (
    GELU,
    AdaLayerNormZero,
    AdaLayerNormZeroSingle,
    RMSNorm,
    linear,
    normalized,
    takes_options,
    untouched,
)

Rotary = tuple[Tensor, Tensor]


class FluxAttnProcessor(transformer_flux.FluxAttnProcessor):
    """Text and image tokens are projected, normalized and rotated in the place where attention reads them."""

    @wraps(transformer_flux.FluxAttnProcessor.__call__)
    def __call__(
        self,
        attn: Any,
        hidden_states: Any,
        encoder_hidden_states: Any = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        x, text = hidden_states, encoder_hidden_states
        heads = None
        if self._parallel_config is None:
            heads = joint_heads(attn, x, text, image_rotary_emb)
        if heads is None:
            text = None if text is None else computed(text)
            return super().__call__(attn, computed(x), text, attention_mask, image_rotary_emb)
        y = dispatch_attention_fn(
            *heads,
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        y = y.flatten(2, 3).to(source(x).dtype)
        if text is None:
            return y
        parts = y.split_with_sizes([source(text).shape[1], source(x).shape[1]], dim=1)
        if not on_gpu(y):
            parts = [part.contiguous() for part in parts]
        return attn.to_out[1](attn.to_out[0](parts[1])), attn.to_add_out(parts[0])


def joint_heads(
    attn: Any, x: Tensor | Normalized, text: Tensor | Normalized | None, rotary: Rotary | None
) -> tuple[Tensor, Tensor, Tensor] | None:
    """q, k and v [B, T, H, D] of text and image tokens, normalized and rotated; None where diffusers has to do it.

    x [B, T', K]; text [B, T - T', K] comes first; rotary: cosines and sines [T, D].
    """
    streams: list[tuple[Any, ...]] = [(x, attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k)]
    if text is not None and attn.added_kv_proj_dim is not None:
        added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, attn.norm_added_q, attn.norm_added_k)
        streams.insert(0, (text, *added))
    whole = (text is None) == (attn.added_kv_proj_dim is None) and not attn.fused_projections
    if not whole or not fused.usable(*(source(stream[0]) for stream in streams)):
        return None
    like = source(x)
    norms = [norm for stream in streams for norm in stream[4:]]
    if not all(takes_options(norm, RMSNorm) and norm.takes(like[..., : attn.head_dim]) for norm in norms):
        return None
    tokens = [source(stream[0]).shape[1] for stream in streams]
    # Side by side on a GPU, where one product writes all three.
    shape = (like.shape[0], sum(tokens), attn.inner_dim)
    if on_gpu(like):
        whole_qkv = like.new_empty(*shape[:-1], 3 * attn.inner_dim)
        q, k, v = whole_qkv.unflatten(-1, (3, -1, attn.head_dim)).unbind(2)
    else:
        whole_qkv = None
        q, k, v = (like.new_empty(shape).unflatten(-1, (-1, attn.head_dim)) for _ in range(3))
    parts = [t.split_with_sizes(tokens, dim=1) for t in (q, k, v)]
    tables = (
        [None] * len(streams) if rotary is None else zip(*(t.split_with_sizes(tokens) for t in rotary), strict=True)
    )
    start = 0
    for count, stream, q_part, k_part, v_part, table in zip(tokens, streams, *parts, tables, strict=True):
        if whole_qkv is None or not _stacked(stream, whole_qkv[:, start : start + count], attn.head_dim, table):
            to_q, to_k, to_v, norm_q, norm_k = stream[1:]
            read = computed(stream[0])
            for layer, norm, part in ((to_q, norm_q, q_part), (to_k, norm_k, k_part)):
                linear(layer, read, out=part.flatten(2))
                y = norm(part, rotary=table, out=part)
                if y is not part:
                    part.copy_(y)
            linear(to_v, read, out=v_part.flatten(2))
        start += count
    return q, k, v


def _stacked(stream: tuple[Any, ...], out: Tensor, head: int, table: Rotary | None) -> bool:
    """q, k and v of one stream by one product into `out` [B, T, 3·H·D]; False where that cannot be."""
    x, to_q, to_k, to_v, norm_q, norm_k = stream
    if not (untouched(norm_q, RMSNorm) and untouched(norm_k, RMSNorm) and norm_q.eps == norm_k.eps):
        return False
    cosine, sine = (None, None) if table is None else (t.to(out.device, torch.float32) for t in table)
    norm = gpu.HeadNorm((norm_q.weight, norm_k.weight), norm_q.eps, head, cosine, sine)
    return project((to_q, to_k, to_v), x, out=out, norm=norm) is not None


def _attend(attn: Any, rotary: Rotary | None, options: dict[str, Any], x: Any, text: Any = None) -> Any:
    """attn of inputs whose norm has been put off: handed on as they are where nobody else looks on."""
    if (
        not options
        and untouched(attn, transformer_flux.FluxAttention)
        and type(attn.processor) is FluxAttnProcessor
        and "__call__" not in attn.processor.__dict__
    ):
        return attn.processor(attn, x, text, None, rotary)
    given = {"hidden_states": computed(x), "image_rotary_emb": rotary, **options}
    if text is not None:
        given["encoder_hidden_states"] = computed(text)
    return attn(**given)


def _put_off(norm: Any, cls: type, x: Tensor, temb: Tensor) -> Any:
    """norm(x, emb=temb), its norm put off where nobody would notice."""
    return norm.put_off(x, temb) if untouched(norm, cls) and getattr(norm, "emb", None) is None else norm(x, emb=temb)


class FluxTransformerBlock(transformer_flux.FluxTransformerBlock):
    @wraps(transformer_flux.FluxTransformerBlock.forward)
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Rotary | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        if not fused.usable(hidden_states, encoder_hidden_states, temb):
            return super().forward(hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs)
        image, *image_modulation = _put_off(self.norm1, AdaLayerNormZero, hidden_states, temb)
        text, *text_modulation = _put_off(self.norm1_context, AdaLayerNormZero, encoder_hidden_states, temb)
        image, text, *adapter = _attend(self.attn, image_rotary_emb, joint_attention_kwargs or {}, image, text)
        hidden_states = _feed_forward(hidden_states, image, image_modulation, self.norm2, self.ff)
        if adapter:
            hidden_states = hidden_states + adapter[0]
        return (
            _feed_forward(encoder_hidden_states, text, text_modulation, self.norm2_context, self.ff_context),
            hidden_states,
        )


def _feed_forward(residual: Tensor, attention: Tensor, modulation: list[Tensor], norm: Any, ff: Any) -> Tensor:
    """One stream of a double block after its attention."""
    gate, shift, scale, ff_gate = modulation
    residual = fused.gate_add(residual, gate, attention)
    x = normalized(norm, residual, scale, shift)
    y = _gelu_feed_forward(ff, x) if isinstance(x, Normalized) else None
    return fused.gate_add(residual, ff_gate, ff(computed(x)) if y is None else y, out=residual)


def _gelu_feed_forward(ff: Any, x: Normalized) -> Tensor | None:
    """ff(x), its first product reading x before it is normalized; None where ff has to be called."""
    if not untouched(ff, FeedForward) or len(ff.net) != 3 or ff.training:
        return None
    first, dropout, last = ff.net
    if not (untouched(first, GELU) and first.approximate == "tanh" and untouched(dropout, nn.Dropout)):
        return None
    hidden = project((first.proj,), x, gelu=True)
    return None if hidden is None else last(hidden)


class FluxSingleTransformerBlock(transformer_flux.FluxSingleTransformerBlock):
    """Attention and MLP meet in the place where `proj_out` reads them."""

    @wraps(transformer_flux.FluxSingleTransformerBlock.forward)
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Rotary | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        gelu = untouched(self.act_mlp, nn.GELU) and self.act_mlp.approximate == "tanh"
        if not gelu or not fused.usable(hidden_states, encoder_hidden_states, temb):
            return super().forward(hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs)
        text = encoder_hidden_states.shape[1]
        residual = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        x, gate = _put_off(self.norm, AdaLayerNormZeroSingle, residual, temb)
        options = joint_attention_kwargs or {}
        mlp = project((self.proj_mlp,), x, gelu=True) if isinstance(x, Normalized) else None
        if mlp is None:
            x = computed(x)
            y = x.new_empty(*x.shape[:-1], self.proj_out.in_features)
            attention, mlp = y.split_with_sizes([y.shape[-1] - self.mlp_hidden_dim, self.mlp_hidden_dim], dim=-1)
            linear(self.proj_mlp, x, gelu=True, out=mlp)
            attention.copy_(_attend(self.attn, image_rotary_emb, options, x))
            y = self.proj_out(y)
        else:
            attention = _attend(self.attn, image_rotary_emb, options, x)
            joined = project((self.proj_out,), attention, second=mlp)
            y = self.proj_out(torch.cat([attention, mlp], dim=-1)) if joined is None else joined
        residual = fused.gate_add(residual, gate, y, out=residual)
        return residual[:, :text], residual[:, text:]


FUSED = (FluxAttnProcessor, FluxTransformerBlock, FluxSingleTransformerBlock)


def register(fused_classes: dict[type, type]) -> None:
    """Tells diffusers' caches and layer skipping, which look classes up, what the fused ones are."""
    with contextlib.suppress(ImportError, AttributeError):
        from diffusers.hooks._helpers import AttentionProcessorRegistry, TransformerBlockRegistry

        for registry in (AttentionProcessorRegistry, TransformerBlockRegistry):
            for theirs, ours in fused_classes.items():
                with contextlib.suppress(ValueError):
                    registry.register(ours, replace(registry.get(theirs)))
