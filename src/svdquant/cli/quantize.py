"""`svdquant quantize`: a 16-bit pipeline to a quantized one."""

from __future__ import annotations

import re
from dataclasses import asdict
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..config import SVDQuantConfig
from ..errors import SVDQuantError
from .console import Stages, print_json, quiet_libraries, size
from .failures import doing
from .options import Base, Device, Dtype, Json, Model, Seed, config_flags, drawing_flags, takes
from .prompts import CALIBRATION

if TYPE_CHECKING:
    from ..ptq.report import Report

STAGES = {"calibrate": "calibrating", "solve": "solving", "write": "writing"}
_PROMPTS = "Calibration"
_MEMORY = re.compile(r"\d+(\.\d+)?\s*[KMGT]i?B", re.IGNORECASE)


@takes(config=config_flags, options=drawing_flags)
def quantize(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="Where the result goes.")],
    config: SVDQuantConfig,
    options: dict[str, Any],
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", metavar="FILE", help="Calibration prompts, one per line.", rich_help_panel=_PROMPTS),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", metavar="TEXT", help="One of them; repeatable.", rich_help_panel=_PROMPTS),
    ] = None,
    data_free: Annotated[
        bool, typer.Option("--data-free", help="No calibration: faster, less exact.", rich_help_panel=_PROMPTS)
    ] = False,
    samples: Annotated[
        int | None,
        typer.Option(
            "--samples",
            metavar="N",
            min=1,
            help="Pictures drawn to calibrate; one per prompt.",
            rich_help_panel=_PROMPTS,
        ),
    ] = None,
    text_encoders: Annotated[
        str,
        typer.Option(
            "--text-encoders",
            metavar="FORMAT",
            help="Text encoders too, weights only: int4, int8 or none. Not those below 2 % of the pipeline.",
        ),
    ] = "none",
    base: Base = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = None,
    max_memory: Annotated[
        str | None, typer.Option("--max-memory", metavar="8GB", help="Host memory for the 16-bit denoiser.")
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Forget an interrupted run instead of resuming.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing FOLDER.")] = False,
    json: Json = False,
) -> None:
    """Quantize a pipeline. An interrupted run is resumed by the same command."""
    from ..integrations.on_disk import quantize_pipeline
    from ..integrations.pipeline import PipelineOptions

    if data_free and (prompts or prompt or samples):
        raise SVDQuantError("--data-free draws nothing; leave out --prompts, --prompt and --samples")
    if data_free and config.int8_activations_above is not None:
        raise SVDQuantError("--int8-activations-above needs calibration; leave it out, or leave out --data-free")
    if max_memory is not None and not _MEMORY.fullmatch(max_memory):
        raise SVDQuantError(f"--max-memory {max_memory!r} is no size; write it as 8GB or 900MB")
    quiet_libraries()
    chosen = None if data_free else calibration_prompts(model, prompts, prompt or [], samples, base)
    with doing(f"quantizing {model}", resumable=True), Stages(STAGES) as progress:
        report = quantize_pipeline(
            model,
            output,
            config,
            prompts=chosen,
            options=PipelineOptions(**options),
            seed=config.seed,
            device=device,
            dtype=dtype,
            base=base,
            text_encoders=text_encoders,
            max_memory=max_memory,
            restart=restart,
            overwrite=overwrite,
            progress=progress,
        )
    if json:
        print_json(_as_json(report, output))
    else:
        typer.echo(_summary(report, output, calibrated=chosen is not None))


def calibration_prompts(
    model: str, file: Path | None, texts: list[str], samples: int | None, base: str | None = None
) -> list[str]:
    """Prompts to calibrate with: given ones, else those of the model or its base, else ours; `samples` of them.

    Too few are repeated. Raises `SVDQuantError` where the file cannot be read or holds none.
    """
    given = list(texts)
    if file is not None:
        given += read_prompts(file)
    if not given:
        from ..integrations.pipeline import generation_defaults, resolve_model

        own, of_base = (generation_defaults(path).get("calibration") for path in (resolve_model(model), base))
        given = own or of_base or list(CALIBRATION)
    return list(islice(cycle(given), samples or len(given)))


def read_prompts(file: Path) -> list[str]:
    """One prompt per line; empty lines are skipped."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise SVDQuantError(f"{file}: cannot be read ({error.strerror}); give a text file of prompts") from error
    except UnicodeDecodeError as error:
        raise SVDQuantError(f"{file}: is no UTF-8 text; give a file with one prompt per line") from error
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise SVDQuantError(f"{file}: holds no prompt; write one per line")
    return found


def _report_file(output: Path) -> Path:
    return output / "svdquant_report.txt"


def _summary(report: Report, output: Path, calibrated: bool) -> str:
    worst = ", ".join(f"{layer.name} {layer.error:.3f}" for layer in report.worst(3))
    kept = len(report.layers) - len(report.quantized)
    of = "of a layer's output" if calibrated else "of a layer's weight (data-free)"
    lines = [
        f"saved       {output}",
        f"{'models' if '+' in report.model_class else 'model':11} {report.model_class}: "
        f"{size(report.bytes_before)} → {size(report.bytes_after)}",
        f"layers      {len(report.quantized)} quantized" + (f", {kept} sent back to 16 bits" if kept else ""),
        f"error       {report.mean_error():.4f} {of} on average; worst {worst}",
        *_stayed(report),
        f"time        {report.seconds:.0f} s of solving",
        f"report      {_report_file(output)}",
        f'next        svdquant generate {output} "your prompt"',
    ]
    return "\n".join(lines)


def _stayed(report: Report) -> list[str]:
    if report.leftovers is None:
        return []
    hint = report.leftovers.hint() or f"{100 * report.leftovers.share:.1f} % of the model's bytes"
    return [f"in 16 bits  {hint}"]


def _as_json(report: Report, output: Path) -> dict[str, Any]:
    return {
        "output": str(output),
        "report": str(_report_file(output)),
        "mean_error": report.mean_error(),
        "worst": [layer.name for layer in report.worst(5)],
        **asdict(report),
        "leftovers": None if report.leftovers is None else report.leftovers.to_dict(),
    }
