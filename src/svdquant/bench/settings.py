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
    progress: Progress = silent
