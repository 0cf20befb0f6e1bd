"""FLUX.1's blocks and its default attention processor."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from functools import wraps
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers import transformer_flux
from torch import Tensor, nn

from ...kernels import fused
from .modules import RMSNorm, linear, modulated, takes_options, untouched

Rotary = tuple[Tensor, Tensor]


class FluxAttnProcessor(transformer_flux.FluxAttnProcessor):
    """Text and image tokens are projected, normalized and rotated in the place where attention reads them."""

    @wraps(transformer_flux.FluxAttnProcessor.__call__)
    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        heads = None
        if self._parallel_config is None:
            heads = joint_heads(attn, hidden_states, encoder_hidden_states, image_rotary_emb)
        if heads is None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        y = dispatch_attention_fn(
            *heads,
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        y = y.flatten(2, 3).to(hidden_states.dtype)
        if encoder_hidden_states is None:
            return y
        text = encoder_hidden_states.shape[1]
        image = attn.to_out[1](attn.to_out[0](y[:, text:].contiguous()))
        return image, attn.to_add_out(y[:, :text].contiguous())


def joint_heads(
    attn: Any, x: Tensor, text: Tensor | None, rotary: Rotary | None
) -> tuple[Tensor, Tensor, Tensor] | None:
    """q, k and v [B, T, H, D] of text and image tokens, normalized and rotated; None where diffusers has to do it.

    x [B, T', K]; text [B, T - T', K] comes first; rotary: cosines and sines [T, D].
    """
    streams = [(x, attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k)]
    if text is not None and attn.added_kv_proj_dim is not None:
        added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, attn.norm_added_q, attn.norm_added_k)
        streams.insert(0, (text, *added))
    whole = (text is None) == (attn.added_kv_proj_dim is None) and not attn.fused_projections
    if not whole or not fused.usable(*(stream[0] for stream in streams)):
        return None
    norms = [norm for stream in streams for norm in stream[4:]]
    if not all(takes_options(norm, RMSNorm) and norm.takes(x[..., : attn.head_dim]) for norm in norms):
        return None
    tokens = [stream[0].shape[1] for stream in streams]
    q, k, v = (
        x.new_empty(x.shape[0], sum(tokens), attn.inner_dim).unflatten(-1, (-1, attn.head_dim)) for _ in range(3)
    )
    parts = [t.split_with_sizes(tokens, dim=1) for t in (q, k, v)]
    tables = (
        [None] * len(streams) if rotary is None else zip(*(t.split_with_sizes(tokens) for t in rotary), strict=True)
    )
    for stream, q_part, k_part, v_part, table in zip(streams, *parts, tables, strict=True):
        x, to_q, to_k, to_v, norm_q, norm_k = stream
        for layer, norm, part in ((to_q, norm_q, q_part), (to_k, norm_k, k_part)):
            linear(layer, x, out=part.flatten(2))
            y = norm(part, rotary=table, out=part)
            if y is not part:
                part.copy_(y)
        linear(to_v, x, out=v_part.flatten(2))
    return q, k, v


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
        image, *image_modulation = self.norm1(hidden_states, emb=temb)
        text, *text_modulation = self.norm1_context(encoder_hidden_states, emb=temb)
        image, text, *adapter = self.attn(
            hidden_states=image,
            encoder_hidden_states=text,
            image_rotary_emb=image_rotary_emb,
            **(joint_attention_kwargs or {}),
        )
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
    y = ff(modulated(norm, residual, scale, shift))
    return fused.gate_add(residual, ff_gate, y, out=residual)


class FluxSingleTransformerBlock(transformer_flux.FluxSingleTransformerBlock):
    """Attention and MLP write into the place where `proj_out` reads them."""

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
        x, gate = self.norm(residual, emb=temb)
        y = x.new_empty(*x.shape[:-1], self.proj_out.in_features)
        attention, mlp = y.split_with_sizes([y.shape[-1] - self.mlp_hidden_dim, self.mlp_hidden_dim], dim=-1)
        linear(self.proj_mlp, x, gelu=True, out=mlp)
        attention.copy_(self.attn(hidden_states=x, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {})))
        residual = fused.gate_add(residual, gate, self.proj_out(y), out=residual)
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
