"""Stable Diffusion 3's blocks, their second norm and their default attention processor."""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch.nn.functional as F
from diffusers.models import attention, attention_processor, normalization
from torch import Tensor

from ...kernels import fused
from .blocks import after_attention, put_off
from .heads import Stream, answers, joint_heads, through
from .inputs import Normalized, computed, on_gpu, source
from .modules import AdaLayerNormContinuous, AdaLayerNormZero, normalized, untouched


class JointAttnProcessor2_0(attention_processor.JointAttnProcessor2_0):
    """Image and text tokens are projected and normalized in the place where attention reads them."""

    @wraps(attention_processor.JointAttnProcessor2_0.__call__)
    def __call__(
        self,
        attn: Any,
        hidden_states: Any,
        encoder_hidden_states: Any = None,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        x, text = hidden_states, encoder_hidden_states
        heads = _heads(attn, x, text)
        if heads is None:
            text = None if text is None else computed(text)
            return super().__call__(attn, computed(x), text, attention_mask, *args, **kwargs)
        # Like diffusers': this processor knows no backends, and no mask.
        y = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in heads)).transpose(1, 2)
        y = y.flatten(2, 3).to(source(x).dtype)
        if text is None:
            return through(attn.to_out, y)
        image, words = y.split_with_sizes([source(x).shape[1], source(text).shape[1]], dim=1)
        if not on_gpu(y):
            image, words = image.contiguous(), words.contiguous()
        return through(attn.to_out, image), words if attn.context_pre_only else attn.to_add_out(words)


def _heads(attn: Any, x: Tensor | Normalized, text: Tensor | Normalized | None) -> tuple[Tensor, Tensor, Tensor] | None:
    """`joint_heads`, the picture first; None where diffusers has to make them."""
    if attn.fused_projections or attn.inner_dim != attn.inner_kv_dim or attn.inner_dim % attn.heads:
        return None
    streams = [Stream(x, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k))]
    if text is not None:
        layers = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj
        streams.append(Stream(text, layers, (attn.norm_added_q, attn.norm_added_k)))
    return joint_heads(streams, attn.inner_dim, attn.inner_dim // attn.heads)


class SD35AdaLayerNormZeroX(normalization.SD35AdaLayerNormZeroX):
    @wraps(normalization.SD35AdaLayerNormZeroX.forward)
    def forward(self, hidden_states: Tensor, emb: Tensor | None = None) -> tuple[Tensor, ...]:
        if not fused.usable(hidden_states):
            return super().forward(hidden_states, emb)
        found = self.put_off(hidden_states, emb)
        return tuple(computed(value) for value in found)

    def put_off(self, x: Tensor, emb: Tensor | None) -> tuple[Any, ...]:
        """The forward, with its norms put off."""
        shift, scale, gate, *rest, shift2, scale2, gate2 = self.linear(self.silu(emb)).chunk(9, dim=1)
        return normalized(self.norm, x, scale, shift), gate, *rest, normalized(self.norm, x, scale2, shift2), gate2


class JointTransformerBlock(attention.JointTransformerBlock):
    @wraps(attention.JointTransformerBlock.forward)
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor | None, Tensor]:
        whole = self._chunk_size is None
        if not whole or not fused.usable(hidden_states, encoder_hidden_states, temb):
            return super().forward(hidden_states, encoder_hidden_states, temb, joint_attention_kwargs)
        options = joint_attention_kwargs or {}
        second = gate2 = None
        if self.use_dual_attention:
            image, gate, *modulation, second, gate2 = put_off(self.norm1, SD35AdaLayerNormZeroX, hidden_states, temb)
        else:
            image, gate, *modulation = put_off(self.norm1, AdaLayerNormZero, hidden_states, temb)
        text_modulation: list[Tensor] = []
        if self.context_pre_only:
            text = _put_off_last(self.norm1_context, encoder_hidden_states, temb)
        else:
            text, *text_modulation = put_off(self.norm1_context, AdaLayerNormZero, encoder_hidden_states, temb)
        image, text = _attend(self.attn, options, image, text)
        if second is not None and gate2 is not None:
            # The first attention's residual; the second's is added with the feed-forward's.
            hidden_states = fused.gate_add(hidden_states, gate, image)
            gate, image = gate2, _attend(self.attn2, options, second)
        hidden_states = after_attention(hidden_states, image, [gate, *modulation], self.norm2, self.ff)
        if self.context_pre_only:
            return None, hidden_states
        norm, ff = self.norm2_context, self.ff_context
        return after_attention(encoder_hidden_states, text, text_modulation, norm, ff), hidden_states


def _put_off_last(norm: Any, x: Tensor, temb: Tensor) -> Any:
    """norm(x, temb) of the last block's text."""
    return norm.put_off(x, temb) if untouched(norm, AdaLayerNormContinuous) else norm(x, temb)


def _attend(attn: Any, options: dict[str, Any], x: Any, text: Any = None) -> Any:
    """attn of inputs whose norm has been put off: handed on as they are where nobody else looks on."""
    if not options and answers(attn, attention_processor.Attention, JointAttnProcessor2_0):
        return attn.processor(attn, x, text)
    given = {"hidden_states": computed(x), **options}
    if text is not None:
        given["encoder_hidden_states"] = computed(text)
    return attn(**given)


FUSED = (JointAttnProcessor2_0, SD35AdaLayerNormZeroX, JointTransformerBlock)
