"""Which pipeline a fine-tune was most likely made from, by its names, its shapes and what its file is called."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from .lazy_tensor import LazyTensor
from .original_config import Shapes


def default_base(model_class: str, tensors: Mapping[str, LazyTensor], file: str) -> str | None:
    """The Hub id of the pipeline that a file of that class, with its own names, was most likely made from.

    file: its name, which tells apart what has the same shapes. None where no pipeline is known.
    """
    shapes = Shapes(tensors)
    try:
        return _BASES[model_class](shapes, file.lower()) if model_class in _BASES else None
    except (KeyError, IndexError):
        return None


def _flux_base(shapes: Shapes, file: str) -> str:
    channels = shapes.of("img_in.weight" if "img_in.weight" in shapes else "x_embedder.weight", 1)
    if channels == 384:
        return "black-forest-labs/FLUX.1-Fill-dev"
    if channels == 128:
        return f"black-forest-labs/FLUX.1-{'Canny' if 'canny' in file else 'Depth'}-dev"
    if not any("guidance" in name for name in shapes.tensors):
        return "black-forest-labs/FLUX.1-schnell"
    for part, name in (("kontext", "Kontext-dev"), ("krea", "Krea-dev")):
        if part in file:
            return f"black-forest-labs/FLUX.1-{name}"
    return "black-forest-labs/FLUX.1-dev"


def _flux2_base(shapes: Shapes, _file: str) -> str:
    width = shapes.of("img_in.weight" if "img_in.weight" in shapes else "x_embedder.weight", 0)
    known = {3072: "klein-4B", 4096: "klein-9B"}
    return f"black-forest-labs/FLUX.2-{known.get(width, 'dev')}"


def _sd3_base(shapes: Shapes, _file: str) -> str:
    if shapes.of("context_embedder.weight", 0) == 2432:
        return "stabilityai/stable-diffusion-3.5-large"
    if any(".attn2." in name for name in shapes.tensors):
        return "stabilityai/stable-diffusion-3.5-medium"
    return "stabilityai/stable-diffusion-3-medium-diffusers"


def _sana_base(shapes: Shapes, _file: str) -> str:
    name = "patch_embed.proj.weight" if "patch_embed.proj.weight" in shapes else "x_embedder.proj.weight"
    size = "600M_1024px" if shapes.of(name, 0) == 1152 else "1600M_1024px_BF16"
    return f"Efficient-Large-Model/Sana_{size}_diffusers"


def _qwen_base(_shapes: Shapes, file: str) -> str:
    if "edit" not in file:
        return "Qwen/Qwen-Image"
    return next((f"Qwen/Qwen-Image-Edit-{d}" for d in ("2509", "2511") if d in file), "Qwen/Qwen-Image-Edit")


def _wan_base(shapes: Shapes, file: str) -> str:
    width, channels = shapes.of("patch_embedding.weight", 0), shapes.of("patch_embedding.weight", 1)
    if width == 3072:
        return "Wan-AI/Wan2.2-TI2V-5B-Diffusers"
    if width == 1536:
        return "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    newer = bool(re.search(r"2[._-]2|noise", file))
    if channels == 16:
        return f"Wan-AI/{'Wan2.2-T2V-A14B' if newer else 'Wan2.1-T2V-14B'}-Diffusers"
    pictures = any("img_emb" in name or "image_embedder" in name for name in shapes.tensors)
    return f"Wan-AI/{'Wan2.1-I2V-14B-480P' if pictures else 'Wan2.2-I2V-A14B'}-Diffusers"


def _ltx_base(shapes: Shapes, _file: str) -> str:
    width = shapes.of("patchify_proj.weight" if "patchify_proj.weight" in shapes else "proj_in.weight", 0)
    return "Lightricks/LTX-Video" if width == 2048 else "Lightricks/LTX-Video-0.9.7-dev"


def _unet_base(shapes: Shapes, _file: str) -> str | None:
    width = next((s.shape[1] for name, s in shapes.tensors.items() if name.endswith("attn2.to_k.weight")), 0)
    first = "input_blocks.0.0.weight" if "input_blocks.0.0.weight" in shapes else "conv_in.weight"
    inpainting = shapes.of(first, 1) == 9
    if width == 2048:
        xl, inpaint = "stabilityai/stable-diffusion-xl-base-1.0", "diffusers/stable-diffusion-xl-1.0-inpainting-0.1"
        return inpaint if inpainting else xl
    if width == 768:
        return f"stable-diffusion-v1-5/stable-diffusion-{'inpainting' if inpainting else 'v1-5'}"
    return None


_BASES: dict[str, Callable[[Shapes, str], str | None]] = {
    "FluxTransformer2DModel": _flux_base,
    "Flux2Transformer2DModel": _flux2_base,
    "ChromaTransformer2DModel": lambda _s, _f: "lodestones/Chroma1-HD",
    "HunyuanVideoTransformer3DModel": lambda _s, _f: "hunyuanvideo-community/HunyuanVideo",
    "SD3Transformer2DModel": _sd3_base,
    "SanaTransformer2DModel": _sana_base,
    "QwenImageTransformer2DModel": _qwen_base,
    "ZImageTransformer2DModel": lambda _s, f: f"Tongyi-MAI/Z-Image{'-Turbo' if 'turbo' in f else ''}",
    "Lumina2Transformer2DModel": lambda _s, _f: "Alpha-VLLM/Lumina-Image-2.0",
    "WanTransformer3DModel": _wan_base,
    "LTXVideoTransformer3DModel": _ltx_base,
    "LTX2VideoTransformer3DModel": lambda _s, _f: "Lightricks/LTX-2",
    "MochiTransformer3DModel": lambda _s, _f: "genmo/mochi-1-preview",
    "AuraFlowTransformer2DModel": lambda _s, _f: "fal/AuraFlow-v0.3",
    "PixArtTransformer2DModel": lambda _s, _f: "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
    "UNet2DConditionModel": _unet_base,
}
