"""Does a drawn picture show what its prompt asked? Pixel statistics decide, for each attribute on its own.

python examples/embedded_model/check.py [MODEL_FOLDER] [--steps N] [--json OUT] [--sheet OUT.png]
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import scenes
import torch
from diffusers import FluxPipeline
from PIL import Image, ImageDraw, ImageFilter, ImageFont

MODEL = Path(__file__).resolve().parents[2] / "src" / "svdquant" / "assets" / "tiny_flux"
REQUIRED_SHARE = 0.9
OBJECT_TOP = 0.19
MASK_THRESHOLD = 30
MIN_AREA = 0.02
MIN_IOU = 0.5
HORIZONS = np.arange(0.60, 0.7201, 0.01)
UNITS = (0.158, 0.168, 0.178)


def _nearest(colour: np.ndarray, candidates: dict[str, np.ndarray]) -> str:
    return min(candidates, key=lambda name: float(np.abs(colour - candidates[name]).sum()))


@functools.cache
def _background(ground: str, time_of_day: str, horizon: float, size: int) -> np.ndarray:
    return scenes.background(ground, time_of_day, horizon, size).astype(np.float32)


def _time_and_ground(picture: np.ndarray) -> tuple[str, str]:
    size = len(picture)
    top, bottom = slice(int(0.02 * size), int(0.16 * size)), slice(int(0.88 * size), size)
    skies = {
        name: np.median(_background("sea", name, 0.66, size)[top, : size // 2], axis=(0, 1)) for name in scenes.SKIES
    }
    found = _nearest(np.median(picture[top, : size // 2], axis=(0, 1)), skies)
    light = scenes.GROUND_LIGHT[found]
    grounds = {name: np.array(scenes.scaled(colour, light)) for name, colour in scenes.GROUNDS.items()}
    return found, _nearest(np.median(picture[bottom], axis=(0, 1)), grounds)


def object_mask(picture: np.ndarray, ground: str, time_of_day: str) -> tuple[np.ndarray, float]:
    """(bool [H, W] of what differs from the empty scene, height of the horizon as a fraction)."""
    size = len(picture)
    rows = np.median(picture, axis=1)

    def misfit(horizon: float) -> float:
        return float(np.abs(rows - np.median(_background(ground, time_of_day, horizon, size), axis=1)).sum())

    horizon = min((round(float(h), 3) for h in HORIZONS), key=misfit)
    differs = np.abs(picture - _background(ground, time_of_day, horizon, size)).max(axis=-1) > MASK_THRESHOLD
    differs[: int(OBJECT_TOP * size)] = False
    smooth = Image.fromarray((differs * 255).astype(np.uint8)).filter(ImageFilter.MedianFilter(5))
    return np.asarray(smooth) > 127, horizon


def _colour(pixels: np.ndarray, time_of_day: str) -> str | None:
    light = scenes.OBJECT_LIGHT[time_of_day]
    names, references = [], []
    for name, colour in scenes.COLOURS.items():
        body = scenes.scaled(colour, light)
        names += [name, name]
        references += [body, scenes.scaled(body, scenes.SHADE)]
    for fixed in (scenes.BROWN, scenes.CREAM, scenes.GLASS, scenes.DARK):
        names.append("")
        references.append(scenes.scaled(fixed, light))
    distance = np.linalg.norm(pixels[:, None] - np.array(references, dtype=np.float32), axis=-1)
    # A shade may pass for another colour's body, so that a body pixel counts twice.
    votes = dict.fromkeys(scenes.COLOURS, 0.0)
    for index in distance.argmin(axis=1)[distance.min(axis=1) < 60]:
        if names[index]:
            votes[names[index]] += 2.0 if index % 2 == 0 else 1.0
    best = max(votes, key=lambda name: votes[name])
    return best if votes[best] >= 0.2 * len(pixels) else None


@functools.cache
def _silhouettes(horizon: float, size: int) -> tuple[list[str], np.ndarray]:
    names, masks = [], []
    for name in scenes.OBJECTS:
        for unit in UNITS:
            mask = scenes.silhouette(name, scenes.Layout(horizon, 0.0, unit), size)
            names.append(name)
            masks.append(mask)
    return names, np.stack(masks)


def _object(mask: np.ndarray, horizon: float) -> str | None:
    size = len(mask)
    names, silhouettes = _silhouettes(horizon, size)
    columns = np.arange(size)
    centre = (mask.sum(axis=0) * columns).sum() / mask.sum()
    best, best_iou = None, MIN_IOU
    for name, silhouette in zip(names, silhouettes, strict=True):
        own = (silhouette.sum(axis=0) * columns).sum() / silhouette.sum()
        for right in range(round(centre - own) - 2, round(centre - own) + 3):
            for down in (-2, -1, 0, 1, 2):
                moved = np.roll(silhouette, (down, right), axis=(0, 1))
                iou = (moved & mask).sum() / (moved | mask).sum()
                if iou > best_iou:
                    best, best_iou = name, iou
    return best


def recognise(picture: np.ndarray) -> dict[str, str | None]:
    """The five attributes that a picture, uint8 [H, H, 3], shows; None where nothing can be made out."""
    pixels = picture.astype(np.float32)
    time_of_day, ground = _time_and_ground(pixels)
    seen: dict[str, str | None] = dict.fromkeys(scenes.ATTRIBUTES)
    seen.update(ground=ground, time=time_of_day)
    mask, horizon = object_mask(pixels, ground, time_of_day)
    if mask.mean() < MIN_AREA:
        return seen
    centre = np.nonzero(mask)[1].mean() / len(mask)
    seen["place"] = min(scenes.PLACES, key=lambda name: abs(scenes.PLACES[name] - centre))
    seen["colour"] = _colour(pixels[mask], time_of_day)
    seen["object"] = _object(mask, horizon)
    return seen


def score(pictures: Sequence[np.ndarray], asked: Sequence[scenes.Scene]) -> dict[str, float]:
    """Share of pictures that show what was asked, for each attribute and over "all" attributes."""
    hits = dict.fromkeys(scenes.ATTRIBUTES, 0)
    for picture, scene in zip(pictures, asked, strict=True):
        seen = recognise(picture)
        for attribute in hits:
            hits[attribute] += seen[attribute] == getattr(scene, attribute)
    shares = {attribute: count / len(asked) for attribute, count in hits.items()}
    return {**shares, "all": sum(shares.values()) / len(shares)}


def draw(
    pipeline: FluxPipeline, prompts: Sequence[str], steps: int, sequence_length: int, size: int = 96, batch: int = 32
) -> list[np.ndarray]:
    """One picture, uint8 [size, size, 3], for each prompt; prompt i starts from the noise of seed i."""
    pictures: list[np.ndarray] = []
    for start in range(0, len(prompts), batch):
        some = list(prompts[start : start + batch])
        images = pipeline(
            some,
            height=size,
            width=size,
            num_inference_steps=steps,
            guidance_scale=0.0,
            max_sequence_length=sequence_length,
            generator=[torch.Generator().manual_seed(start + i) for i in range(len(some))],
        ).images
        pictures += [np.asarray(image.convert("RGB")) for image in images]
    return pictures


def contact_sheet(
    pictures: Sequence[np.ndarray], captions: Sequence[str], columns: int = 4, zoom: int = 2
) -> Image.Image:
    """Pictures in rows, each enlarged, with its caption under it."""
    font = ImageFont.load_default(11)
    width, height = (zoom * side for side in pictures[0].shape[1::-1])
    gap, text = 12, 34
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + text + gap) + gap), "white")
    pen = ImageDraw.Draw(sheet)
    for index, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        x = gap + index % columns * (width + gap)
        y = gap + index // columns * (height + text + gap)
        sheet.paste(Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS), (x, y))
        subject, _, rest = caption.partition(", ")
        pen.text((x, y + height + 3), f"{subject},\n{rest}", fill="black", font=font)
    return sheet


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path, default=MODEL, help="pipeline folder")
    parser.add_argument("--steps", type=int, help="denoising steps (default: those of the folder's prompts.json)")
    parser.add_argument("--json", type=Path, help="also write the scores here")
    parser.add_argument("--sheet", type=Path, help="also write a contact sheet of the first 16 held-out prompts")
    return parser.parse_args()


def main() -> int:
    """Draw the held-out prompts, print a table, return 1 under 90 %."""
    arguments = parse_arguments()
    settings = json.loads((arguments.model / "prompts.json").read_text())
    steps = arguments.steps or settings["num_inference_steps"]
    pipeline = FluxPipeline.from_pretrained(arguments.model, torch_dtype=torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    _, held_out = scenes.split()
    prompts = [scene.caption for scene in held_out]
    start = time.perf_counter()
    pictures = draw(pipeline, prompts, steps, settings["max_sequence_length"], settings["height"])
    seconds = time.perf_counter() - start
    shares = score(pictures, held_out)
    print(f"{len(prompts)} held-out prompts, {steps} steps, {seconds:.1f} s")
    for attribute, share in shares.items():
        print(f"{attribute:>8} {100 * share:6.1f} %")
    if arguments.json:
        result = {"prompts": len(prompts), "num_inference_steps": steps, "seconds": seconds, "shares": shares}
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    if arguments.sheet:
        contact_sheet(pictures[:16], prompts[:16]).save(arguments.sheet)
    return 0 if shares["all"] >= REQUIRED_SHARE else 1


if __name__ == "__main__":
    sys.exit(main())
