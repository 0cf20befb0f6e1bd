"""`svdquant plan`: what quantizing would do to a model, from its configuration alone."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..config import SVDQuantConfig
from .console import print_json, quiet_libraries, size, table
from .failures import doing
from .options import Json, config_flags, takes

if TYPE_CHECKING:
    from ..ptq.plan import LayerPlan, Plan

_NUMBER = re.compile(r"\.(\d+)(?=\.|$)")


@takes(config=config_flags)
def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A folder, a config.json, a Hub id, or a diffusers class like FluxTransformer2DModel."
        ),
    ],
    config: SVDQuantConfig,
    every: Annotated[bool, typer.Option("--all", help="One line per layer, blocks not joined.")] = False,
    data_free: Annotated[bool, typer.Option("--data-free", help="Estimate without calibration.")] = False,
    dtype: Annotated[str, typer.Option("--dtype", metavar="NAME", help="Of the 16-bit model.")] = "bfloat16",
    json: Json = False,
) -> None:
    """Show which layers quantizing would turn into what, their sizes, and how long it takes. Downloads no weights."""
    import torch

    from ..integrations.pipeline import parse_dtype, skeleton
    from ..ptq.plan import make_plan
    from .estimate import minutes

    quiet_libraries()
    with doing(f"planning {model}"):
        made = make_plan(skeleton(model, parse_dtype(dtype) or torch.bfloat16), config)
    cost = {g.name: minutes(g, config, calibrated=not data_free) for g in made.groups}
    if json:
        print_json(_as_json(made, cost))
        return
    lines = [_Line([layer]) for layer in made.layers.values()]
    if not every:
        lines = _joined(lines)
    rows = [line.cells(cost) for line in lines]
    typer.echo(table(["layer", "", "kind", "group or reason", "K×N", "before", "after", "min"], rows, "<<<<>>>>"))
    quantized = sum(layer.kind != "keep" for layer in made.layers.values())
    typer.echo(
        f"\n{made.model_class} ({made.family}): {quantized} of {len(made.layers)} linears in {len(made.groups)} groups,"
        f" {size(made.bytes_before)} → {size(made.bytes_after)}, about {_minutes(sum(cost.values()))} min to solve on "
        "two CPU cores, drawing the calibration pictures not counted"
    )


@dataclass
class _Line:
    """Layers that differ only in the number of their block."""

    layers: list[LayerPlan]
    numbers: list[int] = field(default_factory=list)

    def cells(self, cost: dict[str, float]) -> list[str]:
        first, count = self.layers[0], len(self.layers)
        name = first.name if count == 1 else _NUMBER.sub(".{" + _ranges(self.numbers) + "}", first.name, count=1)
        kind = first.kind
        if first.spec is not None and first.kind == "svdquant":
            kind = f"{first.spec.weights} rank {first.spec.rank}" + (" rotated" if first.spec.rotate else "")
        elif first.spec is not None:
            kind = f"{first.spec.weights} weights only"
        note = first.reason
        if first.kind == "svdquant" and first.group != first.name:
            note = f"with {_within_block(first.group, first.block)}"
        spent = sum(cost.get(layer.name, 0.0) for layer in self.layers)
        return [
            name,
            f"×{count}" if count > 1 else "",
            kind,
            note,
            f"{first.in_features}×{first.out_features}",
            size(sum(layer.bytes_before for layer in self.layers)),
            size(sum(layer.bytes_after for layer in self.layers)),
            _minutes(spent) if spent else "",
        ]


def _joined(lines: list[_Line]) -> list[_Line]:
    """Lines of equal layers in different blocks become one, in the place of the first."""
    found: dict[Any, _Line] = {}
    for line in lines:
        layer = line.layers[0]
        number = _NUMBER.search(layer.name)
        if number is None:
            found[layer.name] = line
            continue
        key = (
            _NUMBER.sub(".*", layer.name, count=1),
            layer.kind,
            layer.spec,
            layer.in_features,
            layer.out_features,
            layer.reason,
            _within_block(layer.group, layer.block),
        )
        joined = found.setdefault(key, _Line([]))
        joined.layers.append(layer)
        joined.numbers.append(int(number[1]))
    return list(found.values())


def _within_block(name: str, block: str) -> str:
    return name[len(block) + 1 :] if block and name.startswith(f"{block}.") else name


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] as "0-2,5"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _minutes(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}" if value >= 0.05 else "<0.1"


def _as_json(made: Plan, cost: dict[str, float]) -> dict[str, Any]:
    layers = [
        {
            "name": layer.name,
            "kind": layer.kind,
            "group": layer.group,
            "in_features": layer.in_features,
            "out_features": layer.out_features,
            "weights": layer.spec.weights if layer.spec else None,
            "rank": layer.spec.rank if layer.spec else None,
            "rotate": layer.spec.rotate if layer.spec else None,
            "unsigned": [list(segment) for segment in layer.spec.unsigned] if layer.spec else [],
            "reason": layer.reason,
            "bytes_before": layer.bytes_before,
            "bytes_after": layer.bytes_after,
            "minutes": round(cost.get(layer.name, 0.0), 6),
        }
        for layer in made.layers.values()
    ]
    return {
        "model_class": made.model_class,
        "family": made.family,
        "traced": made.traced,
        "groups": len(made.groups),
        "bytes_before": made.bytes_before,
        "bytes_after": made.bytes_after,
        "minutes": round(sum(cost.values()), 6),
        "layers": layers,
    }
