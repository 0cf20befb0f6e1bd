"""The README's table of model families, from what the tests' models do: run `python tests/families/family_table.py`."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import diffusers
import family_pipelines
import torch
from torch import nn

from svdquant import SVDQuantConfig
from svdquant.checkpoint.nunchaku_layouts import layout_of
from svdquant.config import WEIGHTS
from svdquant.families import fused
from svdquant.integrations import library_of
from svdquant.integrations.adapters import _MIXINS
from svdquant.ptq import make_plan

README = Path(__file__).parents[2] / "README.md"
CONFIGS = Path(__file__).parent / "configs"
BEGIN, END = "<!-- families: made by tests/families/family_table.py -->\n", "<!-- end of families -->\n"


@dataclass(frozen=True)
class Row:
    """configs: of published models, whose sizes are shown; pipelines: their stand-ins in `family_pipelines`."""

    label: str
    configs: tuple[str, ...]
    pipelines: tuple[str, ...]


ROWS = (
    Row(
        "FLUX.1 dev, schnell, Fill, Depth, Canny, Kontext, Redux",
        ("flux.1-dev",),
        ("flux_dev", "flux_schnell", "flux_fill", "flux_control", "flux_kontext", "flux_redux"),
    ),
    Row("FLUX.2 dev", ("flux.2-dev",), ("flux2_dev",)),
    Row("FLUX.2 klein 4B, 9B", ("flux.2-klein-4b", "flux.2-klein-9b"), ("flux2_klein",)),
    Row("SANA 0.6B, 1.6B", ("sana-0.6b", "sana-1.6b"), ("sana",)),
    Row("PixArt-Σ", ("pixart-sigma",), ("pixart_sigma",)),
    Row("SDXL, SDXL-Turbo", ("sdxl-base",), ("sdxl", "sdxl_turbo")),
    Row("SD3.5 medium, large", ("sd3.5-medium", "sd3.5-large"), ("sd35_medium", "sd35_large")),
    Row("Qwen-Image, Edit", ("qwen-image",), ("qwen_image", "qwen_image_edit")),
    Row("Z-Image", ("z-image",), ("z_image",)),
    Row(
        "Wan 2.1, 2.2: 1.3B, 5B, 14B",
        ("wan2.1-t2v-1.3b", "wan2.2-ti2v-5b", "wan2.1-t2v-14b"),
        ("wan", "wan22", "wan_i2v"),
    ),
    Row("LTX-Video 2B, 13B", ("ltx-video-2b", "ltx-video-13b"), ("ltx",)),
    Row("LTX-2", ("ltx-2",), ("ltx2",)),
    Row("HunyuanVideo", ("hunyuanvideo",), ("hunyuan_video",)),
)
HEADER = (
    "model",
    "16 → 4 bit, GiB",
    "quantizes to",
    "runs",
    "fused",
    "LoRA",
    "reads, besides 16-bit folders",
    "writes",
)


def skeleton(config: str) -> nn.Module:
    """A published model on the meta device, in bfloat16."""
    data = json.loads((CONFIGS / f"{config}.json").read_text())
    cls: Any = getattr(diffusers, data["_class_name"])
    with torch.device("meta"):
        model: nn.Module = cls.from_config(data)
    return model.to(torch.bfloat16)


def sizes(row: Row) -> str:
    """GiB before and after of every published configuration of a row."""
    found = []
    for config in row.configs:
        plan = make_plan(skeleton(config), SVDQuantConfig())
        found.append(f"{plan.bytes_before / 2**30:.1f} → {plan.bytes_after / 2**30:.1f}")
    return ", ".join(found)


def formats_of_weights(model: nn.Module) -> str:
    """Those that its linears can be planned in."""
    return ", ".join(w for w in WEIGHTS if make_plan(model, SVDQuantConfig(weights=w, rank=16)).groups)


def fused_parts(model: nn.Module) -> str:
    """What of it runs in fewer passes: the classes that fused forwards take the place of."""
    present = {type(part) for m in model.modules() for part in (m, m.__dict__.get("processor"))}
    names = {theirs.__name__ for theirs, ours in fused._classes().items() if present & {theirs, ours}}
    parts = []
    if any("Block" in name for name in names):
        parts.append("blocks, attention")
    if any("Norm" in name for name in names):
        parts.append("norms")
    if "GELU" in names:
        parts.append("GELU")
    return ", ".join(parts) or "products only"


def loras(pipe: Any, model: nn.Module) -> str:
    if hasattr(pipe, "load_lora_weights"):
        return "diffusers' calls"
    return "`load_adapter`" if library_of(model) == "diffusers" or type(model).__name__ in _MIXINS else "no"


def formats(model: nn.Module, single_file: bool) -> str:
    """Of files, besides folders in 16 bits: single_file of those that are read only."""
    packed = layout_of(model, lambda _: True) is not None
    found = {"svdquant": True, "single file": single_file, "nunchaku": packed, "nunchaku_lite": True}
    return ", ".join(name for name, there in found.items() if there)


def cells(row: Row) -> tuple[str, ...]:
    """Of one row; every pipeline of it has to agree."""
    found = set()
    weights = ""
    for name in row.pipelines:
        pipe = family_pipelines.PIPELINES[name]()
        for model in family_pipelines.denoisers(pipe).values():
            weights = weights or formats_of_weights(model)
            single = hasattr(type(model), "from_single_file")
            found.add((fused_parts(model), loras(pipe, model), formats(model, single), formats(model, False)))
    assert len(found) == 1, f"{row.label}: stand-ins differ: {found}"
    return (row.label, sizes(row), weights, "yes", *found.pop())


def table() -> str:
    lines = [HEADER, ("---",) * len(HEADER), *(cells(row) for row in ROWS)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def in_readme() -> str:
    """The table as README has it."""
    text = README.read_text(encoding="utf-8")
    return text.partition(BEGIN)[2].partition(END)[0]


def write() -> None:
    text = README.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    assert begin, f"README has no line {BEGIN!r}"
    README.write_text(before + BEGIN + table() + END + after, encoding="utf-8")


if __name__ == "__main__":
    write()
