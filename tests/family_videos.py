"""Miniature pipelines that draw videos, with random weights; `family_pipelines` lists them with those of pictures."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import tiny
from diffusers import (
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder
from diffusers.pipelines.wan import pipeline_wan_i2v
from standin_parts import LATENT_CHANNELS, gemma_tokenizer, lively, qwen_tokenizer
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlamaModel,
    UMT5Config,
    UMT5EncoderModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

TEXT = 32
WAN_CHANNELS = 16

# That pipeline repairs prompts with a package which it does not check for.
vars(pipeline_wan_i2v).setdefault("ftfy", SimpleNamespace(fix_text=lambda text: text))


def _wan_transformer(seed: int, in_channels: int = WAN_CHANNELS, **fields: Any) -> WanTransformer3DModel:
    with tiny._seeded(seed):
        return lively(
            WanTransformer3DModel(
                num_attention_heads=2,
                attention_head_dim=64,
                in_channels=in_channels,
                out_channels=WAN_CHANNELS,
                text_dim=TEXT,
                freq_dim=64,
                ffn_dim=256,
                num_layers=2,
                rope_max_seq_len=32,
                **fields,
            )
        )


def _wan_parts() -> dict[str, Any]:
    with tiny._seeded(20):
        vae = AutoencoderKLWan(
            base_dim=4,
            z_dim=WAN_CHANNELS,
            dim_mult=[1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[True, True],
            scale_factor_temporal=4,
            scale_factor_spatial=4,
        ).eval()
        text_encoder = UMT5EncoderModel(
            UMT5Config(vocab_size=128, d_model=TEXT, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
        ).eval()
    return {
        "tokenizer": tiny.t5_tokenizer(),
        "text_encoder": text_encoder,
        "vae": vae,
        "scheduler": UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
        ),
    }


def wan() -> WanPipeline:
    """Wan 2.1, text to video."""
    return tiny.quiet(WanPipeline(**_wan_parts(), transformer=_wan_transformer(21)))


def wan22() -> WanPipeline:
    """Wan 2.2: one transformer for the noisy steps, another for the rest."""
    models = {"transformer": _wan_transformer(21), "transformer_2": _wan_transformer(22)}
    return tiny.quiet(WanPipeline(**_wan_parts(), **models, boundary_ratio=0.875))


def wan_i2v() -> WanImageToVideoPipeline:
    """Wan 2.1, picture to video: keys and values of the picture next to those of the text."""
    with tiny._seeded(23):
        image_encoder = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=TEXT,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=32,
                patch_size=8,
            )
        ).eval()
    # Noise, the mask of the known frames, and the known frames.
    transformer = _wan_transformer(24, 2 * WAN_CHANNELS + 4, image_dim=TEXT, added_kv_proj_dim=128)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return tiny.quiet(
        WanImageToVideoPipeline(
            **_wan_parts(), transformer=transformer, image_encoder=image_encoder, image_processor=processor
        )
    )


def ltx() -> LTXPipeline:
    with tiny._seeded(25):
        transformer = lively(
            LTXVideoTransformer3DModel(
                in_channels=LATENT_CHANNELS,
                out_channels=LATENT_CHANNELS,
                num_attention_heads=2,
                attention_head_dim=64,
                cross_attention_dim=128,
                num_layers=2,
                caption_channels=TEXT,
            )
        )
        vae = AutoencoderKLLTXVideo(
            latent_channels=LATENT_CHANNELS,
            block_out_channels=(8, 8),
            down_block_types=("LTXVideoDownBlock3D",) * 2,
            decoder_block_out_channels=(8, 8),
            layers_per_block=(1, 1, 1),
            decoder_layers_per_block=(1, 1, 1),
            spatio_temporal_scaling=(True, False),
            decoder_spatio_temporal_scaling=(True, False),
            decoder_inject_noise=(False, False, False),
            downsample_type=("conv", "conv"),
            upsample_residual=(False, False),
            upsample_factor=(1, 1),
            patch_size=4,
        ).eval()
    return tiny.quiet(
        LTXPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=vae,
            text_encoder=tiny.t5(width=TEXT),
            tokenizer=tiny.t5_tokenizer(),
            transformer=transformer,
        )
    )


def ltx2() -> LTX2Pipeline:
    """Video and sound."""
    tokenizer = gemma_tokenizer()
    layers = 2
    with tiny._seeded(26):
        transformer = lively(
            LTX2VideoTransformer3DModel(
                in_channels=LATENT_CHANNELS,
                out_channels=LATENT_CHANNELS,
                num_attention_heads=2,
                attention_head_dim=64,
                cross_attention_dim=128,
                audio_in_channels=4,
                audio_out_channels=4,
                audio_num_attention_heads=2,
                audio_attention_head_dim=32,
                audio_cross_attention_dim=64,
                num_layers=layers,
                caption_channels=TEXT,
                rope_double_precision=False,
            )
        )
        connectors = LTX2TextConnectors(
            caption_channels=TEXT,
            text_proj_in_factor=layers + 1,
            video_connector_num_attention_heads=4,
            video_connector_attention_head_dim=8,
            video_connector_num_layers=1,
            video_connector_num_learnable_registers=None,
            audio_connector_num_attention_heads=4,
            audio_connector_attention_head_dim=8,
            audio_connector_num_layers=1,
            audio_connector_num_learnable_registers=None,
            connector_rope_base_seq_len=32,
            rope_double_precision=False,
        ).eval()
        text_encoder = Gemma3ForConditionalGeneration(
            Gemma3Config(
                text_config={
                    "vocab_size": 256,
                    "hidden_size": TEXT,
                    "intermediate_size": 64,
                    "num_hidden_layers": layers,
                    "num_attention_heads": 2,
                    "num_key_value_heads": 2,
                    "head_dim": 16,
                },
                vision_config={
                    "hidden_size": TEXT,
                    "intermediate_size": 64,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                    "image_size": 16,
                    "patch_size": 8,
                },
            )
        ).eval()
        vae = AutoencoderKLLTX2Video(
            latent_channels=LATENT_CHANNELS,
            block_out_channels=(8,),
            down_block_types=("LTX2VideoDownBlock3D",),
            decoder_block_out_channels=(8,),
            layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            spatio_temporal_scaling=(True,),
            decoder_spatio_temporal_scaling=(True,),
            decoder_inject_noise=(False, False),
            downsample_type=("spatiotemporal",),
            upsample_type=("spatiotemporal",),
            upsample_residual=(False,),
            upsample_factor=(1,),
            patch_size=4,
        ).eval()
        audio_vae = AutoencoderKLLTX2Audio(
            base_channels=4, ch_mult=(1,), num_res_blocks=1, resolution=32, latent_channels=2, mel_bins=8
        ).eval()
        vocoder = LTX2Vocoder(
            in_channels=16,
            hidden_channels=8,
            upsample_kernel_sizes=[4, 4],
            upsample_factors=[2, 2],
            resnet_kernel_sizes=[3],
            resnet_dilations=[[1, 3, 5]],
            output_sampling_rate=16000,
        ).eval()
    return tiny.quiet(
        LTX2Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=vae,
            audio_vae=audio_vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            connectors=connectors,
            transformer=transformer,
            vocoder=vocoder,
        )
    )


def hunyuan_video() -> HunyuanVideoPipeline:
    tokenizer = qwen_tokenizer()
    with tiny._seeded(27):
        transformer = lively(
            HunyuanVideoTransformer3DModel(
                in_channels=LATENT_CHANNELS,
                out_channels=LATENT_CHANNELS,
                num_attention_heads=2,
                attention_head_dim=64,
                num_layers=1,
                num_single_layers=1,
                num_refiner_layers=1,
                text_embed_dim=TEXT,
                pooled_projection_dim=32,
                rope_axes_dim=(8, 28, 28),
            )
        )
        vae = AutoencoderKLHunyuanVideo(
            latent_channels=LATENT_CHANNELS,
            down_block_types=("HunyuanVideoDownBlock3D",) * 3,
            up_block_types=("HunyuanVideoUpBlock3D",) * 3,
            block_out_channels=(8, 8, 8),
            layers_per_block=1,
            norm_num_groups=4,
            spatial_compression_ratio=2,
        ).eval()
        text_encoder = LlamaModel(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=TEXT,
                intermediate_size=64,
                num_hidden_layers=3,
                num_attention_heads=2,
                num_key_value_heads=2,
            )
        ).eval()
    return tiny.quiet(
        HunyuanVideoPipeline(
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            transformer=transformer,
            vae=vae,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
            text_encoder_2=tiny.clip(),
            tokenizer_2=tiny.clip_tokenizer(),
        )
    )
