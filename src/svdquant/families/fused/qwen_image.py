"""Qwen-Image's blocks and their default attention processor."""

from __future__ import annotations

from functools import wraps
from typing import Any, NamedTuple

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers import transformer_qwenimage
from torch import Tensor, nn

from ...kernels import fused
from .blocks import feed_forward
from .heads import Stream, answers, joint_heads, outputs, rotary_of
from .inputs import Normalized, computed, on_gpu, source
from .modules import normalized, untouched

# Complex rotations [L, D/2] of the picture's tokens and of the text's.
Rotations = tuple[Tensor, Tensor]


class QwenDoubleStreamAttnProcessor2_0(transformer_qwenimage.QwenDoubleStreamAttnProcessor2_0):
    """Text and image tokens are projected, normalized and rotated in the place where attention reads them."""

    @wraps(transformer_qwenimage.QwenDoubleStreamAttnProcessor2_0.__call__)
    def __call__(
        self,
        attn: Any,
        hidden_states: Any,
        encoder_hidden_states: Any = None,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotations | None = None,
    ) -> tuple[Tensor, Tensor]:
        x, text, mask = hidden_states, encoder_hidden_states, encoder_hidden_states_mask
        heads = None
        if text is not None and attention_mask is None and self._parallel_config is None:
            heads = _heads(attn, x, text, image_rotary_emb)
        if heads is None:
            text = None if text is None else computed(text)
            y = super().__call__(attn, computed(x), text, mask, attention_mask, image_rotary_emb)
        else:
            y = dispatch_attention_fn(
                *heads,
                attn_mask=None if mask is None else _joint_mask(mask, source(x).shape[1]),
                dropout_p=0.0,
                is_causal=False,
                backend=self._attention_backend,
                parallel_config=self._parallel_config,
            )
            y = outputs(attn, y, x, text)
        assert isinstance(y, tuple)
        return y


def _joint_mask(mask: Tensor, tokens: int) -> Tensor:
    """Of the text [B, L], followed by that many tokens of the picture: [B, 1, 1, L + tokens]."""
    picture = mask.new_ones((mask.shape[0], tokens), dtype=torch.bool)
    return torch.cat([mask, picture], dim=1)[:, None, None]


