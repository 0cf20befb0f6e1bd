"""Families of which nothing but names needs to be said: what stays in 16 bits and why, what modulates, which blocks.

Everything else about them is read off a traced forward, whose inputs are guessed.
"""

from __future__ import annotations

from .base import Family

FLUX2 = Family(
    "flux2",
    ("Flux2Transformer2DModel",),
    blocks=("transformer_blocks", "single_transformer_blocks"),
    shared=("double_stream_modulation_*.linear", "single_stream_modulation.linear"),
)
QWEN_IMAGE = Family(
    "qwen-image",
    ("QwenImageTransformer2DModel",),
    blocks=("transformer_blocks",),
    w4a16=("*.img_mod.1", "*.txt_mod.1"),
)
# A small network of its own makes the modulation of all blocks.
CHROMA = Family(
    "chroma",
    ("ChromaTransformer2DModel",),
    blocks=("transformer_blocks", "single_transformer_blocks"),
    shared=("distilled_guidance_layer.*",),
)
Z_IMAGE = Family(
    "z-image",
    ("ZImageTransformer2DModel",),
    blocks=("noise_refiner", "context_refiner", "layers"),
    w4a16=("*.adaLN_modulation.0",),
)
# UNets: what is quantized are the transformers within. Residual networks are convolutions for the most part, and the
# projections around a transformer pass on everything that it does not change.
UNET = Family(
    "unet",
    (
        "AudioLDM2UNet2DConditionModel",
        "DreamLiteUNetModel",
        "I2VGenXLUNet",
        "UNet2DConditionModel",
        "UNet2DModel",
        "UNet3DConditionModel",
        "UNetControlNetXSModel",
        "UNetMotionModel",
        "UNetSpatioTemporalConditionModel",
    ),
    keep={
        "*.resnets.*": "part of a residual network of convolutions",
        "*.proj_in": "enters a transformer of the UNet",
        "*.proj_out": "leaves a transformer of the UNet",
        "*.time_pos_embed.*": "embedding, final norm or projection",
    },
)
# Text and, in I2V, picture are read by every block's attn2.
WAN = Family(
    "wan",
    (
        "WanTransformer3DModel",
        "WanVACETransformer3DModel",
        "WanAnimateTransformer3DModel",
        "SkyReelsV2Transformer3DModel",
    ),
    shared=("condition_embedder.time_proj",),
)
LTX = Family("ltx", ("LTXVideoTransformer3DModel",), blocks=("transformer_blocks",), shared=("time_embed.linear",))
# A few blocks that refine the text before all others read it: small, and what they lose every block loses.
_REFINER = {"context_embedder.*": "refines the text for all blocks"}
HUNYUAN_VIDEO = Family(
    "hunyuan-video",
    (
        "HunyuanVideoTransformer3DModel",
        "HunyuanVideo15Transformer3DModel",
        "HunyuanVideoFramepackTransformer3DModel",
    ),
    keep=_REFINER,
)
HUNYUAN_IMAGE = Family("hunyuan-image", ("HunyuanImageTransformer2DModel",), keep=_REFINER)
FAMILIES = (FLUX2, CHROMA, QWEN_IMAGE, Z_IMAGE, UNET, WAN, LTX, HUNYUAN_VIDEO, HUNYUAN_IMAGE)
