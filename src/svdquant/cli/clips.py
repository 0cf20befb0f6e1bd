"""Saving videos: animated WebP and GIF by Pillow alone, MP4 by what diffusers writes it with; sound next to them."""

from __future__ import annotations

import importlib.util
import wave
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import SVDQuantError
from .pictures import CLIP_FORMATS, FORMATS, replacing

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from ..integrations.drawing import Clip

# Of WebP, whose lossless videos would be ten times as large.
_QUALITY = 90


def check_output(output: Path) -> None:
    """Raises `SVDQuantError` for a file that is neither picture nor video, and where nothing installed writes MP4."""
    if output.is_file() and output.suffix.lower() not in FORMATS | CLIP_FORMATS:
        raise SVDQuantError(f"{output}: is a file and no picture; name a folder, or a file ending in .png or .webp")
    ready = importlib.util.find_spec("cv2") or (
        importlib.util.find_spec("imageio") and importlib.util.find_spec("imageio_ffmpeg")
    )
    if output.suffix.lower() == ".mp4" and not ready:
        raise SVDQuantError(
            f"{output}: MP4 needs another package; `pip install imageio imageio-ffmpeg`, or name a .webp or .gif file"
        )


def save_clip(clip: Clip, path: Path) -> Path | None:
    """Writes `path` atomically, and a .wav next to it where the clip has sound; returns the latter's path."""
    suffix = path.suffix.lower()
    if suffix not in CLIP_FORMATS:
        raise SVDQuantError(f"{path}: a video does not fit into {suffix or 'it'}; name a .mp4, .webp or .gif file")
    frames = [frame.convert("RGB") for frame in clip.frames]
    with replacing(path) as temporary:
        if suffix == ".mp4":
            from diffusers.utils import export_to_video

            export_to_video(frames, str(temporary), fps=clip.fps)  # type: ignore[arg-type]
        else:
            options = {"quality": _QUALITY} if suffix == ".webp" else {}
            frames[0].save(
                temporary,
                format=CLIP_FORMATS[suffix],
                save_all=True,
                append_images=frames[1:],
                duration=round(1000 / clip.fps),
                loop=0,
                **options,
            )
    if clip.sound is None:
        return None
    sound = path.with_suffix(".wav")
    with replacing(sound) as temporary:
        _write_sound(clip.sound, clip.sound_rate, temporary)
    return sound


def _write_sound(samples: Tensor, rate: int, path: Path) -> None:
    """samples [channels, N] from -1 to 1, as 16-bit PCM."""
    levels = (samples.clamp(-1, 1) * 32767).round().short().T.contiguous()
    with wave.open(str(path), "wb") as file:
        file.setnchannels(levels.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(levels.numpy().astype("<i2").tobytes())


def still(clip: Clip) -> Image:
    """First, middle and last frame side by side, for a sheet."""
    from PIL import Image as images

    chosen = [clip.frames[i] for i in sorted({0, len(clip.frames) // 2, len(clip.frames) - 1})]
    width, height = chosen[0].size
    strip = images.new("RGB", (width * len(chosen), height))
    for number, frame in enumerate(chosen):
        strip.paste(frame, (number * width, 0))
    return strip
