"""What a run is asked to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from .cases import Shape
from .measure import SAMPLE_SECONDS
from .peers import Peer

Progress = Callable[[str, int, int, str], None]


def silent(_stage: str, _done: int, _total: int, _text: str) -> None:
    """No progress."""


@dataclass(frozen=True)
class BlockSize:
    """Of the suite of blocks: FLUX.1's, at a picture of 512×512."""

    heads: int = 24
    head_dim: int = 128
    image_tokens: int = 1024
    text_tokens: int = 512

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim

    @property
    def rotary_axes(self) -> tuple[int, int, int]:
        """Rotated channels per position axis, of a head."""
        return self.head_dim // 8, self.head_dim // 16 * 7, self.head_dim // 16 * 7


@dataclass(frozen=True)
class PictureSize:
    """Of the suite of pipelines: None = the model's own. prompts: drawn per sample."""

    steps: int | None = None
    height: int | None = None
    width: int | None = None
    prompts: int = 1
    calibration_prompts: int = 8


@dataclass
class Settings:
    """dtype: of the model. rounds: samples of each contender. gptq: of our layers, slow where K is large.

    progress(stage, done, total, what): called all along.
    """

    shapes: list[Shape] = field(default_factory=list)
    dtype: torch.dtype = torch.bfloat16
    peers: tuple[type[Peer], ...] = ()
    rank: int = 32
    rounds: int = 9
    gptq: bool = False
    sample_seconds: float = SAMPLE_SECONDS
    block: BlockSize = field(default_factory=BlockSize)
    picture: PictureSize = field(default_factory=PictureSize)
    progress: Progress = silent