def _heads(
    attn: Any, x: Tensor | Normalized, text: Tensor | Normalized, rotations: Rotations | None
) -> tuple[Tensor, Tensor, Tensor] | None:
    """`joint_heads`, the text first; None where diffusers has to make them."""
    if attn.fused_projections or attn.inner_dim != attn.inner_kv_dim or attn.inner_dim % attn.heads:
        return None
    picture = Stream(x, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k))
    added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj), (attn.norm_added_q, attn.norm_added_k)
    streams = [Stream(text, *added), picture]
    head_dim = attn.inner_dim // attn.heads
    if rotations is not None:
        for part, stream in zip(reversed(rotations), streams, strict=True):
            if not part.is_complex() or part.shape != (source(stream.x).shape[1], head_dim // 2):
                return None
        streams = [
            stream._replace(rotary=rotary_of(part)) for part, stream in zip(reversed(rotations), streams, strict=True)
        ]
    return joint_heads(streams, attn.inner_dim, head_dim)


class Modulation(NamedTuple):
    """Of some tokens: shift, scale and gate [B or 1, K]."""

    tokens: slice
    shift: Tensor
    scale: Tensor
    gate: Tensor


def _normalize(norm: Any, x: Tensor, parts: list[Modulation]) -> Tensor | Normalized:
    """norm(x) modulated. norm: a plain LayerNorm where there are several parts."""
    if len(parts) == 1:
        return normalized(norm, x, parts[0].scale, parts[0].shift)
    y = torch.empty_like(x)
    for tokens, shift, scale, _ in parts:
        fused.norm_modulate(x[:, tokens], scale, shift, norm.eps, norm.weight, norm.bias, out=y[:, tokens])
    return y


def _add(residual: Tensor, parts: list[Modulation], y: Tensor, out: Tensor | None = None) -> Tensor:
    """residual + gate·y."""
    out = torch.empty_like(residual) if out is None else out
    for tokens, _, _, gate in parts:
        fused.gate_add(residual[:, tokens], gate, y[:, tokens], out=out[:, tokens])
    return out


def _boundary(index: Tensor, tokens: int) -> int | None:
    """How many tokens index [B, L] gives the first modulation, all others having the second; None if mixed."""
    first = int((index[:1] == 0).sum())
    parts = index[:, :first], index[:, first:]
    whole = index.shape[1] == tokens and not bool((parts[0] != 0).any()) and bool((parts[1] != 0).all())
    return first if whole else None


class QwenImageTransformerBlock(transformer_qwenimage.QwenImageTransformerBlock):
    @wraps(transformer_qwenimage.QwenImageTransformerBlock.forward)
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None,
        temb: Tensor,
        image_rotary_emb: Rotations | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        modulate_index: Any = None,
    ) -> tuple[Tensor, Tensor]:
        first = self._first(hidden_states, temb, modulate_index)
        if first is None or not fused.usable(hidden_states, encoder_hidden_states, temb):
            return super().forward(
                hidden_states,
                encoder_hidden_states,
                encoder_hidden_states_mask,
                temb,
                image_rotary_emb,
                joint_attention_kwargs,
                modulate_index,
            )
        text_temb = temb.chunk(2, dim=0)[0] if self.zero_cond_t else temb
        before, after = _modulations(self.img_mod(temb), first, modulate_index is not None)
        text_before, text_after = _modulations(self.txt_mod(text_temb), 0, False)
        image = _normalize(self.img_norm1, hidden_states, before)
        text = _normalize(self.txt_norm1, encoder_hidden_states, text_before)
        image, text = self._attend(image, text, encoder_hidden_states_mask, image_rotary_emb, joint_attention_kwargs)
        hidden_states = _add(hidden_states, before, image)
        image = feed_forward(self.img_mlp, _normalize(self.img_norm2, hidden_states, after))
        hidden_states = _add(hidden_states, after, image, out=hidden_states)
        encoder_hidden_states = _add(encoder_hidden_states, text_before, text)
        text = feed_forward(self.txt_mlp, _normalize(self.txt_norm2, encoder_hidden_states, text_after))
        return _add(encoder_hidden_states, text_after, text, out=encoder_hidden_states), hidden_states

    def _first(self, x: Tensor, temb: Tensor, index: Any) -> int | None:
        """Tokens of x that have the first of two modulations; None where diffusers has to sort them out."""
        if index is None:
            return 0 if temb.shape[0] in (1, x.shape[0]) and not self.zero_cond_t else None
        # Elsewhere looking at the index would make the device wait.
        if x.device.type != "cpu" or on_gpu(x) or torch.compiler.is_compiling() or not self.zero_cond_t:
            return None
        plain = untouched(self.img_norm1, nn.LayerNorm) and untouched(self.img_norm2, nn.LayerNorm)
        return _boundary(index, x.shape[1]) if plain and temb.shape[0] == 2 * x.shape[0] else None

    def _attend(
        self,
        x: Tensor | Normalized,
        text: Tensor | Normalized,
        mask: Tensor | None,
        rotations: Rotations | None,
        options: dict[str, Any] | None,
    ) -> Any:
        if not options and answers(self.attn, Attention, QwenDoubleStreamAttnProcessor2_0):
            return self.attn.processor(self.attn, x, text, mask, None, rotations)
        return self.attn(
            hidden_states=computed(x),
            encoder_hidden_states=computed(text),
            encoder_hidden_states_mask=mask,
            image_rotary_emb=rotations,
            **(options or {}),
        )


def _modulations(values: Tensor, first: int, two: bool) -> tuple[list[Modulation], list[Modulation]]:
    """Before the attention and after it. values [B or 1, 6·K]; where there are two, [2·B, 6·K], the first half for the
    first `first` tokens.
    """
    if not two:
        halves = [(slice(None), values)]
    else:
        head, tail = values.chunk(2, dim=0)
        halves = [(slice(0, first), head), (slice(first, None), tail)]
    chunks = [(tokens, part.chunk(6, dim=-1)) for tokens, part in halves]
    return [Modulation(t, *c[:3]) for t, c in chunks], [Modulation(t, *c[3:]) for t, c in chunks]


FUSED = (QwenDoubleStreamAttnProcessor2_0, QwenImageTransformerBlock)
