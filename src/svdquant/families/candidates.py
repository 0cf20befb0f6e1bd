"""What each parameter of a diffusers denoiser's `forward` may be, by its name: values to try, the likeliest first.

Latents are one frame of 4×4 patches, texts have eight tokens, the batch is one. What only has a shape lives on the meta
device; what forwards branch on or count with (timesteps, positions, masks) has values.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .latents import context, earlier, face, latents, pose
from .shapes import FRAMES, SIDE, TEXT, TOKENS, Maker, Shapes, meta

ABSENT = object()
"""Stands for a parameter that is not given."""


@dataclass(frozen=True)
class Same:
    """Stands for what another parameter is given."""

    name: str


# Widths of text embeddings go by many names; the first that a configuration has is the likeliest.
_TEXT_WIDTHS = (
    "joint_attention_dim", "caption_channels", "cross_attention_dim", "text_embed", "cap_feat", "text_dim",
    "text_hidden", "encoder_hid", "text", "context", "cross", "cap", "llm", "condition_dim", "^hidden_size$",
)  # fmt: skip
# Given even where `forward` could do without.
_WANTED = {
    "timestep", "encoder_hidden_states", "encoder_hidden_states_2", "encoder_hidden_states_image",
    "image_embeds", "image_embeddings", "pooled_projections", "img_ids", "txt_ids", "img_shapes", "shape_list",
    "num_frames", "height", "width", "guidance", "added_cond_kwargs", "control_hidden_states", "controlnet_cond",
    "text_encoder_layers", "encoder_attention_mask_2", "pose_hidden_states", "face_pixel_values", "padding_mask",
    "latents_clean", "latents_history_2x", "latents_history_4x", "indices_latents_clean", "indices_latents_history_2x",
    "indices_latents_history_4x", "offset_grid_sizes",
}  # fmt: skip


def _cache(s: Shapes) -> Iterator[Any]:
    """An empty one of the class that `forward` names, with a place for every layer."""
    kind = s.kinds.get("kv_cache")
    if "kv_cache" in s.required and isinstance(kind, type):
        yield from (kind(layers) for layers in s.widths("num_layers"))


def _cache_mode(s: Shapes) -> Iterator[Any]:
    """What fills a cache, where there has to be one."""
    if "kv_cache_mode" in s.required:
        yield "extract"


def _text(s: Shapes) -> Iterator[Any]:
    widths = s.widths(*_TEXT_WIDTHS)[:6] or [64]
    longest = s.widths("max_text_seq")[:1]
    for width in widths:
        for length in (TEXT, *longest):
            yield meta(1, length, width)
    for layers in s.widths("num_text_layers"):
        yield meta(1, TEXT, layers, widths[0])
    if layers_read := s.config.get("injection_layer_ids"):
        yield meta(1, 1 + len(layers_read), TEXT, widths[0])
    for width in widths:
        yield [meta(TEXT, width)]
    # As long as what it goes with; with an axis for several texts.
    yield meta(1, TOKENS, widths[0])
    yield meta(1, 1, TEXT, widths[0])


def _text_layers(s: Shapes) -> Iterator[Any]:
    for width in s.widths("text_encoder_dim"):
        yield [meta(1, TEXT, width) for _ in range(sum(s.widths("num_layers") + s.widths("num_single_layers")))]


def _llama_layers(s: Shapes) -> Iterator[Any]:
    """What every layer of a language model says; the configuration lists those that are read, and the width last."""
    for width in s.widths("^caption_channels$")[-1:]:
        yield meta(1 + max(s.config.get("llama_layers") or [0]), 1, TEXT, width)


def _timestep(_s: Shapes) -> Iterator[Any]:
    yield torch.ones(1)
    yield torch.ones(1, dtype=torch.int64)
    yield torch.ones(1, TOKENS)
    yield torch.ones(1, FRAMES)
    yield torch.ones(1, 1, FRAMES)
    yield 1


def _second_timestep(s: Shapes) -> Iterator[Any]:
    """Of a step from one time to another."""
    if "timestep" in s.parameters:
        yield Same("timestep")
    yield from _timestep(s)


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


def _positions(s: Shapes) -> Iterator[Any]:
    if "video_indices" in s.parameters:
        yield torch.zeros(PACKED, 3)
    for count in (TEXT + TOKENS, TOKENS):
        for axes in (3, 4):
            yield torch.zeros(count, axes)
            yield torch.zeros(1, count, axes)
        yield torch.zeros(1, count, dtype=torch.int64)
    # With a token for the time.
    yield torch.zeros(1, TEXT + 1 + TOKENS, dtype=torch.int64)


# Picture, sound and text in one sequence.
PACKED = TOKENS + TOKENS + TEXT


def _packed() -> Maker:
    return _values(torch.zeros(PACKED, dtype=torch.int64))


def _roles() -> Maker:
    """Of tokens that are text or picture: all alike."""
    return _values(torch.ones(1, TOKENS, dtype=torch.int64))


def _places(s: Shapes) -> Iterator[Any]:
    """Which places of a sequence stand for pictures: all tokens, or 2 × 2 of them each, after the text."""
    yield from _mask(TOKENS)(s)
    yield torch.arange(TEXT + TOKENS // 4)[None] >= TEXT


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
    widths = s.widths("attention_head_dim", "head_dim")[:2]
    # Of all heads together.
    widths += [heads * width for heads in s.widths("^num_attention_heads$")[:1] for width in widths[:1]]
    for width in widths:
        for count in (TOKENS, TEXT + TOKENS):
            yield torch.ones(count, width), torch.zeros(count, width)


def _control(s: Shapes) -> Iterator[Any]:
    for channels in s.widths("vace_in_channels", "control"):
        yield meta(1, channels, FRAMES * s.patch_t, s.side, s.side)


def _wide(count: int, *patterns: str) -> Maker:
    """[1, count, width], or [1, width] for a count of 0."""
    return lambda s: (meta(1, count, width) if count else meta(1, width) for width in s.widths(*patterns))


def _size(s: Shapes) -> Iterator[Any]:
    yield torch.full((1, 2), float(s.side))


def _image_tokens(s: Shapes) -> Iterator[Any]:
    """Of CLIP: as wide as the configuration says, else as what first reads them."""
    widths = s.widths("^image_dim")
    for name, module in s.model.named_modules():
        if isinstance(module, nn.LayerNorm) and re.match(r"(img|image)_emb", name):
            widths.append(int(module.normalized_shape[0]))
    yield from (meta(1, 257, width) for width in widths[:1])


def _any_mask(s: Shapes) -> Iterator[Any]:
    """Of the text; of all tokens and the time with one another where they are one sequence."""
    if "input_ids" in s.parameters:
        yield torch.ones(1, TEXT + 1 + TOKENS, TEXT + 1 + TOKENS)
    yield from _mask(TEXT)(s)


def _values(*values: Any) -> Maker:
    return lambda _s: iter(values)


_GRIDS = _values([[(FRAMES, SIDE, SIDE)]], [(FRAMES, SIDE, SIDE)])
_MAKERS: dict[str, Maker] = {
    **dict.fromkeys(("hidden_states", "sample", "x", "image_latents"), latents),
    **dict.fromkeys(("encoder_hidden_states", "text_bth", "cap_feats"), _text),
    **dict.fromkeys(("timestep", "timesteps", "t", "timestep_ratio", "sigma"), _timestep),
    **dict.fromkeys(("timestep_r", "r_timestep"), _second_timestep),
    **dict.fromkeys(("pooled_projections", "clip_text_pooled"), _pooled),
    **dict.fromkeys(("original_size", "target_size", "crop_coords"), _size),
    **dict.fromkeys(("image_rotary_emb", "video_rotary_emb"), _rotary),
    **dict.fromkeys(("img_shapes", "shape_list"), _GRIDS),
    **dict.fromkeys(("encoder_attention_mask", "encoder_attention_mask_2", "encoder_hidden_states_mask"), _mask(TEXT)),
    "attention_mask": _any_mask,
    "input_ids": _values(torch.zeros(1, TEXT, dtype=torch.int64)),
    "input_img_latents": _values([]),
    "input_image_sizes": _values({}),
    "mask": _mask(TEXT),
    "img_mask": _places,
    **dict.fromkeys(("segment_ids", "indicator"), _roles()),
    **dict.fromkeys(("timestep_indices", "token_tags"), _packed()),
    "video_indices": _values(torch.arange(TOKENS)),
    "audio_indices": _values(torch.arange(TOKENS, 2 * TOKENS)),
    "text_indices": _values(torch.arange(2 * TOKENS, PACKED)),
    **dict.fromkeys(("context_latents", "condition_latents"), context),
    "pose_hidden_states": pose,
    "face_pixel_values": face,
    "latents_clean": earlier(1),
    "latents_history_2x": earlier(2),
    "latents_history_4x": earlier(16),
    **dict.fromkeys(("indices_latents", "indices_latents_clean"), _values(torch.arange(FRAMES))),
    "indices_latents_history_2x": _values(torch.arange(2)),
    "indices_latents_history_4x": _values(torch.arange(16)),
    "chunk_partition": _values([FRAMES]),
    "kv_cache": _cache,
    "kv_cache_mode": _cache_mode,
    "seq_len": _values(TOKENS),
    "offset_grid_sizes": _values(torch.tensor([[FRAMES, SIDE, SIDE]])),
    "padding_mask": lambda s: iter([meta(1, 1, s.side, s.side)]),
    "img_ids": _ids(TOKENS),
    "txt_ids": _ids(TEXT),
    "position_ids": _positions,
    "guidance": _guidance,
    "encoder_hidden_states_1": _wide(TEXT, "cross_attention_dim"),
    "encoder_hidden_states_2": _wide(TEXT, "text_embed_2_dim", "text_embed_dim_2", "text"),
    "encoder_hidden_states_image": _image_tokens,
    "image_embeds": _wide(16, "image_embed_dim", "image_proj", "image_dim"),
    "image_embeddings": _wide(0, "cross_attention_dim"),
    "text_encoder_layers": _text_layers,
    "encoder_hidden_states_t5": _wide(TEXT, "^caption_channels$", "t5"),
    "encoder_hidden_states_llama3": _llama_layers,
    "pooled_embeds": _wide(0, "^text_emb_dim$", "pooled"),
    "inpaint_latents": earlier(FRAMES),
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
    shapes = Shapes(model, parameters)
    found = {}
    for name, parameter in list(parameters.items())[1:]:
        made = list(_MAKERS[name](shapes)) if name in _MAKERS else []
        if made and parameter.default is not parameter.empty:
            made.insert(len(made) if name in _WANTED else 0, ABSENT)
        if made:
            found[name] = made
    return found
