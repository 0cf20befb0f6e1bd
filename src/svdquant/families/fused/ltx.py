"""LTX-Video's blocks and attention, and LTX-2's."""

from __future__ import annotations

from functools import wraps
from typing import Any

from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers import transformer_ltx, transformer_ltx2
from torch import Tensor

from ...kernels import fused
from . import across_heads
from .across_heads import heads_of
from .heads import Rotary
from .modulation import gate_add, modulate, sums


class LTXVideoAttnProcessor(transformer_ltx.LTXVideoAttnProcessor):
    @wraps(transformer_ltx.LTXVideoAttnProcessor.__call__)
    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> Tensor:
        x, text, rotary = hidden_states, encoder_hidden_states, image_rotary_emb
        if self._parallel_config is not None or not _takes(attn, x, text, rotary, rotary):
            return super().__call__(attn, x, text, attention_mask, rotary)
        return attn.to_out[1](attn.to_out[0](_attend(self, attn, x, text, attention_mask, rotary, rotary)))


class LTX2AudioVideoAttnProcessor(transformer_ltx2.LTX2AudioVideoAttnProcessor):
    @wraps(transformer_ltx2.LTX2AudioVideoAttnProcessor.__call__)
    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        query_rotary_emb: Rotary | None = None,
        key_rotary_emb: Rotary | None = None,
    ) -> Tensor:
        x, read, mask = hidden_states, encoder_hidden_states, attention_mask
        q_rotary = query_rotary_emb
        # Without angles of the queries diffusers does not rotate the keys either.
        k_rotary = None if q_rotary is None else q_rotary if key_rotary_emb is None else key_rotary_emb
        rotaries = [q_rotary, k_rotary]
        known = attn.rope_type in ("interleaved", "split") and self._parallel_config is None
        if attn.rope_type == "split":
            known = known and all(table.dim() == 4 for rotary in rotaries for table in rotary or ())
            rotaries = [None, None]
        if not known or not _takes(attn, x, read, *rotaries):
            return super().__call__(attn, x, read, mask, query_rotary_emb, key_rotary_emb)
        gates = None if attn.to_gate_logits is None else 2 * attn.to_gate_logits(x).sigmoid()
        y = _attend(self, attn, x, read, mask, q_rotary, k_rotary)
        if gates is not None:
            y = (y.unflatten(2, (attn.heads, -1)) * gates[..., None]).flatten(2, 3)
        return attn.to_out[1](attn.to_out[0](y))


def _takes(attn: Any, x: Tensor, read: Tensor | None, q_rotary: Rotary | None, k_rotary: Rotary | None) -> bool:
    """Whether fused heads are this attention's."""
    read = x if read is None else read
    if not fused.usable(x, read) or not all(across_heads.normalizes(norm, x) for norm in (attn.norm_q, attn.norm_k)):
        return False
    return all(
        table.dim() == 3 and len(table) in (1, len(tokens)) and table.shape[1:] == (tokens.shape[1], width)
        for tokens, rotary, width in ((x, q_rotary, attn.inner_dim), (read, k_rotary, attn.inner_kv_dim))
        for table in rotary or ()
    )


def _attend(
    processor: Any,
    attn: Any,
    x: Tensor,
    read: Tensor | None,
    mask: Tensor | None,
    q_rotary: Rotary | None,
    k_rotary: Rotary | None,
) -> Tensor:
    """[B, L, H·D] before the output layer. x [B, L, K]; read: where keys and values come from, x where None."""
    read = x if read is None else read
    if mask is not None:
        mask = attn.prepare_attention_mask(mask, read.shape[1], len(read))
        mask = mask.view(len(read), attn.heads, -1, mask.shape[-1])
    q = _heads(attn, attn.to_q, attn.norm_q, x, q_rotary)
    k = _heads(attn, attn.to_k, attn.norm_k, read, k_rotary)
    y = dispatch_attention_fn(
        q,
        k,
        attn.to_v(read).unflatten(2, (attn.heads, -1)),
        attn_mask=mask,
        dropout_p=0.0,
        is_causal=False,
        backend=processor._attention_backend,
        parallel_config=processor._parallel_config,
    )
    return y.flatten(2, 3).to(q.dtype)


