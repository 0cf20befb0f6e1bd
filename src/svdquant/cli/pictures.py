"""Saving pictures whole or not at all, naming them, and comparing two."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import SVDQuantError

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
# Reported for pictures that are equal, which have no finite ratio.
IDENTICAL_DB = 100.0


def save_picture(picture: Image, path: Path) -> None:
    """Writes `path` atomically; its folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        picture.convert("RGB").save(temporary, format=FORMATS[path.suffix.lower()])
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or error
        raise SVDQuantError(f"{path}: could not be written ({reason}); free disk space or name another path") from error
    finally:
        temporary.unlink(missing_ok=True)


def picture_paths(output: Path, prompts: list[str], seeds: list[int]) -> list[Path]:
    """Where each picture goes, prompt by prompt and seed by seed.

    A file name is taken as it is for one picture, and numbered for several; anything else is a folder. Raises
    `SVDQuantError` where `output` cannot be either.
    """
    several = len(prompts) * len(seeds) > 1
    if output.is_dir() or output.suffix.lower() not in FORMATS:
        if output.is_file():
            raise SVDQuantError(f"{output}: is a file and no picture; name a folder, or a file ending in .png")
        return [output / f"{slug(prompt)}-{seed}.png" for prompt in unique(prompts) for seed in seeds]
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
    return [p if names.count(names[i]) == 1 else f"{i + 1} {p}" for i, p in enumerate(prompts)]


def slug(text: str, length: int = 48) -> str:
    """A prompt as a file name."""
    words = re.sub(r"[^\w]+", "-", text.lower()).strip("-")
    return words[:length].rstrip("-") or "picture"


def psnr(picture: Image, reference: Image) -> float:
    """Peak signal-to-noise ratio in dB of two RGB pictures; `IDENTICAL_DB` at most.

    Raises `SVDQuantError` where their sizes differ.
    """
    import numpy as np

    if picture.size != reference.size:
        raise SVDQuantError(f"pictures of {picture.size} and {reference.size} pixels cannot be compared")
    a, b = (np.asarray(p.convert("RGB"), dtype=np.float64) for p in (picture, reference))
    error = float(np.mean((a - b) ** 2))
    return IDENTICAL_DB if error == 0 else min(float(10 * np.log10(255**2 / error)), IDENTICAL_DB)
