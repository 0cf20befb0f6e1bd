"""`svdquant lora`: what concerns adapters' files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console import Stages, print_json, quiet_libraries, size
from .failures import doing
from .options import Base, Json

if TYPE_CHECKING:
    from ..integrations.adapters import AdapterInfo
    from ..integrations.merge import MergeReport

lora = typer.Typer(name="lora", help="Look into adapters, or merge them into a checkpoint.", no_args_is_help=True)


@lora.command("inspect")
def inspect(
    file: Annotated[str, typer.Argument(metavar="FILE", help="An adapter's .safetensors, in whatever format.")],
    json: Json = False,
) -> None:
    """Show an adapter's format, layers, ranks and strengths, from its header."""
    from ..integrations.adapters import inspect_adapter

    quiet_libraries()
    with doing(f"inspecting {file}"):
        info = inspect_adapter(file)
    if json:
        print_json(info.to_dict())
    else:
        typer.echo(_text(info))


def _text(info: AdapterInfo) -> str:
    def counted(numbers: dict) -> str:  # type: ignore[type-arg]
        return ", ".join(f"{what} (×{count})" for what, count in numbers.items()) or "none"

    lines = [
        f"path      {info.path}",
        f"format    {info.kind or 'unknown'}",
        f"layers    {info.modules}: {counted(info.parts)}",
        f"rank      {counted(info.ranks)}",
        f"alpha     {counted(info.alphas)}",
    ]
    if info.extras:
        lines.append(f"besides   {counted(info.extras)}")
    lines += [f"types     {counted(info.dtypes)}", f"total     {size(info.total_bytes)}"]
    return "\n".join(lines + [f"          {key}: {value}" for key, value in info.metadata.items()])


@lora.command("merge")
def merge(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A quantized model: file, folder, Hub id.")],
    adapters: Annotated[
        list[str], typer.Option("--lora", metavar="FILE[:STRENGTH]", help="At strength 1 by itself; repeatable.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="A .safetensors file, or a folder.")],
    grow: Annotated[
        bool, typer.Option("--grow", help="Keep all weights: the low-rank branch takes the adapter in, and grows.")
    ] = False,
    base: Base = None,
    component: Annotated[
        str | None, typer.Option("--component", metavar="NAME", help="Of a pipeline; its denoiser.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model at OUT.")] = False,
    json: Json = False,
) -> None:
    """Write a quantized model with adapters in its weights. Layers that none of them touches stay bit for bit."""
    from ..integrations.adapter_formats import strength_of
    from ..integrations.merge import merge_adapters

    quiet_libraries()
    stages = {"load": "loading", "merge": "solving again", "write": "writing"}
    with doing(f"merging into {model}"), Stages(stages) as progress:
        report = merge_adapters(
            model,
            [strength_of(text) for text in adapters],
            output,
            grow=grow,
            base=base,
            component=component,
            overwrite=overwrite,
            progress=progress,
        )
    if json:
        print_json(report.to_dict())
    else:
        typer.echo(_merged(report))


def _merged(report: MergeReport) -> str:
    lines = [f"saved    {report.target}"]
    lines += [f"adapter  {file} at {strength:g}" for file, strength in report.adapters.items()]
    if report.errors:
        worst = max(report.errors, key=report.errors.__getitem__)
        mean = sum(report.errors.values()) / len(report.errors)
        error = f"weight error {mean:.2%}, at most {report.errors[worst]:.2%} ({worst})"
        lines.append(f"solved   {len(report.errors)} layers again: {error}")
    if report.grown:
        lines.append("branch   grown by the adapters, all weights kept")
    if report.dense:
        lines.append(f"added    to {report.dense} layers in 16 bits")
    return "\n".join(lines)
