"""`svdquant convert`: a quantized checkpoint in another format."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console import Stages, print_json, quiet_libraries, remark, size
from .failures import doing
from .options import Json

if TYPE_CHECKING:
    from ..integrations.convert import ConvertReport

STAGES = {"load": "loading", "convert": "converting", "write": "writing"}


def convert(
    source: Annotated[
        str, typer.Argument(metavar="IN", help="A quantized model: file, model or pipeline folder, Hub id.")
    ],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="A .safetensors file, or a folder.")],
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help="svdquant, nunchaku or nunchaku_lite.")],
    weights: Annotated[
        str | None, typer.Option("--weights", metavar="FORMAT", help="int4 or nvfp4; by itself, as they are.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="PIPELINE", help="The 16-bit pipeline of a file of transformer blocks alone."),
    ] = None,
    component: Annotated[
        str | None, typer.Option("--component", metavar="NAME", help="Of a pipeline; its denoiser.")
    ] = None,
    blocks_only: Annotated[
        bool, typer.Option("--blocks-only", help="For --to nunchaku: the transformer blocks alone, as in 2024.")
    ] = False,
    dtype: Annotated[
        str | None, typer.Option("--dtype", metavar="NAME", help="Of all in 16 bits: bfloat16, float16, float32.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model at OUT.")] = False,
    json: Json = False,
) -> None:
    """Convert a quantized checkpoint. What OUT's format cannot hold is requantized; stderr says at what cost."""
    from ..integrations.convert import convert as run

    quiet_libraries()
    with doing(f"converting {source}"), Stages(STAGES) as progress:
        report = run(
            source,
            target,
            to,
            weights=weights,
            base=base,
            component=component,
            blocks_only=blocks_only,
            dtype=dtype,
            overwrite=overwrite,
            progress=progress,
        )
    for sentence in (*(change.sentence() for change in report.changes), *report.losses, *report.remarks):
        remark(sentence)
    if json:
        print_json(report.to_dict())
    else:
        typer.echo(_text(report))


def _text(report: ConvertReport) -> str:
    numbers = "bit-exact: every number that is computed with is as it was"
    if not report.exact:
        changed = {name for change in report.changes if change.what == "layer" for name in change.errors}
        numbers = f"changed in {len(changed)} layers, see above" if changed else "changed, see above"
    before, after = size(report.bytes_before), size(report.bytes_after)
    kinds = f", {report.weights}" if report.weights else ""
    return "\n".join(
        [
            f"saved    {report.target}",
            f"format   {report.source_format} → {report.format}, {report.model_class}{kinds}",
            f"layers   {report.layers} quantized",
            f"size     {before} → {after}",
            f"numbers  {numbers}",
        ]
    )
