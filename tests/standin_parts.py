"""What the stand-ins are put together from, next to `tiny`: autoencoders, tokenizers, a depth estimator."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import tiny
import torch
from diffusers import AutoencoderDC, AutoencoderKL
from tokenizers.pre_tokenizers import ByteLevel
from transformers import DPTConfig, DPTForDepthEstimation, GemmaTokenizer, Qwen2Tokenizer
from transformers.models.dpt.image_processing_pil_dpt import DPTImageProcessorPil

# A FLUX transformer reads four times as many, two by two pixels at once.
LATENT_CHANNELS = 4

_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def lively(model: Any) -> Any:
    """Gates of about 1 in place of an initialisation's 0, so that what a block computes shows in the picture."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and re.search(r"norm\w*\.linear$|_mod\.1$|adaLN_modulation\.0$", name):
            torch.nn.init.normal_(module.bias, std=0.7)
    for name, parameter in model.named_parameters():
        if name.endswith("scale_shift_table"):
            torch.nn.init.normal_(parameter, std=0.7)
    return model.eval()


def flux_vae(seed: int = 3) -> AutoencoderKL:
    """Halves the sides."""
    with tiny._seeded(seed):
        return AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["UpDecoderBlock2D"] * 2,
            block_out_channels=(8, 8),
            layers_per_block=1,
            latent_channels=LATENT_CHANNELS,
            norm_num_groups=4,
            use_quant_conv=False,
            use_post_quant_conv=False,
            shift_factor=0.1159,
            scaling_factor=0.3611,
            sample_size=32,
        ).eval()


def sana_vae(seed: int = 10) -> AutoencoderDC:
    """Halves the sides."""
    with tiny._seeded(seed):
        return AutoencoderDC(
            in_channels=3,
            latent_channels=LATENT_CHANNELS,
            attention_head_dim=2,
            encoder_block_types=("ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            encoder_qkv_multiscales=((), (5,)),
            decoder_qkv_multiscales=((), (5,)),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            downsample_block_type="conv",
            upsample_block_type="interpolate",
            decoder_norm_types="rms_norm",
            decoder_act_fns="silu",
            scaling_factor=0.41407,
        ).eval()


def gemma_tokenizer() -> GemmaTokenizer:
    letters = [chr(code) for code in range(33, 127)]
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", "\n", *letters]
    return GemmaTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=8192)


def qwen_tokenizer() -> Qwen2Tokenizer:
    """A letter a token, the marks of a chat and of a picture, and the chat template."""
    names = ("endoftext", "im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad")
    marks = [f"<|{name}|>" for name in names]
    vocab = {token: i for i, token in enumerate([*sorted(ByteLevel.alphabet()), *marks])}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], model_max_length=4096, chat_template=_CHAT_TEMPLATE)
    tokenizer.add_special_tokens({"additional_special_tokens": marks[1:]})
    return tokenizer


def save_depth_estimator(folder: Path) -> Path:
    """A model for transformers' depth-estimation pipeline."""
    with tiny._seeded(9):
        model = DPTForDepthEstimation(
            DPTConfig(
                hidden_size=32,
                num_hidden_layers=4,
                num_attention_heads=2,
                intermediate_size=32,
                image_size=32,
                patch_size=8,
                backbone_out_indices=[0, 1, 2, 3],
                neck_hidden_sizes=[8, 8, 8, 8],
                fusion_hidden_size=8,
            )
        )
    model.save_pretrained(folder)
    DPTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder
