"""Wan's blocks and their attention."""

from __future__ import annotations

from functools import wraps
from typing import Any

from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers import transformer_wan
from torch import Tensor

from ...kernels import fused
from . import across_heads
from .across_heads import heads_of
from .heads import Rotary
from .modulation import FP32LayerNorm, gate_add, sums, unseen

# So many tokens of text, padding included, follow those of a picture.
_TEXT = 512


class WanAttnProcessor(transformer_wan.WanAttnProcessor):
    @wraps(transformer_wan.WanAttnProcessor.__call__)
    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Rotary | None = None,
    ) -> Tensor:
        x, text = hidden_states, encoder_hidden_states
        if self._parallel_config is not None or not _takes(attn, x, text, rotary_emb):
            return super().__call__(attn, x, text, attention_mask, rotary_emb)
        picture = None
        if attn.add_k_proj is not None and text is not None:
            tokens = text.shape[1] - _TEXT
            picture, text = text[:, :tokens], text[:, tokens:]
        read = x if text is None else text
        rotary = None if rotary_emb is None else (rotary_emb[0][0, :, 0], rotary_emb[1][0, :, 0])
        q = heads_of(attn.to_q, attn.norm_q, x, attn.heads, rotary)
        k = heads_of(attn.to_k, attn.norm_k, read, attn.heads, rotary)
        y = self._attend(q, k, attn.to_v(read).unflatten(2, (attn.heads, -1)), attention_mask)
        if picture is not None:
            k = heads_of(attn.add_k_proj, attn.norm_added_k, picture, attn.heads)
            y = y + self._attend(q, k, attn.add_v_proj(picture).unflatten(2, (attn.heads, -1)), None)
        return attn.to_out[1](attn.to_out[0](y))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        y = dispatch_attention_fn(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=0.0,
            is_causal=False,
            backend=self._attention_backend,
            parallel_config=None,
        )
        return y.flatten(2, 3).type_as(q)


def _takes(attn: Any, x: Tensor, text: Tensor | None, rotary: Rotary | None) -> bool:
    """Whether fused heads are this attention's."""
    norms = [attn.norm_q, attn.norm_k]
    if attn.add_k_proj is not None and text is not None:
        norms.append(attn.norm_added_k)
    if getattr(attn, "fused_projections", False) or not fused.usable(x, x if text is None else text):
        return False
    shape = (1, x.shape[1], 1, attn.inner_dim // attn.heads)
    fits = rotary is None or (text is None and rotary[0].shape == rotary[1].shape == shape)
    return fits and all(across_heads.normalizes(norm, x) for norm in norms)


class WanTransformerBlock(transformer_wan.WanTransformerBlock):
    @wraps(transformer_wan.WanTransformerBlock.forward)
    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: Rotary) -> Tensor:
        x = hidden_states
        norms = [self.norm1, self.norm3]
        if not fused.usable(x) or not all(unseen(n, FP32LayerNorm) and n.takes(x) for n in norms):
            return super().forward(x, encoder_hidden_states, temb, rotary_emb)
        # The timestep may be every token's own.
        each = sums(self.scale_shift_table[0], temb if temb.dim() == 4 else temb[:, None])
        shift, scale, gate, ff_shift, ff_scale, ff_gate = each
        x = gate_add(x, gate, self.attn1(self.norm1(x, scale=scale, shift=shift), None, None, rotary_emb))
        x = x + self.attn2(self.norm2(x), encoder_hidden_states, None, None)
        return gate_add(x, ff_gate, self.ffn(self.norm3(x, scale=ff_scale, shift=ff_shift)), into_residual=True)


FUSED = (WanAttnProcessor, WanTransformerBlock)
