"""One miniature pipeline, with random weights, for every kind of published checkpoint: no download, seconds to draw.

They are of the same classes as the real ones and of the same proportions (a Fill transformer reads latents, masked
picture and mask), so that scripts written for the real ones run on them. The widths of the denoisers' linears suit the
packed formats: multiples of 128, but for `sana(odd=True)`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxControlPipeline,
    FluxFillPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    FluxPriorReduxPipeline,
    FluxTransformer2DModel,
    QwenImageEditPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from PIL import Image
from standin_parts import LATENT_CHANNELS, flux_vae, gemma_tokenizer, lively, qwen_tokenizer, sana_vae
from transformers import (
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3Model,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5EncoderModel,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

import svdquant
from svdquant.integrations import attach
from svdquant.nn import make_layer, replace_module
from svdquant.ptq.requantize import weights_only

T5_WIDTH = 128


def flux_transformer(
    in_channels: int = 16, guidance: bool = False, text_widths: tuple[int, int] = (T5_WIDTH, 32), seed: int = 0
) -> FluxTransformer2DModel:
    """Two joint and two single blocks of 128 channels. text_widths: of T5's and of CLIP's embeddings."""
    with tiny._seeded(seed):
        return lively(
            FluxTransformer2DModel(
                patch_size=1,
                in_channels=in_channels,
                out_channels=4 * LATENT_CHANNELS,
                num_layers=2,
                num_single_layers=2,
                attention_head_dim=64,
                num_attention_heads=2,
                joint_attention_dim=text_widths[0],
                pooled_projection_dim=text_widths[1],
                guidance_embeds=guidance,
                axes_dims_rope=(8, 28, 28),
            )
        )


def t5(seed: int = 2) -> T5EncoderModel:
    """A T5 whose linears are 128 or 256 wide."""
    return tiny.t5(seed, T5_WIDTH)


def _flux(cls: Any, transformer: FluxTransformer2DModel) -> Any:
    components = tiny.flux_components(transformer=transformer, text_encoder_2=t5(), vae=flux_vae())
    return tiny.quiet(cls(**components))


def flux(guidance: bool = False) -> FluxPipeline:
    """Text to picture; guidance: as FLUX.1-dev has it, without as FLUX.1-schnell."""
    return _flux(FluxPipeline, flux_transformer(guidance=guidance))


def flux_fill() -> FluxFillPipeline:
    """Its transformer reads noise (16 channels), the masked picture (16) and the mask (4 pixels × 4)."""
    return _flux(FluxFillPipeline, flux_transformer(in_channels=48, guidance=True))


def flux_control() -> FluxControlPipeline:
    """Its transformer reads noise (16 channels) and the control picture (16); depth and canny are alike."""
    return _flux(FluxControlPipeline, flux_transformer(in_channels=32, guidance=True))


def flux_kontext() -> FluxKontextPipeline:
    return _flux(FluxKontextPipeline, flux_transformer(guidance=True))


def flux_wide() -> FluxPipeline:
    """For embeddings as wide as the published ones; it has no text encoders of its own."""
    transformer = flux_transformer(guidance=True, text_widths=(4096, 768))
    text = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return tiny.quiet(FluxPipeline(**tiny.flux_components(transformer=transformer, vae=flux_vae()) | text))


def flux_redux(text_width: int = T5_WIDTH) -> FluxPriorReduxPipeline:
    """The prior alone: a picture becomes prompt embeddings. It has no text encoders, as published.

    text_width: without text encoders the prior makes embeddings of the published 4096 channels and needs this to be as
    wide; with the stand-ins' T5 it is 128.
    """
    with tiny._seeded(4):
        encoder = SiglipVisionModel(
            SiglipVisionConfig(
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=32,
                patch_size=8,
            )
        ).eval()
        embedder = ReduxImageEncoder(redux_dim=32, txt_in_features=text_width).eval()
    processor = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    return FluxPriorReduxPipeline(image_encoder=encoder, feature_extractor=processor, image_embedder=embedder)


def sana(odd: bool = False) -> SanaPipeline:
    """odd: 160 channels instead of 128, which no packed format holds without padding."""
    heads = 5 if odd else 4
    with tiny._seeded(5):
        transformer = SanaTransformer2DModel(
            patch_size=1,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            num_layers=2,
            num_attention_heads=heads,
            attention_head_dim=32,
            num_cross_attention_heads=2,
            cross_attention_head_dim=16 * heads,
            cross_attention_dim=32 * heads,
            caption_channels=32,
            mlp_ratio=2.5 if odd else 2.0,
            sample_size=32,
        ).eval()
        text_encoder = Gemma2Model(
            Gemma2Config(
                head_dim=16,
                hidden_size=32,
                intermediate_size=64,
                num_attention_heads=2,
                num_hidden_layers=1,
                num_key_value_heads=2,
                vocab_size=256,
                attn_implementation="eager",
            )
        ).eval()
    return tiny.quiet(
        SanaPipeline(
            tokenizer=gemma_tokenizer(),
            text_encoder=text_encoder,
            vae=sana_vae(),
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        )
    )


def sdxl() -> StableDiffusionXLPipeline:
    """Three resolutions, the lower two (128 and 256 channels) with attention, as the real one has."""
    text_encoder = tiny.clip()
    with tiny._seeded(6):
        text_encoder_2 = CLIPTextModelWithProjection(text_encoder.config).eval()
        unet = UNet2DConditionModel(
            block_out_channels=(64, 128, 256),
            layers_per_block=1,
            sample_size=32,
            in_channels=4,
            out_channels=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(1, 2, 4),
            transformer_layers_per_block=1,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=80,
            cross_attention_dim=64,
        ).eval()
        vae = AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["UpDecoderBlock2D"] * 2,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=128,
        ).eval()
    return tiny.quiet(
        StableDiffusionXLPipeline(
            vae=vae,
            text_encoder=text_encoder,
            text_encoder_2=text_encoder_2,
            tokenizer=tiny.clip_tokenizer(),
            tokenizer_2=tiny.clip_tokenizer(),
            unet=unet,
            scheduler=EulerDiscreteScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
            ),
            add_watermarker=False,
        )
    )


def _qwen_image_parts() -> dict[str, Any]:
    tokenizer = qwen_tokenizer()
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("vision_start", "vision_end", "image_pad")}
    with tiny._seeded(7):
        transformer = lively(
            QwenImageTransformer2DModel(
                patch_size=2,
                in_channels=4 * LATENT_CHANNELS,
                out_channels=LATENT_CHANNELS,
                num_layers=2,
                attention_head_dim=64,
                num_attention_heads=2,
                joint_attention_dim=32,
                axes_dims_rope=(8, 28, 28),
            )
        )
        vae = AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=LATENT_CHANNELS,
            dim_mult=[1, 1],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[0.0] * LATENT_CHANNELS,
            latents_std=[1.0] * LATENT_CHANNELS,
        ).eval()
        text_encoder = Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(
                text_config={
                    "vocab_size": len(tokenizer),
                    "bos_token_id": None,
                    "eos_token_id": None,
                    "hidden_size": 32,
                    "intermediate_size": 64,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "num_key_value_heads": 2,
                    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
                },
                vision_config={
                    "depth": 2,
                    "hidden_size": 32,
                    "intermediate_size": 64,
                    "num_heads": 2,
                    "out_hidden_size": 32,
                    "fullatt_block_indexes": [1],
                },
                image_token_id=ids["image_pad"],
                vision_start_token_id=ids["vision_start"],
                vision_end_token_id=ids["vision_end"],
            )
        ).eval()
    return {
        "transformer": transformer,
        "vae": vae,
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    }


def qwen_image() -> QwenImagePipeline:
    return tiny.quiet(QwenImagePipeline(**_qwen_image_parts()))


def qwen_image_edit() -> QwenImageEditPipeline:
    """Without the processor of pictures, which needs torchvision: load it, do not draw with it."""
    return tiny.quiet(QwenImageEditPipeline(**_qwen_image_parts(), processor=None))


def z_image() -> ZImagePipeline:
    """One layer, one refiner of the noise and one of the text, all of 384 channels."""
    tokenizer = qwen_tokenizer()
    with tiny._seeded(8):
        transformer = lively(
            ZImageTransformer2DModel(
                in_channels=LATENT_CHANNELS,
                dim=384,
                n_layers=1,
                n_refiner_layers=1,
                n_heads=6,
                n_kv_heads=6,
                cap_feat_dim=32,
                axes_dims=[16, 24, 24],
            )
        )
        for name in ("x_pad_token", "cap_pad_token"):
            torch.nn.init.normal_(getattr(transformer, name), std=0.02)
        text_encoder = Qwen3Model(
            Qwen3Config(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=2,
                head_dim=16,
            )
        ).eval()
    return tiny.quiet(
        ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=flux_vae(),
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            transformer=transformer,
        )
    )


PIPELINES: dict[str, Callable[[], Any]] = {
    "flux": flux,
    "flux_dev": lambda: flux(guidance=True),
    "flux_fill": flux_fill,
    "flux_control": flux_control,
    "flux_kontext": flux_kontext,
    "flux_redux": flux_redux,
    "flux_wide": flux_wide,
    "flux_redux_wide": lambda: flux_redux(text_width=4096),
    "sana": sana,
    "sana_odd": lambda: sana(odd=True),
    "sdxl": sdxl,
    "qwen_image": qwen_image,
    "qwen_image_edit": qwen_image_edit,
    "z_image": z_image,
}


def save(name: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Writes the pipeline of that name into `folder / name`, in 16 bits, and returns that folder."""
    pipeline = PIPELINES[name]()
    pipeline.to(dtype).save_pretrained(folder / name)
    return folder / name


