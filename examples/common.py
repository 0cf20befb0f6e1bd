"""What the example scripts share: their flags, the device, saving the picture."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import svdquant
from svdquant.config import ACTIVATIONS


def flags(description: str, model: str, base: str, output: str, steps: int, guidance: float) -> argparse.ArgumentParser:
    """The flags that every script has; steps and guidance: the defaults that the model was made for."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default=model, help="quantized model: file, folder or Hub path")
    parser.add_argument("--base", default=base, help="16-bit pipeline with everything else: folder or Hub id")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--guidance", type=float, default=guidance)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default=default_device())
    parser.add_argument(
        "--activations", choices=ACTIVATIONS, help="precision of the activations; None lets the device decide"
    )
    parser.add_argument("--output", type=Path, default=Path(output))
    return parser


def size(parser: argparse.ArgumentParser, height: int = 1024, width: int = 1024) -> None:
    parser.add_argument("--height", type=int, default=height)
    parser.add_argument("--width", type=int, default=width)


def default_device() -> str:
    """The first accelerator, else the CPU."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def draw(pipe: Any, args: argparse.Namespace, **inputs: Any) -> Image.Image:
    """One picture, saved to --output."""
    if args.activations is not None:
        svdquant.set_activations(pipe, args.activations)
    pipe.set_progress_bar_config(disable=False)
    # From the CPU, so that every device starts from the same noise.
    generator = torch.Generator("cpu").manual_seed(args.seed)
    picture = pipe(num_inference_steps=args.steps, generator=generator, **inputs).images[0]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    picture.save(args.output)
    print(f"saved {args.output}")
    return picture


def multiple_of_16(picture: Image.Image) -> dict[str, int]:
    """Height and width of a picture, rounded down to what FLUX can draw."""
    return {"height": picture.height // 16 * 16, "width": picture.width // 16 * 16}
