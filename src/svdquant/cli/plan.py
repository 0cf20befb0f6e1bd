"""`svdquant plan`: what quantizing would do to a model, from its configuration alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..config import SVDQuantConfig
from .console import print_json, quiet_libraries, size, table
from .failures import doing
from .options import Base, Json, config_flags, takes

if TYPE_CHECKING:
    from ..ptq.memory import Memory
    from ..ptq.plan import LayerPlan, Plan


@takes(config=config_flags)
def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A folder, a config.json, a Hub id, or a model class like FluxTransformer2DModel.",
        ),
    ],
    config: SVDQuantConfig,
    component: Annotated[
        str | None,
        typer.Option("--component", metavar="NAME", help="Of a pipeline, e.g. text_encoder_2; its denoiser."),
    ] = None,
    base: Base = None,
    every: Annotated[bool, typer.Option("--all", help="One line per layer, blocks not joined.")] = False,
    leftovers: Annotated[bool, typer.Option("--leftovers", help="Also a table of what stays in 16 bits.")] = False,
    data_free: Annotated[bool, typer.Option("--data-free", help="Estimate without calibration.")] = False,
    dtype: Annotated[str, typer.Option("--dtype", metavar="NAME", help="Of the 16-bit model.")] = "bfloat16",
    tokens: Annotated[
        int, typer.Option("--tokens", metavar="N", min=1, help="Rows that a layer multiplies, for its memory.")
    ] = 4608,
    json: Json = False,
) -> None:
    """Show which layers quantizing would turn into what, their sizes, and how long it takes. Downloads no weights."""
    import torch

    from ..integrations.components import planned_config
    from ..integrations.pipeline import parse_dtype, skeleton
    from ..ptq.leftovers import find_leftovers, percent
    from ..ptq.memory import estimate
    from ..ptq.plan import make_plan
    from .estimate import minutes

    quiet_libraries()
    with doing(f"planning {model}"):
        planned = skeleton(model, parse_dtype(dtype) or torch.bfloat16, component, base)
        config = planned_config(config, planned, component)
        made = make_plan(planned, config)
        stayed = find_leftovers(planned, made, config)
        memory = estimate(planned, made, config, not data_free, tokens)
    cost = {g.name: minutes(g, config, calibrated=not data_free) for g in made.groups}
    if json:
        print_json(_as_json(made, cost) | {"leftovers": stayed.to_dict(), "memory": asdict(memory)})
        return
    layers = list(made.layers.values())
    lines = [_Line(layer.name, [layer]) for layer in layers] if every else _joined(layers)
    rows = [line.cells(cost) for line in lines]
    typer.echo(table(["layer", "", "kind", "group or reason", "K×N", "before", "after", "min"], rows, "<<<<>>>>"))
    quantized = sum(layer.kind != "keep" for layer in made.layers.values())
    typer.echo(
        f"\n{made.model_class} ({made.family}): {quantized} of {len(made.layers)} linears in {len(made.groups)} groups,"
        f" {size(made.bytes_before)} → {size(made.bytes_after)}, about {_minutes(sum(cost.values()))} min to solve on "
        "two CPU cores, drawing the calibration pictures not counted"
    )
    typer.echo(_memory(memory))
    typer.echo(stayed.hint() or f"{percent(stayed.share)} of the model's bytes stay in 16 bits")
    if leftovers or every:
        typer.echo("\n" + stayed.table())


def _memory(memory: Memory) -> str:
    cpu, gpu = (size(memory.multiplying[name]) for name in ("cpu", "gpu"))
    return (
        f"memory: {size(memory.weights)} of weights, and up to {cpu} on a CPU, {gpu} on a GPU while a layer multiplies "
        f"{memory.tokens:,} tokens; solving takes up to {size(memory.solving)}, for {memory.solving_group}"
    )


@dataclass
class _Line:
    """Layers that differ only in numbers of their path."""

    name: str
    layers: list[LayerPlan]

    def cells(self, cost: dict[str, float]) -> list[str]:
        first, count = self.layers[0], len(self.layers)
        kind = first.kind
        if first.spec is not None and first.kind == "svdquant":
            kind = f"{first.spec.weights} rank {first.spec.rank}" + (" rotated" if first.spec.rotate else "")
        elif first.spec is not None:
            kind = f"{first.spec.weights} weights only"
        note = first.reason
        if first.kind == "svdquant" and first.group != first.name:
            note = f"with {_beside(first)}"
        spent = sum(cost.get(layer.name, 0.0) for layer in self.layers)
        return [
            self.name,
            f"×{count}" if count > 1 else "",
            kind,
            note,
            f"{first.in_features}×{first.out_features}",
            size(sum(layer.bytes_before for layer in self.layers)),
            size(sum(layer.bytes_after for layer in self.layers)),
            _minutes(spent) if spent else "",
        ]


def _joined(layers: list[LayerPlan]) -> list[_Line]:
    """Equal layers of different blocks become one line, in the place of the first."""
    from ..ptq.names import joined_names

    def alike(layer: LayerPlan) -> Any:
        return layer.kind, layer.spec, layer.in_features, layer.out_features, layer.reason, _beside(layer)

    lines = joined_names([(layer.name, alike(layer)) for layer in layers])
    return [_Line(name, [layers[i] for i in positions]) for name, positions in lines]


def _beside(layer: LayerPlan) -> str:
    """The layer's group as it is called within the innermost block that both are in."""
    mine, other = layer.name.split("."), layer.group.split(".")
    common = next((i for i, (a, b) in enumerate(zip(mine, other, strict=False)) if a != b), 0)
    numbers = [i + 1 for i in range(common) if mine[i].isdigit()]
    return ".".join(other[max(numbers, default=0) :]) if mine != other else ""


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
