"""What is a block and what is not: lists of projections, of whole blocks, of residual networks."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import nn

from svdquant import SVDQuantConfig
from svdquant.families import GENERIC, Family, family_of
from svdquant.ptq import make_plan
from svdquant.ptq.linears import find_blocks, projection_lists


class Projection(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)


class Nested(nn.Module):
    """One linear, but further down."""

    def __init__(self) -> None:
        super().__init__()
        self.resnet = nn.Sequential(nn.Linear(64, 64))


class Resnet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.time_emb_proj, self.conv = nn.Linear(64, 64), nn.Conv2d(4, 4, 3)


def model(**lists: list[nn.Module]) -> nn.Module:
    made = nn.Module()
    for name, elements in lists.items():
        setattr(made, name, nn.ModuleList(elements))
    return made


def test_projections_beside_blocks() -> None:
    both = model(caption=[Projection(), Projection()], blocks=[Block(), Block()])
    assert projection_lists(both, GENERIC) == ["caption"]
    assert find_blocks(both, GENERIC) == ["blocks.0", "blocks.1"]


@pytest.mark.parametrize(
    ("lists", "blocks"),
    [
        ({"layers": [Projection(), Projection()]}, ["layers.0", "layers.1"]),
        ({"down": [Nested()], "up": [Block()]}, ["down.0", "up.0"]),
        ({"resnets": [Resnet()], "up": [Block()]}, ["resnets.0", "up.0"]),
        ({"mixed": [Projection(), Block()], "up": [Block()]}, ["mixed.0", "mixed.1", "up.0"]),
    ],
)
def test_what_is_no_list_of_projections(lists: dict[str, list[nn.Module]], blocks: list[str]) -> None:
    """The only list there is; linears further down, or beside a convolution; a list of both."""
    assert projection_lists(model(**lists), GENERIC) == []
    assert find_blocks(model(**lists), GENERIC) == blocks


def test_a_family_has_the_last_word() -> None:
    both = model(caption=[Projection()], blocks=[Block()])
    said = Family("said", blocks=("caption", "blocks"))
    assert find_blocks(both, said) == ["caption.0", "blocks.0"] and projection_lists(both, said) == []


@pytest.mark.parametrize(
    ("name", "fields", "count"),
    [
        ("BriaFiboTransformer2DModel", {"num_layers": 2, "num_single_layers": 2}, 4),
        (
            "HiDreamImageTransformer2DModel",
            {"num_layers": 2, "num_single_layers": 2, "patch_size": 2, "caption_channels": [4096, 2048]},
            5,
        ),
    ],
)  # fmt: skip
def test_captions_projected_for_every_block(name: str, fields: dict[str, Any], count: int) -> None:
    """One linear each for what a block reads of the text, before any block runs: they stay, and the plan says why."""
    with torch.device("meta"):
        made = getattr(diffusers, name)(**fields)
    assert projection_lists(made, family_of(made)) == ["caption_projection"]
    assert not any(block.startswith("caption") for block in find_blocks(made, family_of(made)))
    plan = make_plan(made, SVDQuantConfig(rank=16))
    kept = [layer for layer in plan.layers.values() if layer.name.startswith("caption_projection.")]
    assert len(kept) == count
    assert {(layer.kind, layer.reason) for layer in kept} == {("keep", "projects what one of the blocks reads")}
    assert {layer.block.partition(".")[0] for layer in plan.layers.values() if layer.kind != "keep"} <= {
        block.partition(".")[0] for block in find_blocks(made, family_of(made))
    }
