"""Files as fine-tunes come: a tiny model's weights under some names, in some types, and the folder of its pipeline."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import standins
import torch
from diffusers import (
    Flux2Transformer2DModel,
    LTXVideoTransformer3DModel,
    SD3Transformer2DModel,
    WanTransformer3DModel,
)
from safetensors.torch import save_file
from torch import Tensor

FP8_MAX = 448.0


def _flux2() -> Any:
    return Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=64,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(16, 16, 16, 16),
    )


def _sd3() -> Any:
    """The first two blocks attend twice, as SD3.5-medium's first ones do."""
    return SD3Transformer2DModel(
        sample_size=32,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=64,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=128,
        pooled_projection_dim=32,
        pos_embed_max_size=16,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )


def _wan() -> Any:
    """With the image attention of the models that animate a picture."""
    return WanTransformer3DModel(
        num_attention_heads=1,
        attention_head_dim=128,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=32,
        ffn_dim=256,
        num_layers=2,
        image_dim=64,
        added_kv_proj_dim=128,
    )


def _ltx() -> Any:
    return LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=32,
        attention_head_dim=4,
        cross_attention_dim=128,
        num_layers=2,
        caption_channels=32,
    )


MODELS: dict[str, Callable[[], Any]] = {
    "flux": lambda: standins.flux_transformer(guidance=True),
    "flux2": _flux2,
    "sd3": _sd3,
    "sana": lambda: standins.sana().transformer,
    "z_image": lambda: standins.z_image().transformer,
    "wan": _wan,
    "ltx": _ltx,
    "sdxl": lambda: standins.sdxl().unet,
    "qwen_image": lambda: standins.qwen_image().transformer,
}


def model(name: str) -> Any:
    """In bfloat16, of numbers that differ everywhere."""
    made = MODELS[name]().to(torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in made.state_dict().values():
            if value.is_floating_point():
                value.copy_(0.1 * torch.randn(value.shape, generator=generator))
    return made


def pipeline_around(made: Any, folder: Path) -> Path:
    """A pipeline folder with the model's configuration and nothing else: all that reading a file needs."""
    part = "unet" if type(made).__name__.startswith("UNet") else "transformer"
    made.save_config(folder / part)
    index = {"_class_name": "DiffusionPipeline", part: ["diffusers", type(made).__name__]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def write(file: Path, state: dict[str, Tensor], prefix: str = "", metadata: dict[str, str] | None = None) -> Path:
    save_file({prefix + name: value.contiguous() for name, value in state.items()}, file, metadata)
    return file


def write_header(file: Path, state: dict[str, Tensor], prefix: str = "") -> Path:
    """A file of real size, of 16-bit numbers, that takes no disk: all of them are zeros that are not stored."""
    position, header = 0, {}
    for name, value in state.items():
        size = 2 * value.numel()
        entry = {"dtype": "BF16", "shape": list(value.shape), "data_offsets": [position, position + size]}
        header[prefix + name], position = entry, position + size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.truncate(8 + len(text) + position)
    return file


def scales_of(weight: Tensor, kind: str) -> Tensor:
    """float32 scales that bring the weight's numbers into e4m3's range."""
    flat = weight.float().flatten(1)
    if kind in ("scalar", "one"):
        scale = flat.abs().max() / FP8_MAX
        return scale if kind == "scalar" else scale.reshape(1)
    if kind == "rows":
        return flat.abs().amax(1, keepdim=True) / FP8_MAX
    if kind == "row_vector":
        return flat.abs().amax(1) / FP8_MAX
    if kind == "blocks":
        return flat.view(flat.shape[0], -1, 16).abs().amax(2, keepdim=True) / FP8_MAX
    assert kind == "tiles"
    return flat.view(flat.shape[0] // 8, 8, -1, 16).abs().amax((1, 3)) / FP8_MAX


def expanded(scale: Tensor, weight: Tensor) -> Tensor:
    """One scale per number of the weight, by repeating them."""
    if scale.numel() == 1:
        return scale.reshape(()).expand(weight.shape)
    grid = scale.reshape(-1, 1) if scale.dim() == 1 else scale.reshape(scale.shape[:2])
    return torch.kron(grid, torch.ones(weight.shape[0] // grid.shape[0], weight.shape[1] // grid.shape[1]))


State = dict[str, Tensor]


def scaled_fp8(state: State, kind: str, leaf: str = "scale_weight") -> tuple[State, State]:
    """(the same with every matrix in e4m3 with scales, what that means in bfloat16)."""
    stored, meant = {}, {}
    for name, value in state.items():
        if not name.endswith(".weight") or value.dim() != 2 or value.shape[0] % 8 or value.shape[1] % 16:
            stored[name] = meant[name] = value
            continue
        scale = scales_of(value, kind)
        every = expanded(scale, value)
        codes = (value.float() / every).to(torch.float8_e4m3fn)
        module = name.removesuffix(".weight")
        stored |= {name: codes, f"{module}.{leaf}": scale}
        meant[name] = (codes.float() * every).to(torch.bfloat16)
    return stored, meant


def as_bytes(data: Any) -> Tensor:
    """JSON as a tensor of bytes, as ComfyUI stores what it says of a layer."""
    return torch.tensor(list(json.dumps(data).encode()), dtype=torch.uint8)
