"""Configurations that no script of diffusers holds, against what their papers say of them: linears by kind and size.

SDXL (arXiv:2307.01952, table 1): 0, 2 and 10 transformer blocks per resolution, channels 320, 640 and 1280, context of
2048. SD3.5 (arXiv:2403.03206, section 5): d blocks of 64·d channels, heads of 64, feed-forwards of four times the
width, text of 4096 and pooled text of 2048; the last block reads the text and does not write it. In medium (MMDiT-X)
the first 13 blocks attend to the picture once more.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from svdquant.ptq.linears import find_linears
from svdquant.ptq.plan import linear_shape

CONFIGS = Path(__file__).parent / "configs"
# (what it is, inputs, outputs, bias) → how many.
Census = Counter[tuple[str, int, int, bool]]

_TEXT, _WIDTH = 2048, 320
# Of each resolution: channels, transformer blocks per attention, attentions on the way down and up, residual networks.
_SDXL = ((_WIDTH, 0, 0, 0), (2 * _WIDTH, 2, 2, 3), (4 * _WIDTH, 10, 2, 3))


def sdxl() -> Iterator[tuple[str, int, int, bool, int]]:
    """(what, inputs, outputs, bias, how many). Residual networks add the time: one linear each."""
    time = 4 * _WIDTH
    for channels, depth, down, up in _SDXL:
        middle = channels == 4 * _WIDTH
        attentions = down + up + middle
        blocks = attentions * depth
        yield "attn1.qkv", channels, channels, False, 3 * blocks
        yield "attn2.q", channels, channels, False, blocks
        yield "attn2.kv", _TEXT, channels, False, 2 * blocks
        yield "attn.out", channels, channels, True, 2 * blocks
        yield "ff.in", channels, 8 * channels, True, blocks
        yield "ff.out", 4 * channels, channels, True, blocks
        yield "around", channels, channels, True, 2 * attentions
        yield "resnet", time, channels, True, 2 + 3 + 2 * middle
    # Sine of 320 for the time, of 256 for six sizes beside the pooled text of 1280.
    for inputs in (_WIDTH, 1280 + 6 * 256):
        yield "embedding", inputs, time, True, 1
        yield "embedding", time, time, True, 1


def sd35(depth: int, dual: int) -> Iterator[tuple[str, int, int, bool, int]]:
    """dual: how many blocks attend to the picture twice."""
    d = 64 * depth
    yield "attn", d, d, True, 2 * 4 * depth - 1
    yield "attn2", d, d, True, 4 * dual
    yield "ff.in", d, 4 * d, True, 2 * depth - 1
    yield "ff.out", 4 * d, d, True, 2 * depth - 1
    # Shift, scale and gate before attention and feed-forward; three more for a second attention.
    yield "modulation", d, 9 * d, True, dual
    yield "modulation", d, 6 * d, True, 2 * depth - 1 - dual
    yield "modulation", d, 2 * d, True, 2
    for inputs in (256, 2048):
        yield "embedding", inputs, d, True, 1
        yield "embedding", d, d, True, 1
    yield "text", 4096, d, True, 1
    yield "out", d, 2 * 2 * 16, True, 1


SPECS = {"sdxl-base": sdxl(), "sd3.5-large": sd35(38, 0), "sd3.5-medium": sd35(24, 13)}
_KINDS = {
    "sdxl-base": (
        ("resnets", "resnet"), ("attn1.to_out", "attn.out"), ("attn2.to_out", "attn.out"), ("attn1.", "attn1.qkv"),
        ("attn2.to_q", "attn2.q"), ("attn2.", "attn2.kv"), ("ff.net.0", "ff.in"), ("ff.net.2", "ff.out"),
        ("proj_", "around"), ("embedding", "embedding"),
    ),
    "sd3.5": (
        ("norm", "modulation"), ("attn2.", "attn2"), ("attn.", "attn"), ("net.0", "ff.in"), ("net.2", "ff.out"),
        ("time_text_embed", "embedding"), ("context_embedder", "text"), ("proj_out", "out"),
    ),
}  # fmt: skip


def census(name: str) -> Census:
    data = json.loads((CONFIGS / f"{name}.json").read_text())
    cls: Any = getattr(diffusers, data["_class_name"])
    with torch.device("meta"):
        model = cls.from_config(data)
    kinds = _KINDS[re.sub("-(large|medium)", "", name)]
    found: Census = Counter()
    for linear, module in find_linears(model).items():
        # A UNet's shortcuts are 1×1 convolutions.
        if isinstance(module, torch.nn.Linear):
            kind = next(kind for part, kind in kinds if part in linear)
            inputs, outputs = linear_shape(module)
            found[kind, inputs, outputs, module.bias is not None] += 1
    return found


@pytest.mark.parametrize("name", SPECS)
def test_linears_by_kind_and_size(name: str) -> None:
    wanted: Census = Counter()
    for kind, inputs, outputs, bias, count in SPECS[name]:
        wanted[kind, inputs, outputs, bias] += count
    wanted = +wanted  # without the zeros
    assert census(name) == wanted
