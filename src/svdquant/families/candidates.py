"""What each parameter of a diffusers denoiser's `forward` may be, by its name: values to try, the likeliest first.

Latents are one frame of 4×4 patches, texts have eight tokens, the batch is one. What only has a shape lives on the meta
device; what forwards branch on or count with (timesteps, positions, masks) has values.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

FRAMES, SIDE, TEXT = 1, 4, 8
TOKENS = FRAMES * SIDE * SIDE
ABSENT = object()
"""Stands for a parameter that is not given."""

# Widths of text embeddings go by many names; the first that a configuration has is the likeliest.
_TEXT_WIDTHS = (
    "joint_attention_dim", "caption_channels", "cross_attention_dim", "text_embed", "cap_feat", "text_dim",
    "text_hidden", "encoder_hid", "text", "context", "cross", "cap", "llm", "condition_dim",
)  # fmt: skip
# Given even where `forward` could do without.
_WANTED = {
    "timestep", "encoder_hidden_states", "encoder_hidden_states_2", "encoder_hidden_states_image",
    "image_embeds", "image_embeddings", "pooled_projections", "img_ids", "txt_ids", "img_shapes", "shape_list",
    "num_frames", "height", "width", "guidance", "added_cond_kwargs", "control_hidden_states", "controlnet_cond",
    "text_encoder_layers", "encoder_attention_mask_2",
}  # fmt: skip


class Shapes:
    """What a configuration tells about the inputs of `forward`. parameters: the names that it takes."""

    def __init__(self, model: nn.Module, parameters: set[str]) -> None:
        config: Any = model.config
        self.config: dict[str, Any] = dict(config)
        self.model, self.parameters = model, parameters
        patch = self.config.get("patch_size")
        sizes = list(patch) if isinstance(patch, (tuple, list)) else [patch or 1]
        self.patch = int(sizes[-1])
        self.patch_t = int(sizes[0]) if len(sizes) == 3 else int(self.config.get("patch_size_t") or 1)

    def widths(self, *patterns: str) -> list[int]:
        """Whole numbers of the configuration whose names match, those of the first pattern first, once each."""
        found: dict[int, None] = {}
        for pattern in patterns:
            for key, value in self.config.items():
                for one in value if isinstance(value, (tuple, list)) else (value,):
                    if re.search(pattern, key) and isinstance(one, int) and not isinstance(one, bool) and one > 0:
                        found[one] = None
        return list(found)


Maker = Callable[[Shapes], Iterator[Any]]


def meta(*shape: int) -> Tensor:
    return torch.zeros(shape, device="meta")


def _latents(s: Shapes) -> Iterator[Any]:
    visual = s.widths("in_visual_dim")
    channels = s.widths("^in_channels$", "in_channels", "in_visual_dim", "in_dim", "^out_channels$")[:2] or [4]
    # Beside the noise a picture and its mask.
    channels += [2 * c + 1 for c in visual]
    side, frames = SIDE * s.patch, FRAMES * s.patch_t
    listed = [meta(channels[0], frames, side, side)]
    if "cap_feats" in s.parameters:
        yield listed
    sides = [SIDE * 16 if "sample" in s.parameters else side]
    sides += [x for x in s.widths("^sample_size$", "sample_height", "image_size", "input_size") if x not in sides][:1]
    for c in channels:
        for layout in _layouts(s):
            for size in sides:
                lengths = {"N": 1, "C": c, "F": frames, "H": size, "W": size, "L": TOKENS}
                yield meta(*(lengths[axis] for axis in layout))
    yield listed
    yield meta(1, TOKENS, channels[0], s.patch_t, s.patch, s.patch)


def _layouts(s: Shapes) -> tuple[str, ...]:
    """Orders of batch, channels, frames, rows, columns, or of batch, channels and tokens (L)."""
    name = type(s.model).__name__
    if "1D" in name:
        return ("NLC", "NCL", "NCHW")
    if s.parameters & {"img_ids", "img_shapes", "height", "target_timestep"}:
        return ("NLC", "NCHW", "NCFHW")
    if "Temporal" in name or "VGen" in name:
        return ("NFCHW", "NCFHW")
    if "3D" in name or "Video" in name or "Motion" in name or s.patch_t > 1:
        return ("NCFHW", "NFCHW", "NLC", "NFHWC", "NCHW")
    return ("NCHW", "NCFHW", "NLC", "NFHWC")


def _text(s: Shapes) -> Iterator[Any]:
    widths = s.widths(*_TEXT_WIDTHS)[:6] or [64]
    longest = s.widths("max_text_seq")[:1]
    for width in widths:
        for length in (TEXT, *longest):
            yield meta(1, length, width)
    for layers in s.widths("num_text_layers"):
        yield meta(1, TEXT, layers, widths[0])
    for width in widths:
        yield [meta(TEXT, width)]


def _text_layers(s: Shapes) -> Iterator[Any]:
    for width in s.widths("text_encoder_dim"):
        yield [meta(1, TEXT, width) for _ in range(sum(s.widths("num_layers") + s.widths("num_single_layers")))]


def _timestep(_s: Shapes) -> Iterator[Any]:
    yield torch.ones(1)
    yield torch.ones(1, dtype=torch.int64)
    yield torch.ones(1, TOKENS)
    yield torch.ones(1, FRAMES)
    yield 1


def _guidance(s: Shapes) -> Iterator[Any]:
    if any("guidance" in key and value for key, value in s.config.items()):
        yield torch.ones(1)


def _pooled(s: Shapes) -> Iterator[Any]:
    for width in s.widths("pooled", "text_embed_dim_2", "in_text_dim2", "clip", "text") or [64]:
        yield meta(1, width)
        yield meta(1, 1, width)


def _ids(count: int) -> Maker:
    def make(s: Shapes) -> Iterator[Any]:
        axes = next((v for k, v in s.config.items() if "axes_dim" in k and isinstance(v, (tuple, list))), (0, 0, 0))
        for n in dict.fromkeys((len(axes), 3, 4)):
            yield torch.zeros(count, n)
            yield torch.zeros(1, count, n)

    return make


def _positions(_s: Shapes) -> Iterator[Any]:
    for count in (TEXT + TOKENS, TOKENS):
        for axes in (3, 4):
            yield torch.zeros(count, axes)
            yield torch.zeros(1, count, axes)
        yield torch.zeros(1, count, dtype=torch.int64)


def _mask(count: int) -> Maker:
    return _values(*(torch.ones(1, count, dtype=dtype) for dtype in (torch.int64, torch.bool, torch.float32)))


def _added(s: Shapes) -> Iterator[Any]:
    sizes = bool(getattr(s.model, "use_additional_conditions", False))
    added: dict[str, Any] = {
        "resolution": torch.ones(1, 2) if sizes else None,
        "aspect_ratio": torch.ones(1, 1) if sizes else None,
    }
    projected, times = s.widths("projection_class_embeddings_input_dim"), s.widths("addition_time_embed_dim")
    if projected and times:
        added |= {"text_embeds": meta(1, projected[0] - 6 * times[0]), "time_ids": torch.ones(1, 6)}
    if "sample" in s.parameters:
        added["image_embeds"] = meta(1, (s.widths("encoder_hid", "cross_attention_dim") or [64])[0])
    yield added


def _rotary(s: Shapes) -> Iterator[Any]:
    for width in s.widths("attention_head_dim", "head_dim")[:2]:
        for count in (TOKENS, TEXT + TOKENS):
            yield torch.ones(count, width), torch.zeros(count, width)


def _control(s: Shapes) -> Iterator[Any]:
    for channels in s.widths("vace_in_channels", "control"):
        yield meta(1, channels, FRAMES * s.patch_t, SIDE * s.patch, SIDE * s.patch)


def _wide(count: int, *patterns: str) -> Maker:
    """[1, count, width], or [1, width] for a count of 0."""
    return lambda s: (meta(1, count, width) if count else meta(1, width) for width in s.widths(*patterns))


def _size(s: Shapes) -> Iterator[Any]:
    yield torch.full((1, 2), float(SIDE * s.patch))


def _values(*values: Any) -> Maker:
    return lambda _s: iter(values)


_GRIDS = _values([[(FRAMES, SIDE, SIDE)]], [(FRAMES, SIDE, SIDE)])
_MAKERS: dict[str, Maker] = {
    **dict.fromkeys(("hidden_states", "sample", "x", "image_latents"), _latents),
    **dict.fromkeys(("encoder_hidden_states", "text_bth", "cap_feats"), _text),
    **dict.fromkeys(("timestep", "t", "timestep_r", "r_timestep", "timestep_ratio", "sigma"), _timestep),
    **dict.fromkeys(("pooled_projections", "clip_text_pooled"), _pooled),
    **dict.fromkeys(("original_size", "target_size", "crop_coords"), _size),
    **dict.fromkeys(("image_rotary_emb", "video_rotary_emb"), _rotary),
    **dict.fromkeys(("img_shapes", "shape_list"), _GRIDS),
    **dict.fromkeys(
        ("encoder_attention_mask", "encoder_attention_mask_2", "encoder_hidden_states_mask", "attention_mask"),
        _mask(TEXT),
    ),
    "img_mask": _mask(TOKENS),
    "img_ids": _ids(TOKENS),
    "txt_ids": _ids(TEXT),
    "position_ids": _positions,
    "guidance": _guidance,
    "encoder_hidden_states_1": _wide(TEXT, "cross_attention_dim"),
    "encoder_hidden_states_2": _wide(TEXT, "text_embed_2_dim", "text_embed_dim_2", "text"),
    "encoder_hidden_states_image": _wide(257, "^image_dim"),
    "image_embeds": _wide(16, "image_embed_dim", "image_proj", "image_dim"),
    "image_embeddings": _wide(0, "cross_attention_dim"),
    "text_encoder_layers": _text_layers,
    "text_lens": _values(torch.tensor([TEXT])),
    "audio_hidden_states": _wide(TOKENS, "audio_in_channels"),
    "audio_encoder_hidden_states": _wide(TEXT, "^caption_channels$", "audio_cross"),
    "audio_num_frames": _values(TOKENS),
    "control_hidden_states": _control,
    "controlnet_cond": _values(meta(1, 3, SIDE * 128, SIDE * 128)),
    "added_cond_kwargs": _added,
    "added_time_ids": _values(torch.ones(1, 3)),
    "class_labels": _values(torch.zeros(1, dtype=torch.int64)),
    "prior_token_id": _values(torch.zeros(1, TOKENS, dtype=torch.int64)),
    "prior_token_drop": _values(torch.zeros(1, TOKENS, dtype=torch.bool)),
    "visual_rope_pos": _values([torch.arange(n) for n in (FRAMES, SIDE, SIDE)]),
    "text_rope_pos": _values(torch.arange(TEXT)),
    "num_frames": _values(FRAMES),
    "height": _values(SIDE),
    "width": _values(SIDE),
    "fps": _values(1.0, torch.ones(1)),
}


def candidates(model: nn.Module) -> dict[str, list[Any]]:
    """Parameter of `forward` → what it may be, the likeliest first; `ABSENT` where it need not be given."""
    parameters = inspect.signature(type(model).forward).parameters
    shapes = Shapes(model, set(parameters))
    found = {}
    for name, parameter in list(parameters.items())[1:]:
        made = list(_MAKERS[name](shapes)) if name in _MAKERS else []
        if made and parameter.default is not parameter.empty:
            made.insert(len(made) if name in _WANTED else 0, ABSENT)
        if made:
            found[name] = made
    return found
