"""FLUX.2's blocks, feed-forward and default attention processors."""

from __future__ import annotations

from functools import wraps
from itertools import pairwise
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers import transformer_flux2
from torch import Tensor

from ...kernels import fused
from ...nn import SVDQuantLinear
from .blocks import after_attention, gated_by_products, swiglu
from .flux import attention
from .heads import Rotary, answers, head_norm, outputs, turn
from .inputs import Normalized, Rows, computed, on_gpu, project, source
from .modules import normalized, own, untouched
from .rms_norm import rotates


class Flux2FeedForward(transformer_flux2.Flux2FeedForward):
    @wraps(transformer_flux2.Flux2FeedForward.forward)
    def forward(self, x: Tensor) -> Tensor:
        if not fused.usable(x) or not untouched(self.act_fn, transformer_flux2.Flux2SwiGLU):
            return super().forward(x)
        gate, up = own(self.linear_in, x).chunk(2, dim=-1)
        y: Tensor = self.linear_out(swiglu(gate, up))
        return y


def _feed_forward(ff: Any, x: Tensor | Normalized) -> Tensor:
    """ff(x), its first product reading x before it is normalized, and its second before it is activated, on a GPU."""
    y = None
    plain = isinstance(x, Normalized) and untouched(ff, Flux2FeedForward)
    if plain and untouched(ff.act_fn, transformer_flux2.Flux2SwiGLU) and type(ff.linear_in) is SVDQuantLinear:
        whole = ff.linear_in.out_features
        halves = Rows(ff.linear_in, 0, whole // 2), Rows(ff.linear_in, whole // 2, whole)
        y = gated_by_products(*halves, ff.linear_out, x)
    if y is None:
        y = ff(computed(x))
    assert isinstance(y, Tensor)
    return y


class Flux2AttnProcessor(transformer_flux2.Flux2AttnProcessor):
    """Text and image tokens are projected, normalized and rotated in the place where attention reads them."""

    @wraps(transformer_flux2.Flux2AttnProcessor.__call__)
    def __call__(
        self,
        attn: Any,
        hidden_states: Any,
        encoder_hidden_states: Any = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> Any:
        x, text = hidden_states, encoder_hidden_states
        y = attention(self, attn, x, text, attention_mask, image_rotary_emb)
        if y is None:
            text = None if text is None else computed(text)
            return super().__call__(attn, computed(x), text, attention_mask, image_rotary_emb)
        return outputs(attn, y, x, text)


class Flux2ParallelSelfAttnProcessor(transformer_flux2.Flux2ParallelSelfAttnProcessor):
    """Heads are normed and rotated where the first layer has left them; attention and MLP meet where the last reads."""

    @wraps(transformer_flux2.Flux2ParallelSelfAttnProcessor.__call__)
    def __call__(
        self,
        attn: Any,
        hidden_states: Any,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> Tensor:
        x = hidden_states
        if self._parallel_config is not None or not _takes(attn, source(x)):
            return super().__call__(attn, computed(x), attention_mask, image_rotary_emb)
        projected = _stacked(attn, x, image_rotary_emb)
        turned = projected is not None
        if projected is None:
            projected = own(attn.to_qkv_mlp_proj, computed(x))
        width = attn.inner_dim
        heads, mlp = projected[..., : 3 * width], projected[..., 3 * width :]
        q, k, v = heads.unflatten(-1, (3, -1, attn.head_dim)).unbind(2)
        if not turned:
            turn(attn.norm_q, q, image_rotary_emb, q)
            turn(attn.norm_k, k, image_rotary_emb, k)
        y = dispatch_attention_fn(
            q,
            k,
            v,
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        y = y.flatten(2, 3).to(q.dtype)
        gate, up = mlp.chunk(2, dim=-1)
        if on_gpu(y):
            mlp = swiglu(gate, up)
            out = project((attn.to_out,), y, second=mlp)
            return attn.to_out(torch.cat([y, mlp], dim=-1)) if out is None else out
        joined = y.new_empty(*y.shape[:-1], width + attn.mlp_hidden_dim)
        joined[..., :width] = y
        swiglu(gate, up, out=joined[..., width:])
        out = attn.to_out(joined)
        assert isinstance(out, Tensor)
        return out


def _takes(attn: Any, x: Tensor) -> bool:
    """Whether the parallel attention is as published, and nobody looks at what it makes on the way."""
    if attn.mlp_mult_factor != 2 or not untouched(attn.mlp_act_fn, transformer_flux2.Flux2SwiGLU):
        return False
    heads = x[..., : attn.head_dim]
    return fused.usable(x) and x.dim() == 3 and all(rotates(norm, heads) for norm in (attn.norm_q, attn.norm_k))


def _stacked(attn: Any, x: Tensor | Normalized, rotary: Rotary | None) -> Tensor | None:
    """The first layer by one product that norms and rotates heads; None where it has to be called."""
    like, width = source(x), attn.inner_dim
    norm = head_norm((attn.norm_q, attn.norm_k), attn.head_dim, rotary, like) if on_gpu(like) else None
    if norm is None:
        return None
    layer = attn.to_qkv_mlp_proj
    edges = 0, width, 2 * width, 3 * width + 2 * attn.mlp_hidden_dim
    return project([Rows(layer, *ends) for ends in pairwise(edges)], x, norm=norm)


def _modulation(mod: Tensor, sets: int) -> tuple[Tensor, ...] | None:
    """shift, scale and gate [B or 1, K] of each set; None where tokens differ."""
    if mod.dim() == 3:
        if mod.shape[1] != 1:
            return None
        mod = mod[:, 0]
    return mod.chunk(3 * sets, dim=-1)


class Flux2TransformerBlock(transformer_flux2.Flux2TransformerBlock):
    @wraps(transformer_flux2.Flux2TransformerBlock.forward)
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb_mod_img: Tensor,
        temb_mod_txt: Tensor,
        image_rotary_emb: Rotary | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        image_modulation, text_modulation = _modulation(temb_mod_img, 2), _modulation(temb_mod_txt, 2)
        known = image_modulation is not None and text_modulation is not None
        if not known or not fused.usable(hidden_states, encoder_hidden_states, temb_mod_img, temb_mod_txt):
            return super().forward(
                hidden_states,
                encoder_hidden_states,
                temb_mod_img,
                temb_mod_txt,
                image_rotary_emb,
                joint_attention_kwargs,
            )
        assert image_modulation is not None and text_modulation is not None
        shift, scale, *image_rest = image_modulation
        image = normalized(self.norm1, hidden_states, scale, shift)
        shift, scale, *text_rest = text_modulation
        text = normalized(self.norm1_context, encoder_hidden_states, scale, shift)
        options = joint_attention_kwargs or {}
        if not options and answers(self.attn, transformer_flux2.Flux2Attention, Flux2AttnProcessor):
            image, text = self.attn.processor(self.attn, image, text, None, image_rotary_emb)
        else:
            image, text = self.attn(
                hidden_states=computed(image),
                encoder_hidden_states=computed(text),
                image_rotary_emb=image_rotary_emb,
                **options,
            )
        hidden_states = after_attention(hidden_states, image, image_rest, self.norm2, self.ff, _feed_forward)
        return (
            after_attention(encoder_hidden_states, text, text_rest, self.norm2_context, self.ff_context, _feed_forward),
            hidden_states,
        )


class Flux2SingleTransformerBlock(transformer_flux2.Flux2SingleTransformerBlock):
    @wraps(transformer_flux2.Flux2SingleTransformerBlock.forward)
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        temb_mod: Tensor,
        image_rotary_emb: Rotary | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        split_hidden_states: bool = False,
        text_seq_len: int | None = None,
    ) -> Any:
        modulation = _modulation(temb_mod, 1)
        streams = [hidden_states] if encoder_hidden_states is None else [encoder_hidden_states, hidden_states]
        if modulation is None or not fused.usable(*streams, temb_mod):
            return super().forward(
                hidden_states,
                encoder_hidden_states,
                temb_mod,
                image_rotary_emb,
                joint_attention_kwargs,
                split_hidden_states,
                text_seq_len,
            )
        residual = hidden_states
        if encoder_hidden_states is not None:
            text_seq_len = encoder_hidden_states.shape[1]
            residual = torch.cat(streams, dim=1)
        shift, scale, gate = modulation
        x = normalized(self.norm, residual, scale, shift)
        options = joint_attention_kwargs or {}
        if not options and answers(
            self.attn, transformer_flux2.Flux2ParallelSelfAttention, Flux2ParallelSelfAttnProcessor
        ):
            y = self.attn.processor(self.attn, x, None, image_rotary_emb)
        else:
            y = self.attn(hidden_states=computed(x), image_rotary_emb=image_rotary_emb, **options)
        y = fused.gate_add(residual, gate, y, out=None if residual is hidden_states else residual)
        return (y[:, :text_seq_len], y[:, text_seq_len:]) if split_hidden_states else y


FUSED = (
    Flux2FeedForward,
    Flux2AttnProcessor,
    Flux2ParallelSelfAttnProcessor,
    Flux2TransformerBlock,
    Flux2SingleTransformerBlock,
)