def _heads(attn: Any, layer: Any, norm: Any, x: Tensor, rotary: Rotary | None) -> Tensor:
    """`heads_of`, or where the halves of heads are what is rotated (tables [B, H, L, D/2]), that as diffusers does."""
    if rotary is None or rotary[0].dim() == 3:
        return heads_of(layer, norm, x, attn.heads, rotary)
    y = heads_of(layer, norm, x, attn.heads).flatten(2)
    return transformer_ltx2.apply_split_rotary_emb(y, rotary).unflatten(2, (attn.heads, -1))


class LTXVideoTransformerBlock(transformer_ltx.LTXVideoTransformerBlock):
    @wraps(transformer_ltx.LTXVideoTransformerBlock.forward)
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Rotary | None = None,
        encoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        x, table = hidden_states, self.scale_shift_table
        if table.dtype != x.dtype or not fused.usable(x, temb):
            return super().forward(x, encoder_hidden_states, temb, image_rotary_emb, encoder_attention_mask)
        modulation = _modulation(table, temb)
        shift, scale, gate = modulation[:3]
        y = modulate(self.norm1(x), scale, shift)
        x = gate_add(
            x, gate, self.attn1(hidden_states=y, encoder_hidden_states=None, image_rotary_emb=image_rotary_emb)
        )
        x = x + self.attn2(
            x,
            encoder_hidden_states=encoder_hidden_states,
            image_rotary_emb=None,
            attention_mask=encoder_attention_mask,
        )
        return _fed_forward(x, modulation, self.norm2, self.ff)


