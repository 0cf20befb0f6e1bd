"""Miniature pipelines that draw pictures, with random weights, for the families that `standins` has not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import standins
import tiny
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
)
from standin_parts import LATENT_CHANNELS, lively, qwen_tokenizer
from torch import nn
from transformers import (
    CLIPTextModelWithProjection,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2VLProcessor,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.processing_utils import ProcessorMixin

TEXT = 32
# What FLUX.2-dev's own template leaves of a conversation, but for the system's message.
_MISTRAL_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}{% endfor %}"
)


def _flux2_transformer(seed: int, guidance: bool) -> Flux2Transformer2DModel:
    with tiny._seeded(seed):
        model = Flux2Transformer2DModel(
            in_channels=4 * LATENT_CHANNELS,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=64,
            num_attention_heads=2,
            joint_attention_dim=3 * TEXT,
            timestep_guidance_channels=64,
            axes_dims_rope=(16, 16, 16, 16),
            guidance_embeds=guidance,
        )
        # Gates of about 1; these linears have no bias to set.
        for name in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation"):
            nn.init.normal_(getattr(model, name).linear.weight, std=0.5)
    return model.eval()


def _flux2_vae() -> AutoencoderKLFlux2:
    with tiny._seeded(30):
        return AutoencoderKLFlux2(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            layers_per_block=1,
            latent_channels=LATENT_CHANNELS,
            norm_num_groups=4,
            sample_size=32,
        ).eval()


def flux2_dev() -> Flux2Pipeline:
    """Its published processor of texts and pictures needs torchvision; a tokenizer with the same calls stands in."""
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = _MISTRAL_TEMPLATE
    with tiny._seeded(31):
        text_encoder = Mistral3ForConditionalGeneration(
            Mistral3Config(
                text_config={
                    "model_type": "mistral",
                    "vocab_size": len(tokenizer),
                    "hidden_size": TEXT,
                    "intermediate_size": 64,
                    # The pipeline reads the states after 10, 20 and 30 layers.
                    "num_hidden_layers": 30,
                    "num_attention_heads": 2,
                    "num_key_value_heads": 2,
                    "head_dim": 16,
                },
                vision_config={
                    "model_type": "pixtral",
                    "hidden_size": TEXT,
                    "intermediate_size": 64,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                    "image_size": 16,
                    "patch_size": 8,
                },
            )
        ).eval()
    return tiny.quiet(
        Flux2Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=_flux2_vae(),
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            transformer=_flux2_transformer(32, guidance=True),
        )
    )


def flux2_klein() -> Flux2KleinPipeline:
    tokenizer = qwen_tokenizer()
    with tiny._seeded(33):
        text_encoder = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=len(tokenizer),
                hidden_size=TEXT,
                intermediate_size=64,
                # The pipeline reads the states after 9, 18 and 27 layers.
                num_hidden_layers=27,
                num_attention_heads=2,
                num_key_value_heads=2,
                head_dim=16,
            )
        ).eval()
    return tiny.quiet(
        Flux2KleinPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=_flux2_vae(),
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            transformer=_flux2_transformer(34, guidance=False),
            is_distilled=True,
        )
    )


def sd35(dual: bool = False) -> StableDiffusion3Pipeline:
    """dual: with a second attention over the picture in the first block, as SD3.5 medium has it in 13 of 24."""
    clip = tiny.clip().config
    with tiny._seeded(35):
        transformer = lively(
            SD3Transformer2DModel(
                sample_size=32,
                patch_size=2,
                in_channels=LATENT_CHANNELS,
                out_channels=LATENT_CHANNELS,
                num_layers=2,
                attention_head_dim=64,
                num_attention_heads=2,
                caption_projection_dim=128,
                # Both CLIPs side by side, and T5.
                joint_attention_dim=2 * TEXT,
                pooled_projection_dim=2 * TEXT,
                qk_norm="rms_norm",
                dual_attention_layers=(0,) if dual else (),
            )
        )
        encoders = {name: CLIPTextModelWithProjection(clip).eval() for name in ("text_encoder", "text_encoder_2")}
    return tiny.quiet(
        StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=standins.flux_vae(),
            **encoders,
            tokenizer=tiny.clip_tokenizer(),
            tokenizer_2=tiny.clip_tokenizer(),
            text_encoder_3=tiny.t5(width=2 * TEXT),
            tokenizer_3=tiny.t5_tokenizer(),
        )
    )


def pixart_sigma() -> PixArtSigmaPipeline:
    with tiny._seeded(36):
        transformer = lively(
            PixArtTransformer2DModel(
                sample_size=32,
                num_layers=2,
                attention_head_dim=64,
                num_attention_heads=2,
                cross_attention_dim=128,
                caption_channels=TEXT,
                in_channels=LATENT_CHANNELS,
                out_channels=2 * LATENT_CHANNELS,
            )
        )
        vae = AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["UpDecoderBlock2D"] * 2,
            block_out_channels=(8, 8),
            layers_per_block=1,
            latent_channels=LATENT_CHANNELS,
            norm_num_groups=4,
            sample_size=32,
        ).eval()
    return tiny.quiet(
        PixArtSigmaPipeline(
            tokenizer=tiny.t5_tokenizer(),
            text_encoder=tiny.t5(width=TEXT),
            vae=vae,
            transformer=transformer,
            scheduler=DPMSolverMultistepScheduler(),
        )
    )


def smaller(pipe: Any, seed: int, **fields: Any) -> Any:
    """With another denoiser of the same class, of which these fields of the configuration differ."""
    name, model = "unet" if hasattr(pipe, "unet") else "transformer", standins.denoiser(pipe)
    with tiny._seeded(seed):
        pipe.register_modules(**{name: lively(type(model).from_config(model.config, **fields))})
    return pipe


def flux(make: Callable[[], Any]) -> Any:
    """One block of each kind."""
    return smaller(make(), 37, num_layers=1, num_single_layers=1)


def sdxl(turbo: bool = False) -> StableDiffusionXLPipeline:
    """Two resolutions, the lower one with attention. turbo: one step and no guidance."""
    pipe = smaller(
        standins.sdxl(),
        38,
        block_out_channels=(64, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(1, 2),
    )
    if turbo:
        pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    return pipe


def z_image() -> Any:
    pipe = smaller(standins.z_image(), 39, dim=192, n_heads=3, n_kv_heads=3)
    for name in ("x_pad_token", "cap_pad_token"):
        nn.init.normal_(getattr(pipe.transformer, name), std=0.02, generator=torch.Generator().manual_seed(39))
    return pipe


class _PictureAndText(Qwen2VLProcessor):
    """Without its part for videos, which needs torchvision."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None) -> None:
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = (
            tokenizer.convert_tokens_to_ids(token) for token in (self.image_token, self.video_token)
        )
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def qwen_image_edit() -> Any:
    pipe = standins.qwen_image_edit()
    processor = _PictureAndText(Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=56 * 56), pipe.tokenizer)
    pipe.register_modules(processor=processor)
    return pipe
