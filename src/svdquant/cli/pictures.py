"""Saving pictures whole or not at all, naming them and videos, and comparing two."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import SVDQuantError

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..integrations.drawing import Clip

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
CLIP_FORMATS = {".mp4": "MP4", ".webp": "WEBP", ".gif": "GIF"}
# Reported for pictures that are equal, which have no finite ratio.
IDENTICAL_DB = 100.0


def save_picture(picture: Image, path: Path) -> None:
    """Writes `path` atomically; its folder is made if need be."""
    with replacing(path) as temporary:
        picture.convert("RGB").save(temporary, format=FORMATS[path.suffix.lower()])


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, with the suffix of `path`, which becomes `path` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or error
        raise SVDQuantError(f"{path}: could not be written ({reason}); free disk space or name another path") from error
    finally:
        temporary.unlink(missing_ok=True)


def picture_paths(output: Path, prompts: list[str], seeds: list[int], clips: bool = False) -> list[Path]:
    """Where each picture or, with `clips`, video goes, prompt by prompt and seed by seed.

    A file name is taken as it is for one of them, and numbered for several; anything else is a folder. Raises
    `SVDQuantError` where `output` cannot be either.
    """
    several = len(prompts) * len(seeds) > 1
    formats, others = (CLIP_FORMATS, FORMATS) if clips else (FORMATS, CLIP_FORMATS)
    suffix = output.suffix.lower()
    if output.is_dir() or suffix not in formats:
        made = "videos: name a .mp4, .webp or .gif file" if clips else "pictures: name a .png, .jpg or .webp file"
        if suffix in others and not output.is_dir():
            raise SVDQuantError(f"{output}: this model makes {made}, or a folder")
        if output.is_file():
            raise SVDQuantError(f"{output}: is a file and no picture; name a folder, or a file ending in .png")
        ending = ".webp" if clips else ".png"
        return [output / f"{slug(prompt)}-{seed}{ending}" for prompt in unique(prompts) for seed in seeds]
    if not several:
        return [output]
    return [
        output.with_name(f"{output.stem}-{number}-{seed}{output.suffix}")
        for number in range(1, len(prompts) + 1)
        for seed in seeds
    ]


def unique(prompts: list[str]) -> list[str]:
    """Prompts numbered where their names would coincide."""
    names = [slug(prompt) for prompt in prompts]
    found = [p if names.count(names[i]) == 1 else f"{i + 1} {p}" for i, p in enumerate(prompts)]
    if len({slug(name) for name in found}) < len(found):
        return [f"{i + 1} {p}" for i, p in enumerate(prompts)]
    return found


def slug(text: str, length: int = 48) -> str:
    """A prompt as a file name."""
    words = re.sub(r"[^\w]+", "-", text.lower()).strip("-")
    return words[:length].rstrip("-") or "picture"


def psnr(picture: Image | Clip, reference: Image | Clip) -> float:
    """Peak signal-to-noise ratio in dB of two RGB pictures, or of all frames of two videos; `IDENTICAL_DB` at most.

    Raises `SVDQuantError` where their sizes differ.
    """
    import numpy as np

    ours, theirs = _frames(picture), _frames(reference)
    if ours[0].size != theirs[0].size:
        raise SVDQuantError(f"pictures of {ours[0].size} and {theirs[0].size} pixels cannot be compared")
    if len(ours) != len(theirs):
        raise SVDQuantError(f"videos of {len(ours)} and {len(theirs)} frames cannot be compared")
    squares = []
    for one, other in zip(ours, theirs, strict=True):
        a, b = (np.asarray(frame.convert("RGB"), dtype=np.float64) for frame in (one, other))
        squares.append(float(np.mean((a - b) ** 2)))
    error = sum(squares) / len(squares)
    return IDENTICAL_DB if error == 0 else min(float(10 * np.log10(255**2 / error)), IDENTICAL_DB)


def _frames(picture: Image | Clip) -> list[Image]:
    return picture.frames if hasattr(picture, "frames") else [picture]
