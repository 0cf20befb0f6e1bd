"""`svdquant demo`: the whole way on the embedded model, without a download: quantize, save, load, draw, measure."""

from __future__ import annotations

import gc
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..config import SVDQuantConfig
from ..errors import SVDQuantError
from .console import Stages, print_json, quiet_libraries, remark, table
from .failures import doing
from .options import Json
from .pictures import picture_paths, psnr, save_picture
from .quantize import STAGES
from .sheet import contact_sheet

if TYPE_CHECKING:
    from PIL.Image import Image

_SEED = 0
# Enough inputs for a model of 256 channels; more only take longer.
_CALIBRATION_PROMPTS, _CALIBRATION_ROWS = 16, 2048


@dataclass
class Precision:
    """One column of the comparison. psnr: mean over the pictures, against 16 bits; None for 16 bits themselves."""

    name: str
    folder: str
    activations: str | None
    transformer_mib: float = 0.0
    psnr: float | None = None
    seconds_per_picture: float = 0.0
    seconds_to_quantize: float | None = None


def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="Where models and pictures go.")
    ] = Path("svdquant-demo"),
    prompts: Annotated[int, typer.Option("--prompts", metavar="N", min=1, help="How many prompts to draw.")] = 8,
    json: Json = False,
) -> None:
    """Quantize the small embedded model, draw with it in four precisions, and compare. No download, a few minutes."""
    from ..integrations.pipeline import embedded_model, generation_defaults

    model = embedded_model()
    settings = generation_defaults(model)
    if not settings:
        raise SVDQuantError(f"{model}: the embedded model is missing; install svdquant again")
    wanted = settings["demo"][:prompts]
    if output.exists() and not output.is_dir():
        raise SVDQuantError(f"{output}: is a file; choose a folder with --output")
    w4, w8 = output / "w4", output / "w8"
    for folder in (w4, w8):
        ours = folder.is_dir() and ((folder / "svdquant_report.json").is_file() or not any(folder.iterdir()))
        if folder.exists() and not ours:
            raise SVDQuantError(f"{folder}: was not made by this demo; choose another folder with --output")
    quiet_libraries()
    began = time.perf_counter()
    calibration = settings["calibration"][:_CALIBRATION_PROMPTS]
    taken = {
        w4: _quantize(model, w4, SVDQuantConfig(activations="int4", calibration_rows=_CALIBRATION_ROWS), calibration),
        w8: _quantize(model, w8, SVDQuantConfig(weights="int8", calibration_rows=_CALIBRATION_ROWS), calibration),
    }
    columns = [
        Precision("16 bit", str(model), None),
        Precision("W4A4", str(w4), "int4"),
        Precision("W4A8", str(w4), "int8"),
        Precision("W8A8", str(w8), "int8"),
    ]
    pictures = []
    for column in columns:
        drawn, column.seconds_per_picture, column.transformer_mib = _draw(column, wanted)
        column.seconds_to_quantize = taken.get(Path(column.folder))
        pictures.append(drawn)
        names = picture_paths(output / "pictures" / column.name.replace(" ", ""), wanted, [_SEED])
        for picture, path in zip(drawn, names, strict=True):
            save_picture(picture, path)
    ratios = [[psnr(p, reference) for p, reference in zip(drawn, pictures[0], strict=True)] for drawn in pictures]
    for column, of_column in zip(columns[1:], ratios[1:], strict=True):
        column.psnr = sum(of_column) / len(of_column)
    sheet = output / "comparison.png"
    save_picture(_sheet(wanted, columns, pictures, ratios), sheet)
    if json:
        print_json(
            {
                "sheet": str(sheet),
                "seconds": round(time.perf_counter() - began, 1),
                "prompts": wanted,
                "precisions": [
                    asdict(column) | {"psnr_per_picture": None if column.psnr is None else of_column}
                    for column, of_column in zip(columns, ratios, strict=True)
                ],
            }
        )
        return
    typer.echo(_text(columns, output, sheet, wanted[0], time.perf_counter() - began))


def _quantize(model: Path, out: Path, config: SVDQuantConfig, prompts: list[str]) -> float:
    """Quantizes the embedded model into `out`; returns the seconds it took, calibration included."""
    from ..integrations.on_disk import quantize_pipeline
    from ..integrations.pipeline import PipelineOptions

    began = time.perf_counter()
    remark(f"quantizing to {config.weights} …")
    with doing(f"quantizing to {out}"), Stages(STAGES) as progress:
        quantize_pipeline(
            str(model), out, config, prompts=prompts, options=PipelineOptions(), overwrite=True, restart=True,
            progress=progress,
        )  # fmt: skip
    return time.perf_counter() - began


def _draw(column: Precision, prompts: list[str]) -> tuple[list[Image], float, float]:
    """(pictures, seconds per picture, MiB of the transformer) of a pipeline loaded from its folder."""
    from ..integrations.pipeline import PipelineOptions, draw, load_pipeline
    from ..nn import set_activations

    remark(f"drawing in {column.name} …")
    with doing(f"drawing in {column.name}"), Stages({"draw": f"drawing in {column.name}"}) as progress:
        pipe = load_pipeline(column.folder)
        if column.activations is not None:
            set_activations(pipe, column.activations)
        mib = sum(p.nbytes for p in pipe.transformer.parameters()) / 2**20
        drawn: list[Any] = []
        began = time.perf_counter()
        for number, prompt in enumerate(prompts):
            progress("draw", number, len(prompts), prompt)
            drawn += draw(pipe, [prompt], [_SEED], PipelineOptions())
        seconds = (time.perf_counter() - began) / len(prompts)
    del pipe
    gc.collect()
    return drawn, seconds, mib


def _sheet(
    prompts: list[str], columns: list[Precision], pictures: list[list[Image]], ratios: list[list[float]]
) -> Image:
    cells = [
        [
            (pictures[c][row], "" if column.psnr is None else f"{ratios[c][row]:.1f} dB")
            for c, column in enumerate(columns)
        ]
        for row in range(len(prompts))
    ]
    titles = [f"{column.name}, {column.transformer_mib:.1f} MiB" for column in columns]
    return contact_sheet(prompts, titles, cells)


def _text(columns: list[Precision], output: Path, sheet: Path, prompt: str, seconds: float) -> str:
    rows = [
        [
            column.name,
            f"{column.transformer_mib:.2f}",
            "" if column.psnr is None else f"{column.psnr:.2f}",
            f"{column.seconds_per_picture:.2f}",
            "" if column.seconds_to_quantize is None else f"{column.seconds_to_quantize:.0f}",
        ]
        for column in columns
    ]
    header = ["precision", "transformer MiB", "PSNR dB", "s/picture", "s to quantize"]
    return "\n".join(
        [
            table(header, rows, "<>>>>"),
            "",
            f"{output / 'w4'}          the pipeline with 4-bit weights (drawn with 4-bit and with 8-bit activations)",
            f"{output / 'w8'}          the same with 8-bit weights",
            f"{output / 'pictures'}    every picture, by precision",
            f"{sheet}    all of them side by side",
            f"done in {seconds:.0f} s; next, try:",
            f'  svdquant generate {output / "w4"} "{prompt}" -o picture.png --seed 1 --seed 2',
            f"  svdquant inspect {output / 'w4'} --layers",
        ]
    )
