"""The configuration of a fine-tune's model, from the shapes of its tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from .lazy_tensor import LazyTensor

_SDXL = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


class Shapes:
    """Shapes by name, and the counts that a configuration has."""

    def __init__(self, tensors: Mapping[str, LazyTensor]) -> None:
        self.tensors = tensors

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def of(self, name: str, dimension: int) -> int:
        """Raises `KeyError` where the tensor is missing, `IndexError` where it has fewer dimensions."""
        return int(self.tensors[name].shape[dimension])

    def blocks(self, name: str, leaf: str = "") -> list[int]:
        """Numbers of the blocks in a list of modules. leaf: only those that have something of that name."""
        pattern = re.compile(rf"{re.escape(name)}\.(\d+)\.{re.escape(leaf)}")
        return sorted({int(found[1]) for tensor in self.tensors if (found := pattern.match(tensor))})

    def count(self, name: str) -> int:
        return len(self.blocks(name))


def config_from_shapes(model_class: str, tensors: Mapping[str, LazyTensor]) -> dict[str, Any] | None:
    """The configuration of a model of that class whose tensors have these shapes, under diffusers' names.

    None for a class whose configuration shapes do not tell. It has to be checked against the tensors.
    """
    if model_class not in _CONFIGS:
        return None
    try:
        return _CONFIGS[model_class](Shapes(tensors))
    except (KeyError, IndexError, ZeroDivisionError):
        return None


def _flux(s: Shapes) -> dict[str, Any]:
    head, width = s.of("single_transformer_blocks.0.attn.norm_q.weight", 0), s.of("x_embedder.weight", 0)
    time, rotated = head // 8, (head - head // 8) // 2
    return {
        "patch_size": 1,
        "in_channels": s.of("x_embedder.weight", 1),
        "out_channels": s.of("proj_out.weight", 0),
        "num_layers": s.count("transformer_blocks"),
        "num_single_layers": s.count("single_transformer_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": s.of("context_embedder.weight", 1),
        "pooled_projection_dim": s.of("time_text_embed.text_embedder.linear_1.weight", 1),
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in s,
        "axes_dims_rope": (time, rotated, rotated),
    }


def _flux2(s: Shapes) -> dict[str, Any]:
    head, width = s.of("transformer_blocks.0.attn.norm_q.weight", 0), s.of("x_embedder.weight", 0)
    return {
        "in_channels": s.of("x_embedder.weight", 1),
        "out_channels": s.of("proj_out.weight", 0),
        "num_layers": s.count("transformer_blocks"),
        "num_single_layers": s.count("single_transformer_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": s.of("context_embedder.weight", 1),
        "timestep_guidance_channels": s.of("time_guidance_embed.timestep_embedder.linear_1.weight", 1),
        "mlp_ratio": s.of("transformer_blocks.0.ff.linear_out.weight", 1) / width,
        "axes_dims_rope": (head // 4,) * 4,
        "guidance_embeds": "time_guidance_embed.guidance_embedder.linear_1.weight" in s,
    }


def _qwen(s: Shapes) -> dict[str, Any]:
    head = s.of("transformer_blocks.0.attn.norm_q.weight", 0)
    time, rotated = head // 8, (head - head // 8) // 2
    return {
        "in_channels": s.of("img_in.weight", 1),
        "out_channels": s.of("proj_out.weight", 0) // 4,
        "num_layers": s.count("transformer_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": s.of("img_in.weight", 0) // head,
        "joint_attention_dim": s.of("txt_in.weight", 1),
        "axes_dims_rope": (time, rotated, rotated),
    }


def _sana(s: Shapes) -> dict[str, Any]:
    width, patch = s.of("patch_embed.proj.weight", 0), s.of("patch_embed.proj.weight", 2)
    cross = 20 if width == 2240 else 16
    return {
        "in_channels": s.of("patch_embed.proj.weight", 1),
        "out_channels": s.of("proj_out.weight", 0) // patch**2,
        "patch_size": patch,
        "num_layers": s.count("transformer_blocks"),
        "attention_head_dim": 32,
        "num_attention_heads": width // 32,
        "num_cross_attention_heads": cross,
        "cross_attention_head_dim": width // cross,
        "cross_attention_dim": s.of("transformer_blocks.0.attn2.to_k.weight", 1),
        "caption_channels": s.of("caption_projection.linear_1.weight", 1),
        "mlp_ratio": s.of("transformer_blocks.0.ff.conv_point.weight", 1) / width,
        "qk_norm": "rms_norm_across_heads" if "transformer_blocks.0.attn1.norm_q.weight" in s else None,
    }


def _sd3(s: Shapes) -> dict[str, Any]:
    normed = "transformer_blocks.0.attn.norm_q.weight" in s
    head = s.of("transformer_blocks.0.attn.norm_q.weight", 0) if normed else 64
    return {
        "in_channels": s.of("pos_embed.proj.weight", 1),
        "out_channels": s.of("proj_out.weight", 0) // s.of("pos_embed.proj.weight", 2) ** 2,
        "patch_size": s.of("pos_embed.proj.weight", 2),
        "num_layers": s.count("transformer_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": s.of("pos_embed.proj.weight", 0) // head,
        "joint_attention_dim": s.of("context_embedder.weight", 1),
        "caption_projection_dim": s.of("context_embedder.weight", 0),
        "pooled_projection_dim": s.of("time_text_embed.text_embedder.linear_1.weight", 1),
        "pos_embed_max_size": round(s.of("pos_embed.pos_embed", 1) ** 0.5),
        "dual_attention_layers": tuple(s.blocks("transformer_blocks", "attn2.")),
        "qk_norm": "rms_norm" if normed else None,
    }


def _z_image(s: Shapes) -> dict[str, Any]:
    width, head = s.of("layers.0.attention.to_q.weight", 1), s.of("layers.0.attention.norm_q.weight", 0)
    return {
        "in_channels": s.of("all_x_embedder.2-1.weight", 1) // 4,
        "dim": width,
        "n_layers": s.count("layers"),
        "n_refiner_layers": s.count("noise_refiner"),
        "n_heads": s.of("layers.0.attention.to_q.weight", 0) // head,
        "n_kv_heads": s.of("layers.0.attention.to_k.weight", 0) // head,
        "cap_feat_dim": s.of("cap_embedder.1.weight", 1),
        "axes_dims": [head // 4, head * 3 // 8, head * 3 // 8],
    }


def _wan(s: Shapes) -> dict[str, Any]:
    width, patch = s.of("patch_embedding.weight", 0), tuple(s.of("patch_embedding.weight", i) for i in (2, 3, 4))
    pictures = "condition_embedder.image_embedder.norm1.weight" in s
    return {
        "patch_size": patch,
        "in_channels": s.of("patch_embedding.weight", 1),
        "out_channels": s.of("proj_out.weight", 0) // (patch[0] * patch[1] * patch[2]),
        "num_layers": s.count("blocks"),
        "attention_head_dim": 128,
        "num_attention_heads": width // 128,
        "ffn_dim": s.of("blocks.0.ffn.net.0.proj.weight", 0),
        "text_dim": s.of("condition_embedder.text_embedder.linear_1.weight", 1),
        "freq_dim": s.of("condition_embedder.time_embedder.linear_1.weight", 1),
        "cross_attn_norm": "blocks.0.norm2.weight" in s,
        "image_dim": s.of("condition_embedder.image_embedder.norm1.weight", 0) if pictures else None,
        "added_kv_proj_dim": width if "blocks.0.attn2.add_k_proj.weight" in s else None,
    }


def _ltx(s: Shapes) -> dict[str, Any]:
    width = s.of("proj_in.weight", 0)
    return {
        "in_channels": s.of("proj_in.weight", 1),
        "out_channels": s.of("proj_out.weight", 0),
        "num_layers": s.count("transformer_blocks"),
        "num_attention_heads": 32,
        "attention_head_dim": width // 32,
        "cross_attention_dim": s.of("transformer_blocks.0.attn2.to_k.weight", 1),
        "caption_channels": s.of("caption_projection.linear_1.weight", 1),
    }


def _hunyuan(s: Shapes) -> dict[str, Any]:
    width, head = s.of("x_embedder.proj.weight", 0), s.of("transformer_blocks.0.attn.norm_q.weight", 0)
    return {
        "in_channels": s.of("x_embedder.proj.weight", 1),
        "out_channels": s.of("proj_out.weight", 0) // 4,
        "num_layers": s.count("transformer_blocks"),
        "num_single_layers": s.count("single_transformer_blocks"),
        "num_refiner_layers": s.count("context_embedder.token_refiner.refiner_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "text_embed_dim": s.of("context_embedder.proj_in.weight", 1),
        "pooled_projection_dim": s.of("time_text_embed.text_embedder.linear_1.weight", 1),
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in s,
    }


def _unet(s: Shapes) -> dict[str, Any] | None:
    if s.of("add_embedding.linear_1.weight", 1) != _SDXL["projection_class_embeddings_input_dim"]:
        return None
    return _SDXL | {"in_channels": s.of("conv_in.weight", 1)}


_CONFIGS: dict[str, Callable[[Shapes], dict[str, Any] | None]] = {
    "FluxTransformer2DModel": _flux,
    "Flux2Transformer2DModel": _flux2,
    "QwenImageTransformer2DModel": _qwen,
    "SanaTransformer2DModel": _sana,
    "SD3Transformer2DModel": _sd3,
    "ZImageTransformer2DModel": _z_image,
    "WanTransformer3DModel": _wan,
    "LTXVideoTransformer3DModel": _ltx,
    "LTX2VideoTransformer3DModel": lambda _s: {},
    "HunyuanVideoTransformer3DModel": _hunyuan,
    "UNet2DConditionModel": _unet,
}
