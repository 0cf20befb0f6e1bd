"""Z-Image's blocks, feed-forward and default attention processor."""

from __future__ import annotations

from functools import wraps
from typing import Any

from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers import transformer_z_image
from torch import Tensor

from ...kernels import fused
from .blocks import gated_by_products, swiglu
from .heads import Stream, joint_heads, rotary_of, through
from .modules import own
from .rms_norm import scaled


class FeedForward(transformer_z_image.FeedForward):
    @wraps(transformer_z_image.FeedForward.forward)
    def forward(self, x: Tensor) -> Tensor:
        if not fused.usable(x):
            return super().forward(x)
        y = gated_by_products(self.w1, self.w3, self.w2, x)
        if y is None:
            y = self.w2(swiglu(own(self.w1, x), self.w3(x)))
        return y


class ZSingleStreamAttnProcessor(transformer_z_image.ZSingleStreamAttnProcessor):
    """Tokens are projected, normalized and rotated in the place where attention reads them."""

    @wraps(transformer_z_image.ZSingleStreamAttnProcessor.__call__)
    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Tensor | None = None,
    ) -> Tensor:
        x, mask = hidden_states, attention_mask
        heads = None if self._parallel_config is not None else _heads(attn, x, freqs_cis)
        if heads is None:
            return super().__call__(attn, x, encoder_hidden_states, mask, freqs_cis)
        if mask is not None and mask.dim() == 2:
            mask = mask[:, None, None]
        y = dispatch_attention_fn(
            *heads,
            attn_mask=mask,
            dropout_p=0.0,
            is_causal=False,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        return through(attn.to_out, y.flatten(2, 3).to(x.dtype))


def _heads(attn: Any, x: Tensor, rotations: Tensor | None) -> tuple[Tensor, Tensor, Tensor] | None:
    """`joint_heads`; None where diffusers has to make them. rotations: complex [B or 1, L, D/2]."""
    if attn.fused_projections or attn.inner_dim != attn.inner_kv_dim or attn.inner_dim % attn.heads:
        return None
    head_dim, rotary = attn.inner_dim // attn.heads, None
    if rotations is not None:
        fits = rotations.dim() == 3 and rotations.shape[0] in (1, x.shape[0])
        if not fits or not rotations.is_complex() or rotations.shape[1:] != (x.shape[1], head_dim // 2):
            return None
        rotary = rotary_of(rotations)
    layers, norms = (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k)
    return joint_heads([Stream(x, layers, norms, rotary)], attn.inner_dim, head_dim)


class ZImageTransformerBlock(transformer_z_image.ZImageTransformerBlock):
    @wraps(transformer_z_image.ZImageTransformerBlock.forward)
    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor,
        freqs_cis: Tensor,
        adaln_input: Tensor | None = None,
        noise_mask: Tensor | None = None,
        adaln_noisy: Tensor | None = None,
        adaln_clean: Tensor | None = None,
    ) -> Tensor:
        modulated = self.modulation and adaln_input is not None
        inputs = (x, adaln_input) if modulated else (x,)
        whole = noise_mask is None and modulated == self.modulation
        if not whole or not fused.usable(*inputs):  # type: ignore[arg-type]
            return super().forward(x, attn_mask, freqs_cis, adaln_input, noise_mask, adaln_noisy, adaln_clean)
        scale = gate = scale_mlp = gate_mlp = None
        if modulated:
            scale, gate, scale_mlp, gate_mlp = self.adaLN_modulation(adaln_input).chunk(4, dim=1)
            scale, scale_mlp = 1 + scale.float(), 1 + scale_mlp.float()
            gate, gate_mlp = gate.tanh(), gate_mlp.tanh()
        y = self.attention(scaled(self.attention_norm1, x, scale), attention_mask=attn_mask, freqs_cis=freqs_cis)
        residual = _add(x, gate, scaled(self.attention_norm2, y, None))
        y = self.feed_forward(scaled(self.ffn_norm1, residual, scale_mlp))
        return _add(residual, gate_mlp, scaled(self.ffn_norm2, y, None), out=residual)


def _add(residual: Tensor, gate: Tensor | None, y: Tensor, out: Tensor | None = None) -> Tensor:
    """residual + gate·y, or residual + y."""
    if gate is not None:
        return fused.gate_add(residual, gate, y, out=out)
    return residual + y if out is None else out.copy_(residual + y)


FUSED = (FeedForward, ZSingleStreamAttnProcessor, ZImageTransformerBlock)
