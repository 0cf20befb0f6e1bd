"""Miniatures of the text encoders of published pipelines, with random weights: the same classes, 128 channels wide."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tiny
import torch
import transformers

WIDTH = 128
VOCABULARY = 300


def _decoder(**fields: Any) -> dict[str, Any]:
    """Fields that the decoders share: two layers, grouped-query attention, gated feed-forward."""
    return {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 512,
        "attn_implementation": "eager",
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | fields


def _t5(name: str) -> Callable[[], Any]:
    def make() -> Any:
        return getattr(transformers, f"{name}Config")(
            vocab_size=VOCABULARY,
            d_model=WIDTH,
            d_kv=WIDTH // 4,
            d_ff=2 * WIDTH,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
            use_cache=False,
        )

    return make


def _clip() -> Any:
    return transformers.CLIPTextConfig(
        bos_token_id=VOCABULARY - 2,
        eos_token_id=VOCABULARY - 1,
        pad_token_id=VOCABULARY - 1,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_attention_heads=4,
        num_hidden_layers=2,
        vocab_size=VOCABULARY,
        hidden_act="gelu",
        projection_dim=WIDTH,
    )


def _qwen_vl() -> Any:
    text = _decoder(rope_parameters={"mrope_section": [4, 6, 6], "rope_type": "default", "rope_theta": 1e6})
    vision = {
        "depth": 2,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_heads": 4,
        "out_hidden_size": WIDTH,
        "fullatt_block_indexes": [1],
    }
    return transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=10, video_token_id=11, vision_start_token_id=12
    )


def _siglip() -> dict[str, Any]:
    return {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
    }


def _gemma3() -> Any:
    text = _decoder(sliding_window=64, query_pre_attn_scalar=32)
    return transformers.Gemma3Config(
        text_config=text, vision_config=_siglip(), mm_tokens_per_image=4, image_token_index=VOCABULARY - 1
    )


def _mistral3() -> Any:
    vision = {**_siglip(), "head_dim": 32, "model_type": "pixtral"}
    text = _decoder(model_type="mistral", sliding_window=None)
    return transformers.Mistral3Config(text_config=text, vision_config=vision, image_token_index=10)


# Class name → its configuration.
CONFIGS: dict[str, Callable[[], Any]] = {
    "T5EncoderModel": _t5("T5"),
    "UMT5EncoderModel": _t5("UMT5"),
    "CLIPTextModel": _clip,
    "CLIPTextModelWithProjection": _clip,
    "Gemma2Model": lambda: transformers.Gemma2Config(**_decoder(query_pre_attn_scalar=32)),
    "Gemma3ForConditionalGeneration": _gemma3,
    "Qwen2_5_VLForConditionalGeneration": _qwen_vl,
    "Qwen3ForCausalLM": lambda: transformers.Qwen3Config(**_decoder(tie_word_embeddings=True)),
    "Qwen3Model": lambda: transformers.Qwen3Config(**_decoder()),
    "Mistral3ForConditionalGeneration": _mistral3,
    "LlamaModel": lambda: transformers.LlamaConfig(**_decoder()),
}


def text_encoder(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A model of that class. Its embeddings lie near a plane of few dimensions, as trained ones do."""
    with tiny._seeded(seed):
        model = getattr(transformers, name)(CONFIGS[name]())
        embeddings = model.get_input_embeddings().weight
        near = torch.randn(len(embeddings), 8) @ torch.randn(8, WIDTH) / 8**0.5 + 0.2 * torch.randn_like(embeddings)
        embeddings.data = near * embeddings.std().detach()
        return model.to(dtype).eval()


def tokens(seed: int = 0, batch: int = 2, length: int = 16) -> torch.Tensor:
    """Random ids that mean nothing special to any of them; int64 [batch, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(20, VOCABULARY - 20, (batch, length), generator=generator)


@torch.no_grad()
def encode(model: Any, ids: torch.Tensor | None = None) -> torch.Tensor:
    """The last hidden state, which pipelines read."""
    return model(tokens() if ids is None else ids, output_hidden_states=True).hidden_states[-1]
