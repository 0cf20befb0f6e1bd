"""Flags that several verbs share, declared once."""

from __future__ import annotations

import functools
import inspect
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..config import ACTIVATIONS, WEIGHTS, SVDQuantConfig
from ..errors import SVDQuantError
from .recipes import with_recipe

_QUANTIZATION, _DRAWING = "Quantization", "Drawing"


def _either(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


Model = Annotated[str, typer.Argument(metavar="MODEL", help="A pipeline folder, a Hub id, or a fine-tune as one file.")]
ActivationsDial = Annotated[
    str | None,
    typer.Option("--activations", metavar="FORMAT", help=f"{_either(ACTIVATIONS)}; the default is the device's best."),
]
Device = Annotated[
    str, typer.Option("--device", metavar="NAME", help="auto (the first accelerator), cpu, cuda, cuda:1, xpu, mps.")
]
Dtype = Annotated[str | None, typer.Option("--dtype", metavar="NAME", help="bfloat16, float16 or float32.")]
Seed = Annotated[int, typer.Option("--seed", metavar="N", help="Of every random number.")]
Base = Annotated[
    str | None,
    typer.Option(
        "--base", metavar="PIPELINE", help="The pipeline of a model or file that comes without one: folder or Hub id."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


Recipe = Annotated[
    Path | None,
    typer.Option(
        "--recipe",
        metavar="FILE.toml",
        help="Fields of SVDQuantConfig; flags given besides it win.",
        rich_help_panel=_QUANTIZATION,
    ),
]


def config_flags(
    ctx: typer.Context,
    recipe: Recipe = None,
    weights: Annotated[
        str,
        typer.Option(
            "--weights", metavar="FORMAT", help=f"Stored numbers: {_either(WEIGHTS)}.", rich_help_panel=_QUANTIZATION
        ),
    ] = "int4",
    activations: Annotated[
        str,
        typer.Option(
            "--activations",
            metavar="FORMAT",
            help=f"Precision to solve for: {_either(ACTIVATIONS)}. With auto each device chooses at run time.",
            rich_help_panel=_QUANTIZATION,
        ),
    ] = "auto",
    rank: Annotated[
        int,
        typer.Option(
            "--rank", metavar="N", help="Of the 16-bit low-rank branch, 0-256.", rich_help_panel=_QUANTIZATION
        ),
    ] = 32,
    group_size: Annotated[
        int | None,
        typer.Option(
            "--group-size",
            metavar="N",
            help="Inputs per weight scale; the format's own.",
            rich_help_panel=_QUANTIZATION,
        ),
    ] = None,
    smooth: Annotated[
        bool,
        typer.Option("--smooth/--no-smooth", help="Move outliers into the weight.", rich_help_panel=_QUANTIZATION),
    ] = True,
    smooth_grid: Annotated[
        int | None,
        typer.Option(
            "--smooth-grid", metavar="N", min=1, help="Steps of its search; 20.", rich_help_panel=_QUANTIZATION
        ),
    ] = None,
    refine: Annotated[
        int,
        typer.Option("--refine", metavar="N", help="Rounds of branch against residual.", rich_help_panel=_QUANTIZATION),
    ] = 0,
    gptq: Annotated[
        bool, typer.Option("--gptq/--no-gptq", help="GPTQ, or round to nearest.", rich_help_panel=_QUANTIZATION)
    ] = True,
    rotate: Annotated[
        bool | None,
        typer.Option(
            "--rotate/--no-rotate",
            help="Block-Hadamard rotation; on for int4 weights with int4 activations.",
            rich_help_panel=_QUANTIZATION,
            show_default=False,
        ),
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option("--skip", metavar="PATTERN", help="Keep in 16 bits; repeatable.", rich_help_panel=_QUANTIZATION),
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option(
            "--override",
            metavar="PATTERN=JSON",
            help="Other options for some layers, e.g. '*.ff.*={\"rank\": 64}'; repeatable.",
            rich_help_panel=_QUANTIZATION,
        ),
    ] = None,
    modulation: Annotated[
        str,
        typer.Option(
            "--modulation",
            metavar="FORMAT",
            help="AdaLN linears: int4, or none to keep them.",
            rich_help_panel=_QUANTIZATION,
        ),
    ] = "int4",
    text_kv: Annotated[
        str,
        typer.Option(
            "--text-kv",
            metavar="FORMAT",
            help="Keys and values of the text: int8, int4, or none to keep them.",
            rich_help_panel=_QUANTIZATION,
        ),
    ] = "none",
    keep_16bit_above: Annotated[
        float | None,
        typer.Option(
            "--keep-16bit-above", metavar="ERROR", help="Layers worse than it stay.", rich_help_panel=_QUANTIZATION
        ),
    ] = None,
    max_error: Annotated[
        float | None,
        typer.Option(
            "--max-error", metavar="ERROR", help="Fail where a layer is worse.", rich_help_panel=_QUANTIZATION
        ),
    ] = None,
    int8_activations_above: Annotated[
        float | None,
        typer.Option(
            "--int8-activations-above",
            metavar="ERROR",
            help="Layers worse than it are solved for 8-bit activations.",
            rich_help_panel=_QUANTIZATION,
        ),
    ] = None,
    calibration_rows: Annotated[
        int,
        typer.Option("--calibration-rows", metavar="N", help="Inputs kept per layer.", rich_help_panel=_QUANTIZATION),
    ] = 4096,
) -> SVDQuantConfig:
    """The flags of `svdquant.quantize`, under the names of `SVDQuantConfig`; below those given, a recipe's fields."""
    flags: dict[str, Any] = {
        "weights": weights,
        "activations": activations,
        "group_size": group_size,
        "rank": rank,
        "smooth": smooth_grid if smooth and smooth_grid is not None else smooth,
        "refine": refine,
        "gptq": gptq,
        "rotate": rotate,
        "modulation": modulation,
        "text_kv": text_kv,
        "skip": list(skip or ()),
        "overrides": dict(parse_override(text) for text in override or ()),
        "keep_16bit_above": keep_16bit_above,
        "int8_activations_above": int8_activations_above,
        "max_error": max_error,
        "calibration_rows": calibration_rows,
    }
    return with_recipe(ctx, recipe, flags)


def drawing_flags(
    num_inference_steps: Annotated[
        int | None,
        typer.Option(
            "--num-inference-steps", "--steps", metavar="N", min=1, help="The model's own.", rich_help_panel=_DRAWING
        ),
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option("--guidance-scale", metavar="X", help="The model's own.", rich_help_panel=_DRAWING)
    ] = None,
    height: Annotated[
        int | None,
        typer.Option("--height", metavar="N", min=1, help="In pixels; the model's own.", rich_help_panel=_DRAWING),
    ] = None,
    width: Annotated[
        int | None,
        typer.Option("--width", metavar="N", min=1, help="In pixels; the model's own.", rich_help_panel=_DRAWING),
    ] = None,
    num_frames: Annotated[
        int | None,
        typer.Option("--num-frames", metavar="N", min=1, help="Of a video; the model's own.", rich_help_panel=_DRAWING),
    ] = None,
    fps: Annotated[
        float | None,
        typer.Option("--fps", metavar="X", min=0.1, help="Frames a second of a video.", rich_help_panel=_DRAWING),
    ] = None,
    max_sequence_length: Annotated[
        int | None,
        typer.Option(
            "--max-sequence-length", metavar="N", min=1, help="Of the prompt, in tokens.", rich_help_panel=_DRAWING
        ),
    ] = None,
    negative_prompt: Annotated[
        str | None,
        typer.Option("--negative-prompt", metavar="TEXT", help="Where the pipeline has one.", rich_help_panel=_DRAWING),
    ] = None,
    image: Annotated[
        str | None,
        typer.Option("--image", metavar="FILE", help="A picture to draw from.", rich_help_panel=_DRAWING),
    ] = None,
    mask_image: Annotated[
        str | None,
        typer.Option("--mask-image", metavar="FILE", help="White where to draw.", rich_help_panel=_DRAWING),
    ] = None,
) -> dict[str, Any]:
    """Fields of `PipelineOptions`."""
    for file in (image, mask_image):
        if file is not None:
            from ..integrations.conditions import read_picture

            if not Path(file).is_file():
                raise SVDQuantError(f"{file}: does not exist; give a picture")
            read_picture(Path(file))
    for flag, value in (("--guidance-scale", guidance_scale), ("--fps", fps)):
        if value is not None and not math.isfinite(value):
            raise SVDQuantError(f"{flag} {value} is no number to draw with; leave it out for the model's own")
    return {
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "height": height,
        "width": width,
        "num_frames": num_frames,
        "fps": fps,
        "max_sequence_length": max_sequence_length,
        "negative_prompt": negative_prompt,
        "image": image,
        "mask_image": mask_image,
    }


def parse_override(text: str) -> tuple[str, dict[str, Any] | None]:
    """ "PATTERN=JSON" as (pattern, fields of `SVDQuantConfig` or None)."""
    pattern, equals, raw = text.partition("=")
    try:
        fields = json.loads(raw) if equals else ""
    except ValueError:
        fields = ""
    if not pattern or not (fields is None or isinstance(fields, dict)):
        raise SVDQuantError(
            f"--override {text!r} is not PATTERN=JSON; write '*.ff.*={{\"rank\": 64}}' or '*.ff.*=null'"
        )
    return pattern, fields


def takes(**makers: Callable[..., Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator: the named parameters of a verb are made from the flags of a function such as `config_flags`."""

    def decorate(verb: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(verb, eval_str=True)
        made_of = {name: inspect.signature(make, eval_str=True) for name, make in makers.items()}
        flags = {name: list(signature.parameters.values()) for name, signature in made_of.items()}
        parameters = [p for name, p in own.parameters.items() if name not in makers]
        parameters += [p for group in flags.values() for p in group]
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]

        @functools.wraps(verb)
        def run(**values: Any) -> None:
            for name, make in makers.items():
                values[name] = make(**{p.name: values.pop(p.name) for p in flags[name]})
            verb(**values)

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        del run.__wrapped__  # type: ignore[attr-defined]
        return run

    return decorate
