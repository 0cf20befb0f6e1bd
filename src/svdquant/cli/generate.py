"""`svdquant generate`: pictures or videos from a quantized (or 16-bit) pipeline, side by side with another if asked."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..config import ACTIVATIONS
from ..errors import SVDQuantError
from .clips import check_output, save_clip, still
from .console import Stages, print_json, quiet_libraries, remark
from .failures import doing
from .options import ActivationsDial, Base, Device, Dtype, Json, drawing_flags, takes
from .pictures import picture_paths, psnr, save_picture
from .sheet import contact_sheet

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..integrations.drawing import Clip


@dataclass
class Drawn:
    """One picture or video, what it took, and the file of its sound."""

    prompt: str
    seed: int
    picture: Image | Clip
    seconds: float
    sound: Path | None = None

    @property
    def image(self) -> Image:
        """To look at on a sheet."""
        return still(self.picture) if hasattr(self.picture, "frames") else self.picture


@takes(options=drawing_flags)
def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A pipeline, or a model with --base.")],
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT", help="One picture each, per seed.")],
    options: dict[str, Any],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE|FOLDER",
            help="A .png, .jpg or .webp file, for videos .mp4, .webp or .gif, or a folder; picture.png or clip.webp, "
            "for several the folder pictures.",
        ),
    ] = None,
    seed: Annotated[
        list[int] | None, typer.Option("--seed", metavar="N", help="Repeatable: one picture each; 0.")
    ] = None,
    activations: ActivationsDial = None,
    lora: Annotated[
        list[str] | None,
        typer.Option("--lora", metavar="FILE[:STRENGTH]", help="An adapter, at strength 1 by itself; repeatable."),
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option("--compare", metavar="MODEL16", help="Draw the same with this model; make a sheet, print PSNR."),
    ] = None,
    base: Base = None,
    device: Device = "auto",
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Draw pictures or videos. With --compare, also a side-by-side sheet and the PSNR of each picture."""
    if activations is not None and activations not in ACTIVATIONS:
        raise SVDQuantError(f"activations={activations!r} is not one of {', '.join(ACTIVATIONS)}")
    seeds = seed or [0]
    for number in seeds:
        if not -(2**63) <= number < 2**63:
            raise SVDQuantError(f"--seed {number} does not fit 64 bits; give a smaller one")
    if output is not None:
        check_output(output)
    quiet_libraries()
    from ..integrations.adapter_formats import strength_of
    from ..integrations.adapters import check_adapter
    from ..integrations.drawing import PipelineOptions, makes_clips
    from ..integrations.pipeline import check_model

    clips = False
    for name in (model,) if compare is None else (model, compare):
        with doing(f"opening {name}"):
            cls = check_model(name, base, lambda _stage, _done, _total, text: remark(text)).cls
        if cls is not None:
            PipelineOptions(**options).check(cls)
            clips = makes_clips(cls) and options["num_frames"] != 1
    if output is None:
        single = "clip.webp" if clips else "picture.png"
        output = Path(single if len(prompts) * len(seeds) == 1 else "pictures")
    paths = picture_paths(output, prompts, seeds, clips)
    for text in lora or []:
        check_adapter(strength_of(text)[0])
    loading = {"dtype": dtype, "device": device, "base": base}
    drawn = _draw(model, prompts, seeds, options, loading, activations, paths, lora or [])
    ratios: list[float | None] = [None] * len(drawn)
    sheet = None
    if compare is not None:
        reference = _draw(compare, prompts, seeds, options, loading, None, [], lora or [])
        ratios = [psnr(ours.picture, theirs.picture) for ours, theirs in zip(drawn, reference, strict=True)]
        sheet = _sheet_path(output, paths)
        save_picture(_sheet(drawn, reference, ratios, Path(model).name, Path(compare).name), sheet)
    if json:
        print_json(
            {
                "pictures": [_as_json(d, path, r) for d, path, r in zip(drawn, paths, ratios, strict=True)],
                "sheet": None if sheet is None else str(sheet),
            }
        )
        return
    for d, path, ratio in zip(drawn, paths, ratios, strict=True):
        typer.echo(f"{path}  {d.seconds:.1f} s" + ("" if ratio is None else f"  {ratio:.2f} dB"))
        if d.sound is not None:
            typer.echo(f"{d.sound}  sound")
    if sheet is not None:
        typer.echo(f"{sheet}  side by side")


def _as_json(drawn: Drawn, path: Path, ratio: float | None) -> dict[str, Any]:
    entry = {
        "prompt": drawn.prompt,
        "seed": drawn.seed,
        "file": str(path),
        "seconds": round(drawn.seconds, 3),
        "psnr": ratio,
    }
    if hasattr(drawn.picture, "frames"):
        entry |= {"frames": len(drawn.picture.frames), "fps": drawn.picture.fps}
        entry["sound"] = None if drawn.sound is None else str(drawn.sound)
    return entry


def _save(picture: Image | Clip, path: Path) -> Path | None:
    """The file of the sound, if there is any."""
    if hasattr(picture, "frames"):
        return save_clip(picture, path)
    save_picture(picture, path)
    return None


def _draw(
    model: str,
    prompts: list[str],
    seeds: list[int],
    options: dict[str, Any],
    loading: dict[str, Any],
    activations: str | None,
    paths: list[Path],
    adapters: list[str],
) -> list[Drawn]:
    """Loads a pipeline, draws and lets go of it; each picture is saved as soon as it is there."""
    from ..integrations.pipeline import PipelineOptions, draw, load_pipeline
    from ..nn import set_activations

    with doing(f"loading {model}"):
        pipe = load_pipeline(model, **loading)
        if activations is not None:
            set_activations(pipe, activations)
    for adapter in adapters:
        with doing(f"loading {adapter}"):
            _add_adapter(pipe, adapter)
    drawn = []
    total = len(prompts) * len(seeds)
    with doing(f"drawing with {model}"), Stages({"draw": f"drawing with {Path(model).name}"}) as progress:
        for number, (prompt, seed) in enumerate((p, s) for p in prompts for s in seeds):
            progress("draw", number, total, prompt)
            began = time.perf_counter()
            picture = draw(pipe, [prompt], [seed], PipelineOptions(**options))[0]
            if options["num_frames"] == 1 and hasattr(picture, "frames"):
                picture = picture.frames[0]
            seconds = time.perf_counter() - began
            sound = _save(picture, paths[number]) if paths else None
            drawn.append(Drawn(prompt, seed, picture, seconds, sound))
    del pipe
    gc.collect()
    return drawn


def _add_adapter(pipe: Any, text: str) -> None:
    from ..integrations.adapter_formats import strength_of
    from ..integrations.adapters import load_adapter

    file, strength = strength_of(text)
    load_adapter(pipe, file, strength=strength)


def _sheet_path(output: Path, paths: list[Path]) -> Path:
    folder = paths[0].parent
    return folder / "compare.png" if output == folder else output.with_name(f"{output.stem}-compare.png")


def _sheet(drawn: list[Drawn], reference: list[Drawn], ratios: list[Any], name: str, other: str) -> Image:
    captions = [f"{d.prompt} (seed {d.seed})" for d in drawn]
    cells = [
        [(theirs.image, f"{theirs.seconds:.1f} s"), (ours.image, f"{ratio:.1f} dB, {ours.seconds:.1f} s")]
        for ours, theirs, ratio in zip(drawn, reference, ratios, strict=True)
    ]
    return contact_sheet(captions, [other, name], cells)
