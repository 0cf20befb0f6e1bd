"""Pipelines and models small enough for a CPU, built from configurations alone: no download, seconds to draw."""

from __future__ import annotations

import contextlib
import os
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from svdquant import SVDQuantConfig

RANK = 16


def config(**fields: Any) -> SVDQuantConfig:
    """Options that fit the tiny models' 128 channels."""
    return SVDQuantConfig(**({"rank": RANK} | fields))


def transformer(seed: int = 0, layers: int = 1, single_layers: int = 1, **fields: Any) -> FluxTransformer2DModel:
    """A FLUX of 128 channels."""
    with _seeded(seed):
        return FluxTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=layers,
            num_single_layers=single_layers,
            attention_head_dim=64,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=(8, 28, 28),
            **fields,
        ).eval()


def clip(seed: int = 1, hidden: int = 32, vocab: int = 514) -> CLIPTextModel:
    with _seeded(seed):
        return CLIPTextModel(
            CLIPTextConfig(
                bos_token_id=vocab - 2,
                eos_token_id=vocab - 1,
                pad_token_id=vocab - 1,
                hidden_size=hidden,
                intermediate_size=2 * hidden,
                num_attention_heads=4,
                num_hidden_layers=2,
                vocab_size=vocab,
                hidden_act="gelu",
                projection_dim=32,
            )
        ).eval()


def t5(seed: int = 2, width: int = 32) -> T5EncoderModel:
    with _seeded(seed):
        return T5EncoderModel(
            T5Config(
                vocab_size=128,
                d_model=width,
                d_kv=width // 4,
                d_ff=2 * width,
                num_layers=2,
                num_heads=4,
                feed_forward_proj="gated-gelu",
                is_encoder_decoder=False,
                use_cache=False,
            )
        ).eval()


def clip_tokenizer() -> CLIPTokenizer:
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77)


def t5_tokenizer() -> T5TokenizerFast:
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,!?'-"
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in letters)]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=512)


def vae(seed: int = 3) -> AutoencoderKL:
    with _seeded(seed):
        return AutoencoderKL(
            sample_size=32,
            in_channels=3,
            out_channels=3,
            block_out_channels=(4,),
            layers_per_block=1,
            latent_channels=1,
            norm_num_groups=1,
            use_quant_conv=False,
            use_post_quant_conv=False,
            shift_factor=0.0609,
            scaling_factor=1.5035,
        ).eval()


def flux_components(**models: Any) -> dict[str, Any]:
    """Everything a `FluxPipeline` takes; `models` replace components by name."""
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "text_encoder": clip(),
        "tokenizer": clip_tokenizer(),
        "text_encoder_2": t5(),
        "tokenizer_2": t5_tokenizer(),
        "transformer": None,
        "vae": vae(),
    } | ({"transformer": transformer()} | models)


def flux_pipeline(**models: Any) -> FluxPipeline:
    return quiet(FluxPipeline(**flux_components(**models)))


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: Any, prompt: Any = "a cat", height: int = 8, width: int = 8, **options: Any) -> np.ndarray:
    """Two steps from a fixed seed; images as floats [B, H, W, 3]."""
    options = {"num_inference_steps": 2, "max_sequence_length": 16, "guidance_scale": 1.0} | options
    generator = torch.Generator().manual_seed(0)
    return pipeline(prompt, height=height, width=width, generator=generator, output_type="np", **options).images


def inputs(model: FluxTransformer2DModel, side: int = 4, text: int = 8, batch: int = 1) -> dict[str, torch.Tensor]:
    """Random arguments of a FLUX transformer in its type: `side`² image tokens, `text` text tokens."""
    generator = torch.Generator().manual_seed(side * 100 + text * 10 + batch)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(model.dtype)

    image_ids = torch.zeros(side, side, 3)
    image_ids[..., 1] += torch.arange(side)[:, None]
    image_ids[..., 2] += torch.arange(side)[None]
    return {
        "hidden_states": random(batch, side * side, model.config.in_channels),
        "encoder_hidden_states": random(batch, text, model.config.joint_attention_dim),
        "pooled_projections": random(batch, model.config.pooled_projection_dim),
        "timestep": torch.full((batch,), 0.5, dtype=model.dtype),
        "img_ids": image_ids.flatten(0, 1),
        "txt_ids": torch.zeros(text, 3),
    }


@torch.no_grad()
def run(model: FluxTransformer2DModel, **shape: int) -> torch.Tensor:
    return model(**inputs(model, **shape), return_dict=False)[0]


def state_equal(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    """Same names, types and bits."""
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(
        t.dtype == right[name].dtype and torch.equal(t.view(torch.uint8), right[name].view(torch.uint8))
        for name, t in left.items()
        if t.dim()
    )


@contextlib.contextmanager
def _seeded(seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
