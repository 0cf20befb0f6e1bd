"""What a model family may say about itself. None is needed: the defaults read everything off one traced forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..config import matches


@dataclass(frozen=True)
class Family:
    """keep: patterns of linears that stay in 16 bits, or pattern → why; w4a16: patterns of modulation linears.

    blocks: names of the repeated block lists; empty = found by looking at the model.
    shared: patterns of modulation linears outside of the blocks, whose error would be every block's: they stay.
    example_inputs(model) -> keyword arguments of one small forward, on the model's own device ("meta" included) but for
    what the forward counts with; None = guessed from a diffusers model's signature and configuration.
    """

    name: str
    model_classes: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ()
    keep: tuple[str, ...] | dict[str, str] = ()
    w4a16: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    example_inputs: Callable[[nn.Module], dict[str, Any]] | None = None

    def why_kept(self, name: str) -> str:
        """Why this family keeps the linear `name` in 16 bits; "" where it does not."""
        for pattern in self.keep:
            if matches(pattern, name):
                return self.keep[pattern] if isinstance(self.keep, dict) else f"{self.name} keeps it"
        return ""


GENERIC = Family("generic")
