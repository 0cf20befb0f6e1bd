"""One forward to plan from: of the user's own call, else of inputs that a family knows or that are guessed."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from ..families import Family, family_of
from ..families.guess import guess_inputs, skeleton_of, values_optional
from ..families.text import token_ids
from .linears import block_of, find_blocks, find_linears
from .trace import LayerTrace, Run, trace_forward


def trace_model(model: nn.Module, run: Run) -> dict[str, LayerTrace]:
    """What each linear of the model reads in the first forward that `run` makes."""
    blocks = find_blocks(model, family_of(model))
    return trace_forward(model, {name: block_of(name, blocks) for name in find_linears(model)}, run)


@torch.inference_mode(False)  # in which calls do not reach what lets tensors without values pass
def example_traces(model: nn.Module, family: Family, where: dict[str, str]) -> dict[str, LayerTrace]:
    """A trace of the family's own example inputs, else of guessed ones; empty where the model runs with neither.

    where: of each linear the block that it stands in. A diffusers model is traced as its skeleton on the meta device,
    which takes no time and no memory.
    """
    skeleton = skeleton_of(model)
    if skeleton is not None and set(find_linears(skeleton)) != set(where):
        skeleton = None
    traces: dict[str, LayerTrace] = {}
    # A model of transformers that no family names most likely reads tokens.
    example_inputs = family.example_inputs or (token_ids if hasattr(model, "config_class") else None)
    if example_inputs is not None:
        try:
            inputs = example_inputs(skeleton or model)
            # A model in memory may be in training, and its dropout draws numbers.
            with torch.random.fork_rng([]), values_optional() if skeleton is not None else nullcontext():
                return trace_forward(skeleton or model, where, lambda m: m(**inputs))
        except Exception:  # whatever a model raises at unforeseen inputs
            pass
    if skeleton is None:
        return {}

    def attempt(guessed: dict[str, Any]) -> None:
        nonlocal traces
        traces = trace_forward(skeleton, where, lambda m: m(**guessed))

    try:
        guess_inputs(skeleton, attempt)
    except Exception:  # no guess fits: names still tell most
        return {}
    return traces
