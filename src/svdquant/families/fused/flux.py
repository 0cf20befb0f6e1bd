"""FLUX.1's blocks and its default attention processor."""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers import transformer_flux
from torch import Tensor, nn

from ...kernels import fused
from .blocks import after_attention, joined, put_off
from .heads import Rotary, Stream, answers, joint_heads, outputs
from .inputs import Normalized, computed, source
from .modules import AdaLayerNormZero, AdaLayerNormZeroSingle, untouched


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
        y = attention(self, attn, x, text, attention_mask, image_rotary_emb)
        if y is None:
            text = None if text is None else computed(text)
            return super().__call__(attn, computed(x), text, attention_mask, image_rotary_emb)
        # A single block has its output layer itself.
        return y.flatten(2, 3).to(source(x).dtype) if text is None else outputs(attn, y, x, text)


def attention(
    processor: Any,
    attn: Any,
    x: Tensor | Normalized,
    text: Tensor | Normalized | None,
    mask: Tensor | None,
    rotary: Rotary | None,
) -> Tensor | None:
    """Heads [B, T, H, D] that attended, the text's first, of FLUX.1 or 2; None where diffusers has to compute them."""
    heads = heads_of(attn, x, text, rotary) if processor._parallel_config is None else None
    if heads is None:
        return None
    y: Tensor = dispatch_attention_fn(
        *heads, attn_mask=mask, backend=processor._attention_backend, parallel_config=processor._parallel_config
    )
    return y


def heads_of(
    attn: Any, x: Tensor | Normalized, text: Tensor | Normalized | None, rotary: Rotary | None
) -> tuple[Tensor, Tensor, Tensor] | None:
    """`joint_heads` of an attention of FLUX.1 or 2: the text comes first. None where diffusers has to make them.

    x [B, T', K]; text [B, T - T', K]; rotary: cosines and sines [T, D].
    """
    if (text is None) != (attn.added_kv_proj_dim is None) or attn.fused_projections:
        return None
    parts: list[tuple[Any, ...]] = [(x, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k))]
    if text is not None:
        added = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj
        parts.insert(0, (text, added, (attn.norm_added_q, attn.norm_added_k)))
    tokens = [source(part[0]).shape[1] for part in parts]
    tables: Any = [None] * len(parts)
    if rotary is not None:
        if rotary[0].shape[0] != sum(tokens):
            return None
        tables = zip(*(table.split_with_sizes(tokens) for table in rotary), strict=True)
    streams = [Stream(x, layers, norms, table) for (x, layers, norms), table in zip(parts, tables, strict=True)]
    return joint_heads(streams, attn.inner_dim, attn.head_dim)


def _attend(attn: Any, rotary: Rotary | None, options: dict[str, Any], x: Any, text: Any = None) -> Any:
    """attn of inputs whose norm has been put off: handed on as they are where nobody else looks on."""
    if not options and answers(attn, transformer_flux.FluxAttention, FluxAttnProcessor):
        return attn.processor(attn, x, text, None, rotary)
    given = {"hidden_states": computed(x), "image_rotary_emb": rotary, **options}
    if text is not None:
        given["encoder_hidden_states"] = computed(text)
    return attn(**given)


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
        image, *image_modulation = put_off(self.norm1, AdaLayerNormZero, hidden_states, temb)
        text, *text_modulation = put_off(self.norm1_context, AdaLayerNormZero, encoder_hidden_states, temb)
        image, text, *adapter = _attend(self.attn, image_rotary_emb, joint_attention_kwargs or {}, image, text)
        hidden_states = after_attention(hidden_states, image, image_modulation, self.norm2, self.ff)
        if adapter:
            hidden_states = hidden_states + adapter[0]
        return (
            after_attention(encoder_hidden_states, text, text_modulation, self.norm2_context, self.ff_context),
            hidden_states,
        )


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
        x, gate = put_off(self.norm, AdaLayerNormZeroSingle, residual, temb)
        options = joint_attention_kwargs or {}

        def attend(x: Tensor | Normalized) -> Tensor:
            y = _attend(self.attn, image_rotary_emb, options, x)
            assert isinstance(y, Tensor)
            return y

        residual = fused.gate_add(residual, gate, joined(self, x, attend), out=residual)
        return residual[:, :text], residual[:, text:]


FUSED = (FluxAttnProcessor, FluxTransformerBlock, FluxSingleTransformerBlock)
