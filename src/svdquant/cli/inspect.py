"""`svdquant inspect`: what a checkpoint holds, from its headers."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import print_json, quiet_libraries, size, table
from .failures import doing
from .options import Json

if TYPE_CHECKING:
    from ..checkpoint import CheckpointInfo


def inspect(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="A pipeline, a model folder, a file, a Hub id.")
    ],
    layers: Annotated[bool, typer.Option("--layers", help="One line per quantized layer.")] = False,
    component: Annotated[
        str | None, typer.Option("--component", metavar="NAME", help="Of a pipeline; its denoiser.")
    ] = None,
    leftovers: Annotated[bool, typer.Option("--leftovers", help="A table of what is in 16 bits besides them.")] = False,
    json: Json = False,
) -> None:
    """Show the format, layers and sizes of a checkpoint, from its headers. A Hub id is downloaded first."""
    from ..checkpoint import inspect as read
    from ..integrations.sources import resolve_checkpoint

    quiet_libraries()
    with doing(f"inspecting {checkpoint}"):
        path = resolve_checkpoint(checkpoint)
        info = read(path, component)
        listed = _layers(path, component) if layers else []
    if json:
        data = info.to_dict()
        print_json(data | {"layer_specs": listed} if layers else data)
        return
    typer.echo(_text(info))
    if listed:
        columns = ["kind", "weights", "group_size", "rank", "activations", "rotate", "unsigned"]
        rows = [[entry["name"], *(_cell(entry[column]) for column in columns)] for entry in listed]
        typer.echo("\n" + table(["layer", *columns], rows, "<<<>><<<"))
    if leftovers and info.leftovers is not None:
        typer.echo("\n" + info.leftovers.table())


def _layers(path: Any, component: str | None) -> list[dict[str, Any]]:
    """The stored form of each quantized layer, by its name in the file."""
    from ..checkpoint.info import stored_layers
    from ..checkpoint.layout import open_checkpoint

    specs = stored_layers(open_checkpoint(path, component))
    return [{"name": name, **asdict(spec)} for name, spec in specs.items()]


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else ""
    if isinstance(value, (tuple, list)):
        return " ".join(f"{start}-{stop}" for start, stop in value)
    return str(value)


def _text(info: CheckpointInfo) -> str:
    version = "" if info.format_version is None else f", version {info.format_version}"
    encoder = " text encoder" if info.format == "nunchaku" and info.library == "transformers" else ""
    lines = [
        f"path        {info.path}",
        f"format      {info.format}{encoder}{version}; {info.container}",
        f"model       {info.model_class or 'unknown'} ({info.library or 'no library'}), {info.half}",
    ]
    if info.layers:
        kinds = [f"{n} {kind} {weights}" for kind, by in info.layers.items() for weights, n in by.items()]
        ranks = ", ".join(f"{rank} (×{n})" for rank, n in sorted(info.ranks.items()))
        lines += [
            f"layers      {info.quantized_layers} quantized: {', '.join(kinds)}",
            f"rank        {ranks or 'none'}",
        ]
        if info.format == "svdquant":
            solved = ", ".join(f"{name} (×{n})" for name, n in info.activations.items())
            lines += [f"activations {solved or 'none'}", f"rotated     {info.rotated}"]
        lines += [
            f"packed      {size(info.quantized_bytes)}",
            f"low rank    {size(info.low_rank_bytes)}",
            f"other       {size(info.other_bytes)}",
        ]
    if info.leftovers is not None:
        held = info.leftovers
        lines.append(f"in 16 bits  {size(held.bytes)}, {100 * held.share:.1f} % of the bytes that the 16-bit model had")
        lines += [f"hint        {hint}"] if (hint := held.hint()) else []
    types = ", ".join(f"{name} (×{n})" for name, n in info.dtypes.items())
    lines += [
        f"total       {size(info.total_bytes)} in {info.tensors} tensors, {info.files} file{'s' * (info.files != 1)}",
        f"types       {types}",
    ]
    return "\n".join(lines)
