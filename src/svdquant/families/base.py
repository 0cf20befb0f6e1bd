"""What a model family may say about itself. None is needed: the defaults read everything off one traced forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Family:
    """keep: patterns of linears that stay in 16 bits; w4a16: patterns of modulation linears.

    blocks: names of the repeated block lists; empty = found by looking at the model.
    example_inputs(model) -> keyword arguments of one small forward, on the model's own device ("meta" included).
    """

    name: str
    model_classes: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    w4a16: tuple[str, ...] = ()
    example_inputs: Callable[[nn.Module], dict[str, Any]] | None = None


GENERIC = Family("generic")
