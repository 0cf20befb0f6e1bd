"""HunyuanVideo's blocks and their attention."""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers import transformer_hunyuan_video
from torch import Tensor, nn

from ...kernels import fused
from .blocks import after_attention, joined, put_off
from .heads import Rotary, Stream, answers, joint_heads
from .inputs import Normalized, computed, on_gpu, source
from .modules import AdaLayerNormZero, AdaLayerNormZeroSingle, untouched


class HunyuanVideoAttnProcessor2_0(transformer_hunyuan_video.HunyuanVideoAttnProcessor2_0):
    """Image and text tokens, in this order, are projected, normalized and rotated where attention reads them."""

    @wraps(transformer_hunyuan_video.HunyuanVideoAttnProcessor2_0.__call__)
    def __call__(
        self,
        attn: Any,
        hidden_states: Any,
        encoder_hidden_states: Any = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> Any:
        x, text, rotary = hidden_states, encoder_hidden_states, image_rotary_emb
        y = None
        if text is not None:
            layers, norms = (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k)
            streams = [Stream(x, layers, norms, rotary)]
            if attn.add_q_proj is not None:
                layers = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj
                norms = attn.norm_added_q, attn.norm_added_k
            streams.append(Stream(text, layers, norms))
            y = self.attend(attn, streams, attention_mask)
        if y is None or text is None:
            text = None if text is None else computed(text)
            return super().__call__(attn, computed(x), text, attention_mask, rotary)
        parts = list(y.split_with_sizes([source(x).shape[1], source(text).shape[1]], dim=1))
        if not on_gpu(y):
            parts = [part.contiguous() for part in parts]
        if getattr(attn, "to_out", None) is not None:
            parts[0] = attn.to_out[1](attn.to_out[0](parts[0]))
        if getattr(attn, "to_add_out", None) is not None:
            parts[1] = attn.to_add_out(parts[1])
        return tuple(parts)

    def attend(self, attn: Any, streams: list[Stream], mask: Tensor | None) -> Tensor | None:
        """[B, ΣL, H·D] of all streams before the output layers; None where diffusers has to compute it."""
        head_dim = attn.inner_dim // attn.heads
        heads = None if self._parallel_config is not None else joint_heads(streams, attn.inner_dim, head_dim)
        if heads is None:
            return None
        y = dispatch_attention_fn(
            *heads,
            attn_mask=mask,
            dropout_p=0.0,
            is_causal=False,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        return y.flatten(2, 3).to(heads[0].dtype)


class HunyuanVideoTransformerBlock(transformer_hunyuan_video.HunyuanVideoTransformerBlock):
    @wraps(transformer_hunyuan_video.HunyuanVideoTransformerBlock.forward)
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        attention_mask: Tensor | None = None,
        freqs_cis: Rotary | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        x, text = hidden_states, encoder_hidden_states
        if not fused.usable(x, text, temb):
            return super().forward(x, text, temb, attention_mask, freqs_cis, *args, **kwargs)
        y, *modulation = put_off(self.norm1, AdaLayerNormZero, x, temb)
        z, *text_modulation = put_off(self.norm1_context, AdaLayerNormZero, text, temb)
        if answers(self.attn, Attention, HunyuanVideoAttnProcessor2_0):
            y, z = self.attn.processor(self.attn, y, z, attention_mask, freqs_cis)
        else:
            y, z = self.attn(
                hidden_states=computed(y),
                encoder_hidden_states=computed(z),
                attention_mask=attention_mask,
                image_rotary_emb=freqs_cis,
            )
        return (
            after_attention(x, y, modulation, self.norm2, self.ff),
            after_attention(text, z, text_modulation, self.norm2_context, self.ff_context),
        )


class HunyuanVideoSingleTransformerBlock(transformer_hunyuan_video.HunyuanVideoSingleTransformerBlock):
    """Attention and MLP meet in the place where `proj_out` reads them."""

    @wraps(transformer_hunyuan_video.HunyuanVideoSingleTransformerBlock.forward)
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        x, text = hidden_states, encoder_hidden_states
        gelu = untouched(self.act_mlp, nn.GELU) and self.act_mlp.approximate == "tanh"
        if not gelu or not fused.usable(x, text, temb):
            return super().forward(x, text, temb, attention_mask, image_rotary_emb, *args, **kwargs)
        tokens = [x.shape[1], text.shape[1]]
        residual = torch.cat([x, text], dim=1)
        y, gate = put_off(self.norm, AdaLayerNormZeroSingle, residual, temb)

        def attend(y: Tensor | Normalized) -> Tensor:
            return self._attend(y, tokens, attention_mask, image_rotary_emb)

        residual = fused.gate_add(residual, gate, joined(self, y, attend), out=residual)
        return residual[:, : tokens[0]], residual[:, tokens[0] :]

    def _attend(self, x: Tensor | Normalized, tokens: list[int], mask: Tensor | None, rotary: Rotary | None) -> Tensor:
        attn: Any = self.attn
        if answers(attn, Attention, HunyuanVideoAttnProcessor2_0) and attn.to_out is None and attn.to_add_out is None:
            table = None if rotary is None else _padded(rotary, tokens[1])
            stream = Stream(x, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k), table)
            y = attn.processor.attend(attn, [stream], mask)
            if y is not None:
                return y
        parts = computed(x).split_with_sizes(tokens, dim=1)
        return torch.cat(
            attn(hidden_states=parts[0], encoder_hidden_states=parts[1], attention_mask=mask, image_rotary_emb=rotary),
            dim=1,
        )


def _padded(rotary: Rotary, tokens: int) -> Rotary:
    """With tokens after the others that are not rotated."""
    cosine, sine = rotary
    return F.pad(cosine, (0, 0, 0, tokens), value=1.0), F.pad(sine, (0, 0, 0, tokens))


FUSED = (HunyuanVideoAttnProcessor2_0, HunyuanVideoTransformerBlock, HunyuanVideoSingleTransformerBlock)
