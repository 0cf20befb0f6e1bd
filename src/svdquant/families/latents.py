"""Pictures, videos and sounds as a denoiser may be given them, and what comes beside them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .shapes import SIDE, TOKENS, Maker, Shapes, meta


def latents(s: Shapes) -> Iterator[Any]:
    visual = s.widths("in_visual_dim")
    channels = s.widths("^in_channels$", "in_channels", "in_visual_dim", "in_dim", "^out_channels$")[:2] or [4]
    if s.context_channels:
        channels = [channels[0] - s.context_channels, *channels]
    if "video_indices" in s.parameters:
        # Rows of a packed sequence, one per patch.
        channels = [channels[0] * s.patch_volume]
        yield meta(1, TOKENS, channels[0])
    # Beside the noise a picture and its mask.
    channels += [2 * c + 1 for c in visual]
    side, frames = s.side, s.frames
    # Convolutions halve what they are given again and again.
    length = TOKENS * 16 if "sample" in s.parameters else TOKENS
    listed = [meta(channels[0], frames, side, side)]
    if "cap_feats" in s.parameters or str(s.kinds.get("hidden_states")).startswith("list"):
        yield listed
    sides = [SIDE * 16 if "sample" in s.parameters else side]
    sides += [x for x in s.widths("^sample_size$", "sample_height", "image_size", "input_size") if x not in sides][:1]
    for c in channels:
        for layout in s.layouts():
            for size in sides:
                yield _laid_out(layout, c, frames, size, length)
    yield listed
    yield meta(1, TOKENS, channels[0], s.patch_t, s.patch, s.patch)


def _laid_out(layout: str, channels: int, frames: int, side: int, length: int) -> torch.Tensor:
    lengths = {"N": 1, "C": channels, "F": frames, "H": side, "W": side, "L": length}
    return meta(*(lengths[axis] for axis in layout))


def context(s: Shapes) -> Iterator[Any]:
    """Latents that are joined with the noise: tokens, or pictures one by one."""
    if s.context_channels:
        yield meta(1, TOKENS, s.context_channels)
        yield [meta(s.context_channels, s.frames, s.side, s.side)]


def earlier(frames: int) -> Maker:
    """Frames that were drawn before."""
    return lambda s: (meta(1, c, frames, s.side, s.side) for c in s.widths("^in_channels$")[:1])


def pose(s: Shapes) -> Iterator[Any]:
    for channels in s.widths("^latent_channels$", "^out_channels$"):
        yield meta(1, channels, s.frames - s.patch_t, s.side, s.side)


def face(s: Shapes) -> Iterator[Any]:
    for size in s.widths("motion_encoder_size"):
        yield meta(1, 3, 1, size, size)