def picture(seed: int = 0, side: int = 32) -> Image.Image:
    """A coloured one of smooth patches."""
    with tiny._seeded(seed):
        pixels = (torch.rand(4, 4, 3) * 255).to(torch.uint8).numpy()
    return Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)


def mask(side: int = 32) -> Image.Image:
    """White, to be painted, in the middle."""
    image = Image.new("L", (side, side))
    image.paste(255, (side // 4, side // 4, 3 * side // 4, 3 * side // 4))
    return image


def denoiser(pipeline: Any) -> Any:
    return pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer


def save_quantized(name: str, path: Path, format: str = "nunchaku", **kwargs: Any) -> Path:
    """Quantizes the denoiser of that stand-in without data and writes it as published checkpoints are stored."""
    model = denoiser(PIPELINES[name]()).to(torch.bfloat16)
    # What the published files of these two families keep in 16 bits.
    modulation = "none" if name in ("sdxl", "z_image") else "int4"
    skip = ["*.proj_in", "*.proj_out", "*.resnets.*", "*attn2.to_[kv]"] if name == "sdxl" else []
    svdquant.quantize(model, tiny.config(rotate=False, modulation=modulation, skip=skip, smooth=2))
    return svdquant.save_model(model, path, format=format, **kwargs)


def save_quantized_t5(path: Path) -> Path:
    """The stand-ins' T5 with W4A16 linears in groups of 128, in one file."""
    model = t5().to(torch.bfloat16)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear):
            record = weights_only(module.weight.detach().float(), None, 128, torch.bfloat16)
            replace_module(model, name, make_layer(module, record))
    attach(model, tiny.config(rotate=False))
    return svdquant.save_model(model, path, format="nunchaku")
