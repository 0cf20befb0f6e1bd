"""One miniature pipeline per model family, of the real classes and with random weights, and how to draw with it.

Nothing is downloaded, and two steps of the smallest picture or video take a tenth of a second. The widths of the
denoisers' linears are multiples of 64, so that every number format and a branch of rank 16 fit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import family_pictures as pictures
import family_videos as videos
import numpy as np
import standins
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit
from torch import Tensor, nn

Models = dict[str, nn.Module]
# Arguments of the first forward of each denoiser.
Inputs = dict[str, tuple[tuple[Any, ...], dict[str, Any]]]

PIPELINES: dict[str, Callable[[], Any]] = {
    "flux_schnell": lambda: pictures.flux(standins.flux),
    "flux_dev": lambda: pictures.flux(lambda: standins.flux(guidance=True)),
    "flux_fill": lambda: pictures.flux(standins.flux_fill),
    "flux_control": lambda: pictures.flux(standins.flux_control),
    "flux_redux": lambda: pictures.flux(lambda: standins.flux(guidance=True)),
    "flux_kontext": lambda: pictures.flux(standins.flux_kontext),
    "flux2_dev": pictures.flux2_dev,
    "flux2_klein": pictures.flux2_klein,
    "sana": lambda: pictures.smaller(standins.sana(), 40),
    "pixart_sigma": pictures.pixart_sigma,
    "sdxl": pictures.sdxl,
    "sdxl_turbo": lambda: pictures.sdxl(turbo=True),
    "sd35_large": pictures.sd35,
    "sd35_medium": lambda: pictures.sd35(dual=True),
    "qwen_image": standins.qwen_image,
    "qwen_image_edit": pictures.qwen_image_edit,
    "z_image": pictures.z_image,
    "wan": videos.wan,
    "wan22": videos.wan22,
    "wan_i2v": videos.wan_i2v,
    "ltx": videos.ltx,
    "ltx2": videos.ltx2,
    "hunyuan_video": videos.hunyuan_video,
}

_PLAIN: dict[str, Any] = {"guidance_scale": 1.0}
_VIDEO = _PLAIN | {"num_frames": 5}
# Arguments of each pipeline's call, next to those of every call.
CALLS: dict[str, dict[str, Any]] = {
    "flux_fill": {"image": standins.picture(side=16), "mask_image": standins.mask(side=16)},
    "flux_control": {"control_image": standins.picture(side=16)},
    "flux_kontext": {"image": standins.picture(side=16), "max_area": 16 * 16, "_auto_resize": False},
    "flux2_dev": {"guidance_scale": 2.5},
    "sana": {
        "height": 32,
        "width": 32,
        "complex_human_instruction": None,
        "use_resolution_binning": False,
        "guidance_scale": 1.0,
    },
    "pixart_sigma": {"use_resolution_binning": False, "guidance_scale": 1.0},
    "sdxl": _PLAIN,
    "sdxl_turbo": {"guidance_scale": 0.0, "num_inference_steps": 1},
    "sd35_large": _PLAIN,
    "sd35_medium": _PLAIN,
    "qwen_image": {"true_cfg_scale": 1.0},
    "qwen_image_edit": {"image": standins.picture(side=16), "true_cfg_scale": 1.0},
    "z_image": {"guidance_scale": 0.0},
    "wan": _VIDEO,
    "wan22": _VIDEO,
    "wan_i2v": _VIDEO | {"image": standins.picture(side=16)},
    "ltx": _VIDEO | {"height": 32, "width": 32},
    "ltx2": _VIDEO
    | {"height": 32, "width": 32}
    | dict.fromkeys(("modality_scale", "audio_guidance_scale", "audio_modality_scale"), 1.0)
    | dict.fromkeys(("stg_scale", "audio_stg_scale"), 0.0),
    "hunyuan_video": _VIDEO,
}


def denoisers(pipe: Any) -> Models:
    """What is quantized: one transformer or UNet, two of Wan 2.2."""
    names = ("unet", "transformer", "transformer_2")
    return {name: getattr(pipe, name) for name in names if getattr(pipe, name, None) is not None}


def draw(name: str, pipe: Any, seed: int = 0, **arguments: Any) -> np.ndarray:
    """Two steps from a fixed seed: pictures [B, H, W, 3] or videos [B, F, H, W, 3] of floats in 0 to 1."""
    call: dict[str, Any] = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "np"}
    if name == "flux_redux":
        call |= _redux_prompt(pipe)
    else:
        call |= {"prompt": "a cat"}
    if not name.startswith("sdxl"):
        call["max_sequence_length"] = 16
    call |= CALLS.get(name, {}) | arguments
    generator = torch.Generator().manual_seed(seed)
    # That pipeline scales every picture to a megapixel.
    small = mock.patch.object(pipeline_qwenimage_edit, "calculate_dimensions", lambda *_: (16, 16, None))
    with small:
        out = pipe(generator=generator, **call)
    return np.asarray(out.frames if hasattr(out, "frames") else out.images)


def _redux_prompt(pipe: Any) -> dict[str, Any]:
    """A picture in place of a prompt; the prior has no text encoders of its own here."""
    prior = standins.flux_redux()
    text = {name: getattr(pipe, name) for name in ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")}
    prior.register_modules(**text)
    out = prior(standins.picture(), prompt="a cat")
    return {"prompt_embeds": out.prompt_embeds, "pooled_prompt_embeds": out.pooled_prompt_embeds}


def recorded(name: str, pipe: Any, seed: int = 0) -> tuple[np.ndarray, Inputs]:
    """What the pipeline draws, and what its denoisers read first meanwhile."""
    inputs: Inputs = {}

    def hook_for(part: str) -> Callable[..., None]:
        return lambda _module, args, kwargs: inputs.setdefault(part, (args, kwargs)) and None

    handles = [m.register_forward_pre_hook(hook_for(p), with_kwargs=True) for p, m in denoisers(pipe).items()]
    picture = draw(name, pipe, seed)
    for handle in handles:
        handle.remove()
    return picture, inputs


@torch.no_grad()
def output(models: Models, inputs: Inputs) -> Tensor:
    """Everything that denoisers make of these inputs, float64 in one row."""
    found: list[Tensor] = []
    for part, model in models.items():
        args, kwargs = inputs[part]
        _collect(model(*args, **kwargs), found)
    return torch.cat([tensor.flatten() for tensor in found]).double()


def _collect(value: Any, found: list[Tensor]) -> None:
    """Tensors, whatever they are wrapped in."""
    if isinstance(value, Tensor):
        found.append(value)
    elif isinstance(value, dict):
        _collect(list(value.values()), found)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _collect(item, found)


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())