class LTX2VideoTransformerBlock(transformer_ltx2.LTX2VideoTransformerBlock):
    """Of LTX-2.0; the perturbed and further modulated blocks of later versions are diffusers' own."""

    @wraps(transformer_ltx2.LTX2VideoTransformerBlock.forward)
    def forward(
        self,
        hidden_states: Tensor,
        audio_hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        audio_encoder_hidden_states: Tensor,
        temb: Tensor,
        temb_audio: Tensor,
        temb_ca_scale_shift: Tensor,
        temb_ca_audio_scale_shift: Tensor,
        temb_ca_gate: Tensor,
        temb_ca_audio_gate: Tensor,
        temb_prompt: Tensor | None = None,
        temb_prompt_audio: Tensor | None = None,
        video_rotary_emb: Rotary | None = None,
        audio_rotary_emb: Rotary | None = None,
        ca_video_rotary_emb: Rotary | None = None,
        ca_audio_rotary_emb: Rotary | None = None,
        encoder_attention_mask: Tensor | None = None,
        audio_encoder_attention_mask: Tensor | None = None,
        self_attention_mask: Tensor | None = None,
        audio_self_attention_mask: Tensor | None = None,
        a2v_cross_attention_mask: Tensor | None = None,
        v2a_cross_attention_mask: Tensor | None = None,
        use_a2v_cross_attention: bool = True,
        use_v2a_cross_attention: bool = True,
        perturbation_mask: Tensor | None = None,
        all_perturbed: bool | None = None,
    ) -> tuple[Tensor, Tensor]:
        x, sound = hidden_states, audio_hidden_states
        embeddings = temb_ca_scale_shift, temb_ca_audio_scale_shift, temb_ca_gate, temb_ca_audio_gate
        tables = (
            self.scale_shift_table,
            self.audio_scale_shift_table,
            self.video_a2v_cross_attn_scale_shift_table,
            self.audio_a2v_cross_attn_scale_shift_table,
        )
        known = not self.perturbed_attn and not self.cross_attn_adaln and all(t.dtype == x.dtype for t in tables)
        if not known or not fused.usable(x, sound, temb, temb_audio, *embeddings):
            return super().forward(
                x,
                sound,
                encoder_hidden_states,
                audio_encoder_hidden_states,
                temb,
                temb_audio,
                *embeddings,
                temb_prompt,
                temb_prompt_audio,
                video_rotary_emb,
                audio_rotary_emb,
                ca_video_rotary_emb,
                ca_audio_rotary_emb,
                encoder_attention_mask,
                audio_encoder_attention_mask,
                self_attention_mask,
                audio_self_attention_mask,
                a2v_cross_attention_mask,
                v2a_cross_attention_mask,
                use_a2v_cross_attention,
                use_v2a_cross_attention,
                perturbation_mask,
                all_perturbed,
            )
        video, audio = _modulation(tables[0], temb), _modulation(tables[1], temb_audio)
        x = _attended(x, video, self.norm1, self.attn1, video_rotary_emb, self_attention_mask)
        sound = _attended(sound, audio, self.audio_norm1, self.audio_attn1, audio_rotary_emb, audio_self_attention_mask)
        x = x + self.attn2(
            self.norm2(x),
            encoder_hidden_states=encoder_hidden_states,
            query_rotary_emb=None,
            attention_mask=encoder_attention_mask,
        )
        sound = sound + self.audio_attn2(
            self.audio_norm2(sound),
            encoder_hidden_states=audio_encoder_hidden_states,
            query_rotary_emb=None,
            attention_mask=audio_encoder_attention_mask,
        )
        if use_a2v_cross_attention or use_v2a_cross_attention:
            # Both directions read what was there before either.
            seen, heard = self.audio_to_video_norm(x), self.video_to_audio_norm(sound)
            of_video = _modulation(tables[2][:4], temb_ca_scale_shift) + _modulation(tables[2][4:], temb_ca_gate)
            of_audio = _modulation(tables[3][:4], temb_ca_audio_scale_shift)
            of_audio += _modulation(tables[3][4:], temb_ca_audio_gate)
            if use_a2v_cross_attention:
                y = self.audio_to_video_attn(
                    modulate(seen, of_video[0], of_video[1]),
                    encoder_hidden_states=modulate(heard, of_audio[0], of_audio[1]),
                    query_rotary_emb=ca_video_rotary_emb,
                    key_rotary_emb=ca_audio_rotary_emb,
                    attention_mask=a2v_cross_attention_mask,
                )
                x = gate_add(x, of_video[4], y)
            if use_v2a_cross_attention:
                y = self.video_to_audio_attn(
                    modulate(heard, of_audio[2], of_audio[3]),
                    encoder_hidden_states=modulate(seen, of_video[2], of_video[3]),
                    query_rotary_emb=ca_audio_rotary_emb,
                    key_rotary_emb=ca_video_rotary_emb,
                    attention_mask=v2a_cross_attention_mask,
                )
                sound = gate_add(sound, of_audio[4], y)
        return (
            _fed_forward(x, video, self.norm3, self.ff),
            _fed_forward(sound, audio, self.audio_norm3, self.audio_ff),
        )


def _modulation(table: Tensor, temb: Tensor) -> list[Tensor]:
    """`sums` of a table [P, K] and embeddings [B, 1 or L, P·K]."""
    return sums(table, temb.unflatten(-1, (len(table), -1)))


def _attended(
    x: Tensor, modulation: list[Tensor], norm: Any, attn: Any, rotary: Rotary | None, mask: Tensor | None
) -> Tensor:
    """x and what its tokens make of each other. modulation: shift, scale, gate and three of the feed-forward."""
    shift, scale, gate = modulation[:3]
    y = attn(
        hidden_states=modulate(norm(x), scale, shift),
        encoder_hidden_states=None,
        query_rotary_emb=rotary,
        attention_mask=mask,
    )
    return gate_add(x, gate, y)


def _fed_forward(x: Tensor, modulation: list[Tensor], norm: Any, ff: Any) -> Tensor:
    shift, scale, gate = modulation[3:]
    return gate_add(x, gate, ff(modulate(norm(x), scale, shift)))


FUSED = (
    LTXVideoAttnProcessor,
    LTXVideoTransformerBlock,
    LTX2AudioVideoAttnProcessor,
    LTX2VideoTransformerBlock,
)
